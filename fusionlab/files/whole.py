"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusionlab.errors import InputError
from fusionlab.files.paths import accessed, path_of


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to it at the end, so that no reader sees half of it.

    Raises:
        InputError: it cannot be written where it is: below a file, in the place of a folder, on a full disk.
    """
    _refuse_nameless(path)
    with accessed(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path)
        try:
            yield beside
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def create_text(path: Path, text: str) -> bool:
    """Write a text file where none bears the name, whole and synced to disk; False where one does, which stays.

    Raises:
        InputError: as :func:`written_whole`.
    """
    with accessed(path, "written"):
        beside = _beside(path)
        try:
            _write_in_shared(beside, text)
            sync(beside)
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
    return True


def _write_in_shared(path: Path, text: str, attempts: int = 100) -> None:
    """Write a text file into a folder that other processes remove when they find it empty, such as one of leases."""
    for left in reversed(range(attempts)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_text(text, encoding="utf-8")
            return
        except FileNotFoundError:
            if not left:
                raise


def check_file(name: str | Path) -> Path:
    """The path that a user wrote for a file, ``~`` expanded, where :func:`written_whole` could begin.

    An empty file is made and removed in the nearest folder that there is; no folder is made.

    Raises:
        InputError: an empty name, a folder or a device bears it, or it cannot be written where it is.
    """
    path = path_of(name)
    _refuse_nameless(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{str(name)!r} is {'a folder' if path.is_dir() else 'no plain file'}; give a file's name.")
    _try(path, path.parent, path.name)
    return path


def check_folder(name: str | Path) -> Path:
    """The path that a user wrote for a folder, ``~`` expanded, which is one to write into or can be made.

    Raises:
        InputError: an empty name, a file bears it, or it cannot be written where it is.
    """
    path = path_of(name)
    _try(path, path, "x")
    return path


def _try(path: Path, folder: Path, name: str) -> None:
    """Make and remove an empty file that is called as what is to become ``name``, in or nearest above ``folder``."""
    folder = Path(os.path.abspath(folder))
    there = next(each for each in (folder, *folder.parents) if each.exists())
    beside = _beside(there / name)
    with accessed(path, "written"):
        before = os.stat(there)
        beside.touch()
        beside.unlink()
        os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing was changed


def _refuse_nameless(path: Path) -> None:
    if not path.name or path.name == "..":
        raise InputError(f"{str(path)!r} is a folder; give a file's name.")


def unfinished_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """What processes of this machine are writing below ``folder``, or left half-written, each with its process."""
    prefix = f".tmp-{socket.gethostname()}-"
    for path in folder.rglob(".*.tmp-*"):
        _, found, rest = path.name.partition(prefix)
        if found:
            yield path, int(rest.split("-")[0])


def _beside(path: Path) -> Path:
    """A name for what is to become ``path``, which says whose it is."""
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Have what was written to a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
