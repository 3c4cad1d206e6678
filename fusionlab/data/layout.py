"""Which split a file of a local folder belongs to: only a folder or table that is *called* for a split is one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fusionlab.data.tables import TEXT_TABLES
from fusionlab.errors import InputError, name_list

TABLES = (".parquet", *TEXT_TABLES)
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(rf"({'|'.join(_SPLIT_OF)})([-_. ]?\d+([-_. ]of[-_. ]\d+)?([-_.][0-9a-f]+)?)?", re.IGNORECASE)
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF)})(?![a-z])", re.IGNORECASE)
_NO_CONTENT = ("__macosx", "__pycache__")
_ABOUT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_NO_IMAGES = (".h5", ".hdf", ".mpg", ".mpeg", ".bufr", ".grib")  # Pillow opens these, and can decode none
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """The files of one split, and the folder that they lie in."""

    root: Path
    files: Sequence[Path]


def files_below(root: Path) -> list[Path]:
    """The files below ``root`` in the order of their paths, links followed; what begins with a dot is left out."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "." and name.lower() not in _NO_CONTENT]
        found += [Path(folder, name) for name in files if name[0] != "."]
    return sorted(found, key=Path.as_posix)


def tables_among(files: Sequence[Path]) -> list[Path]:
    """Those that are tables of rows, by their ending, and not what ``datasets`` keeps beside such."""
    return [file for file in files if file.suffix.lower() in TABLES and file.name not in _ABOUT_TABLES]


def images_among(files: Sequence[Path]) -> list[Path]:
    """Those that are images, by their ending, or where that says nothing by their first bytes."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    endings -= set(_NO_IMAGES)
    return [file for file in files if file.suffix.lower() in endings or _is_image(file)]


def _is_image(file: Path) -> bool:
    if file.suffix.lower() in (*TABLES, *_NO_IMAGES):
        return False
    try:
        with Image.open(file):
            return True
    except (UnidentifiedImageError, OSError):
        return False


def split_called(name: str) -> str | None:
    """The split that a folder or table of this name is of, whatever the case; None if it is called otherwise."""
    return _SPLIT_OF.get(name.casefold())


def tables_named_for_splits(files: Sequence[Path]) -> dict[str, Part]:
    """The tables called ``train.csv``, ``Test.parquet``, ``train-00001-of-00003.parquet`` and the like, by split.

    Raises:
        InputError: a split has tables of several kinds or names, of which one may be a copy of the other.
    """
    found: dict[str, dict[tuple[str, str], list[Path]]] = {}
    for file in files:
        if file.suffix.lower() in TABLES and (match := _SHARD.fullmatch(file.stem)):
            called = (match[1].casefold(), file.suffix.lower())
            found.setdefault(_SPLIT_OF[called[0]], {}).setdefault(called, []).append(file)
    for split, by_name in found.items():
        if len(by_name) > 1:
            tables = [file.name for group in by_name.values() for file in group]
            raise InputError(f"{name_list(tables)} are all called {split}; leave one, or name it with {split}: FILE")
    return {split: Part(group[0].parent, group) for split, by_name in found.items() for group in by_name.values()}


def tables_by_split(root: Path, tables: Sequence[Path]) -> dict[str, Part]:
    """All tables by split: by their own names, else by those of the folders that they lie in, else all are training.

    Raises:
        InputError: some are called for a split and others are not, or a name only contains that of a split.
    """
    kinds = sorted({file.suffix.lower() for file in tables})
    if len(kinds) > 1:
        raise InputError(f"it holds tables of several kinds ({name_list(kinds)}); name those to read: train: FILE")
    named = tables_named_for_splits(tables)
    split_of = {file: split for split, part in named.items() for file in part.files}
    for file in tables:
        folders = [split_called(name) for name in file.relative_to(root).parts[:-1]]
        split_of.setdefault(file, next((split for split in reversed(folders) if split), ""))
    if not any(split_of.values()):
        split_of = _by_words(root, tables) or split_of
    others = [str(file.relative_to(root)) for file, split in split_of.items() if not split]
    if any(split_of.values()) and others:
        raise InputError(
            f"{len(others)} tables are called neither train, validation nor test: {name_list(others)}; rename them, or "
            f"name the table of each split: train: FILE"
        )
    grouped: dict[str, list[Path]] = {}
    for file in tables:
        grouped.setdefault(split_of[file] or "train", []).append(file)
    return {split: Part(root, files) for split, files in grouped.items()}


def _by_words(root: Path, tables: Sequence[Path]) -> dict[Path, str]:
    """The splits of ``NAME_train.csv`` beside ``NAME_test.csv``; empty if no name contains that of a split.

    Raises:
        InputError: names contain those of splits, and differ in more than that.
    """
    words = {file: _WORD.search(file.stem) for file in tables}
    if not any(words.values()):
        return {}
    splits = {file: _SPLIT_OF[word[1].casefold()] for file, word in words.items() if word}
    rests = {_WORD.sub("", file.stem, count=1) for file in tables}
    if len(splits) < len(tables) or len(rests) > 1 or len(set(splits.values())) < max(2, len(tables)):
        names = [str(file.relative_to(root)) for file in splits]
        raise InputError(
            f"{name_list(names)}: a name that contains that of a split may mean it or not; say so: "
            f"train: {names[0]}, or test: {names[0]}"
        )
    return splits


def images_by_split(root: Path, images: Sequence[Path], named: Collection[str]) -> dict[str, Part]:
    """Images in one folder per class, in folders called for splits, or all as training images.

    Args:
        root: the folder.
        images: the images below it.
        named: folders that the task itself names as splits.

    Raises:
        InputError: some folders are called for splits and others are not, or two are called for the same.
    """
    root = _inner(root, images)
    inside: dict[str, list[Path]] = {}
    for image in images:
        first, *deeper = image.relative_to(root).parts
        inside.setdefault(first if deeper else ".", []).append(image)
    if folders := {name: files for name, files in inside.items() if name in named and not split_called(name)}:
        inside = folders | {name: files for name, files in inside.items() if split_called(name)}
    split_of = {name: name if name in folders else split_called(name) for name in inside}
    splits = [split for split in split_of.values() if split]
    is_flat = all(len(image.relative_to(root).parts) == 2 for image in images)
    is_class_among_classes = is_flat and len(set(splits)) == 1 and len(splits) < len(inside)
    if not splits or is_class_among_classes:
        return {"train": Part(root, images)}
    others = [f"{name} ({len(files)} images)" for name, files in inside.items() if split_of[name] is None]
    if others:
        raise InputError(
            f"beside the folders called for splits it has {name_list(others)}; move the classes of each split into its "
            f"folder, such as train/CLASS, or name the folder of each split: train: FOLDER"
        )
    for split in splits:
        called = [name for name, each in split_of.items() if each == split]
        if len(called) > 1:
            raise InputError(f"the folders {name_list(called)} are all called {split}; leave one, or say {split}: NAME")
    return {str(split_of[name]): Part(root / name, files) for name, files in inside.items()}


def _inner(root: Path, images: Sequence[Path]) -> Path:
    """Below folders that hold nothing but one folder of folders, such as ``data``, if they are called for no split."""
    while True:
        parts = [image.relative_to(root).parts for image in images]
        first = parts[0][0]
        if any(len(each) < 3 or each[0] != first for each in parts) or split_called(first):
            return root
        root = root / first


def classes_of(part: Part) -> list[str]:
    """The class of each image: the folder that it lies in, which lies in the split's.

    Raises:
        InputError: images lie elsewhere.
    """
    parts = [image.relative_to(part.root).parts for image in part.files]
    elsewhere = ["/".join(each) for each in parts if len(each) != 2]
    if elsewhere:
        raise InputError(
            f"{len(elsewhere)} of {len(parts)} images in {str(part.root)!r} lie in no folder of their class: "
            f"{name_list(elsewhere)}; expected CLASS/IMAGE, or a table with their labels (metadata.csv with file_name)"
        )
    return [each[0] for each in parts]


def metadata_among(files: Sequence[Path]) -> list[Path]:
    """The tables that say what the images beside them are, by the names that ``datasets`` gives them."""
    return [file for file in files if file.stem == "metadata" and file.suffix in (".csv", ".jsonl", ".parquet")]


def tell_left_out(files: Sequence[Path], part: Mapping[str, Part], task: str) -> None:
    """Log which files in folders of classes are no images, and so no samples."""
    folders = {file.parent for each in part.values() for file in each.files}
    used = {file for each in part.values() for file in each.files}
    others = [str(file) for file in files if file.parent in folders and file not in used]
    if others:
        what = "task %r: %d files in the folders of classes are no images: %s"
        _log.warning(what, task, len(others), name_list(others))
