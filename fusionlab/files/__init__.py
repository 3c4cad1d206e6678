"""Paths that a user wrote, the system's refusals told as bad input, and files that appear whole or not at all."""

from fusionlab.files.folders import check_writable, refuse_existing, remove_leftovers, write_folder
from fusionlab.files.paths import accessed, is_file, is_there, mistaken, named, nearest, path_of
from fusionlab.files.whole import (
    check_file,
    check_folder,
    create_text,
    remove,
    unfinished_files,
    write_text,
    written_whole,
)

__all__ = [
    "accessed",
    "check_file",
    "check_folder",
    "check_writable",
    "create_text",
    "is_file",
    "is_there",
    "mistaken",
    "named",
    "nearest",
    "path_of",
    "refuse_existing",
    "remove",
    "remove_leftovers",
    "unfinished_files",
    "write_folder",
    "write_text",
    "written_whole",
]
