"""Where a task's samples come from: hub ids and local files as ``datasets`` tables, one per split."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusionlab.data.layout import (
    TABLES,
    Part,
    classes_of,
    files_below,
    images_among,
    images_by_split,
    metadata_among,
    split_called,
    tables_among,
    tables_by_split,
    tables_named_for_splits,
    tell_left_out,
)
from fusionlab.data.tables import TEXT_TABLES, read_tables
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.foreign import parse_yaml
from fusionlab.tasks import Task

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
CARVED = {"validation": 0, "test": 1}
_METADATA = "metadata"
_CARD = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """The tables of one task.

    Args:
        task: the task.
        tables: a ``datasets.Dataset`` for each of train, validation and test that the data has; images undecoded.
        root: what relative paths in a table are relative to; None for hub sets.
    """

    task: Task
    tables: Mapping[str, Any]
    root: Path | None


def check_path(task: Task) -> None:
    """Raise unless the task's path is there, or may be a hub id.

    Raises:
        InputError: the path is no file or folder here, and cannot be a hub id.
    """
    path = task.path
    assert path is not None
    if Path(path).expanduser().exists() or _HUB_ID.fullmatch(path):
        return
    raise InputError(f"path {path!r} of task {task.name!r} is not there (relative paths start at {Path.cwd()})")


def is_local(task: Task) -> bool:
    """Whether the task's path is a file or folder on this machine."""
    return Path(task.path or "").expanduser().exists()


def local_fingerprint(task: Task) -> str:
    """SHA-256 over the local files' names, sizes, modification times and, for tables, headers.

    Cheap on purpose: it is what decides whether the cache of a former run still holds.
    """
    root = Path(task.path or "").expanduser()
    digest = hashlib.sha256()
    files = [root] if root.is_file() else files_below(root)
    for file in files:
        stat = file.stat() if file.exists() else file.lstat()  # a link to nowhere is told when it is read
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        if file.suffix.lower() in TABLES:
            with file.open("rb") as stream:
                digest.update(stream.read(_HEADER_BYTES))
    return digest.hexdigest()


def hub_fingerprint(source: Source) -> str:
    """SHA-256 over the names of the prepared tables, which hold the hub set's commit."""
    names = {
        split: [Path(file["filename"]).parts[-4:] for file in table.cache_files]
        for split, table in source.tables.items()
    }
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def open_source(task: Task, cache: Path, definition: Task | None = None) -> Source:
    """Open every split that the task has.

    Args:
        task: the task.
        cache: folder in which ``datasets`` prepares local files; hub sets are prepared in its own cache.
        definition: the known task of the same name: the split that it tests on serves so in a local copy too.

    Raises:
        InputError: the hub set cannot be reached, a split or file is not there, or there is nothing to read.
    """
    path = Path(task.path or "").expanduser()
    opener = _Local(task, cache, None if definition is None else definition.test)
    if path.is_file():
        return opener.tables(path.parent, {"train": path})
    if path.is_dir():
        return opener.folder(path)
    return _open_hub(task)


def _open_hub(task: Task) -> Source:
    import datasets

    with _input_errors(task, f"the hub set {task.path!r}"):
        builder = datasets.load_dataset_builder(task.path, task.config, revision=task.revision)
        builder.download_and_prepare()
    names = _split_names(task, [str(name) for name in builder.info.splits])
    with _input_errors(task, f"the hub set {task.path!r}"):
        return Source(task, {split: builder.as_dataset(split=name) for split, name in names.items()}, None)


@dataclass(frozen=True)
class _Local:
    """Opens local files, each split by itself: files may list their classes in different orders, and keep them so."""

    task: Task
    cache: Path
    known_test: str | None

    def folder(self, folder: Path) -> Source:
        given = {split: name for split in SPLITS if (name := getattr(self.task, split))}
        if named := {str(split): name for split, name in given.items() if (folder / name).is_file()}:
            whole: dict[str, Any] = dict.fromkeys(named)
            files = {split: folder / name for split, name in named.items()}
            return replace(self, task=replace(self.task, **whole)).tables(folder, files)
        with _input_errors(self.task, f"the folder {str(folder)!r}"):
            is_declared = self.task.config is not None or _declares_splits(folder)
            names = [name.partition("[")[0] for name in given.values()]
            found, kind = ({}, None) if is_declared else self._found(folder, names)
            if not found:
                found, kind = self._by_datasets(folder, is_declared)
        return self.parts(folder, found, kind)

    def tables(self, root: Path, files: Mapping[str, Path]) -> Source:
        for file in files.values():
            if file.suffix.lower() not in TABLES:
                raise InputError(f"{file} of task {self.task.name!r} is no table; expected {name_list(TABLES)}")
        return self.parts(root, {split: Part(root, [file]) for split, file in files.items()})

    def _found(self, folder: Path, given: Sequence[str]) -> tuple[dict[str, Part], str | None]:
        """The files of each split, empty if there is neither a table nor an image, and their kind where it matters."""
        files = files_below(folder)
        metadata = metadata_among(files)
        tables = [file for file in tables_among(files) if file not in metadata]
        beside = [file for file in tables if file.parent == folder]
        if found := tables_named_for_splits(beside):
            if others := [file.name for file in beside if file not in _files_of(found)]:
                raise InputError(
                    f"it has tables beside those called for splits: {name_list(others)}; remove them, or name the "
                    f"table of each split: train: FILE"
                )
            return found, None
        images = images_among(files)
        if images and metadata:
            return tables_by_split(folder, metadata), _METADATA
        if tables and (not images or len(_files_of(tables_named_for_splits(tables))) == len(tables)):
            return tables_by_split(folder, tables), None
        if not images:
            return {}, None
        found = images_by_split(folder, images, given)
        tell_left_out(files, found, self.task.name)
        return found, None

    def _by_datasets(self, folder: Path, is_declared: bool) -> tuple[dict[str, Part], str | None]:
        """What the folder's own card declares, or files of a kind that only ``datasets`` reads."""
        import datasets

        builder = datasets.load_dataset_builder(str(folder), self.task.config, cache_dir=str(self.cache))
        declared = builder.config.data_files or {}
        parts = {str(split): Part(folder, [Path(file) for file in files]) for split, files in declared.items()}
        used = _files_of(parts)
        kinds = {file.suffix.lower() for file in used}
        same = [file for file in files_below(folder) if file.suffix.lower() in kinds]
        lost = [] if is_declared else [file for file in same if file not in used]
        if lost:
            raise InputError(
                f"{len(lost)} of its files would be left out, as only others are called for splits: "
                f"{name_list(str(file.relative_to(folder)) for file in lost)}; declare the splits in its README.md"
            )
        return parts, None if kinds <= set(TABLES) else builder.name

    def parts(self, root: Path, parts: Mapping[str, Part], kind: str | None = None) -> Source:
        names = _split_names(self.task, list(parts), self.known_test)
        return Source(self.task, {split: self._table(name, parts, kind) for split, name in names.items()}, root)

    def _table(self, name: str, parts: Mapping[str, Part], kind: str | None) -> Any:
        """One split; the name may cut out a piece of it, as in ``train[:80%]``."""
        base, bracket, rest = name.partition("[")
        part = parts[base]
        with _input_errors(self.task, f"{name} ({part.files[0]})"), no_progress_bars():
            table = self._with_paths(part.files) if kind == _METADATA else self._read(part, kind)
            return _cut(table, f"{bracket}{rest}") if bracket else table

    def _read(self, part: Part, kind: str | None = None) -> Any:
        suffix = part.files[0].suffix.lower()
        if kind is None and suffix in TEXT_TABLES:
            return read_tables(part.files)
        if kind is None and suffix not in TABLES:
            return _of_images(part)
        return self._prepared(part, kind or "parquet")

    def _with_paths(self, metadata: Sequence[Path]) -> Any:
        """The rows of ``metadata.csv`` files with whole paths in ``file_name``.

        Raises:
            InputError: a file has no such column, or there are images beside it that no row names.
        """
        import datasets

        tables = []
        for file in metadata:
            table = self._read(Part(file.parent, [file]))
            if "file_name" not in table.column_names:
                raise InputError(f"{file} has no column 'file_name' that names the images")
            paths = [str(file.parent / (name or "")) for name in table["file_name"][:]]
            columns = [name for name in table.column_names if name.endswith("_file_name")]
            known = {*paths, *(str(file.parent / (name or "")) for column in columns for name in table[column][:])}
            unnamed = [str(image) for image in images_among(files_below(file.parent)) if str(image) not in known]
            if unnamed:
                raise InputError(f"{len(unnamed)} images are not in {file}: {name_list(unnamed)}; add or remove them")
            tables.append(table.remove_columns("file_name").add_column("file_name", paths))
        return datasets.concatenate_datasets(tables)

    def _prepared(self, part: Part, kind: str) -> Any:
        import datasets

        options: dict[str, Any] = {"drop_labels": False} if kind == "imagefolder" else {}
        files = {"train": [str(file) for file in part.files]}
        return datasets.load_dataset(kind, data_files=files, split="train", cache_dir=str(self.cache), **options)


def _files_of(parts: Mapping[str, Part]) -> set[Path]:
    return {file for part in parts.values() for file in part.files}


def _declares_splits(folder: Path) -> bool:
    """Whether the folder has a data card that says which files are which split."""
    card = folder / "README.md"
    head = _CARD.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    declared = parse_yaml(head[1], repr(str(card))) if head else None
    return isinstance(declared, dict) and bool(declared.get("configs"))


def _of_images(part: Part) -> Any:
    """The images of a split with their classes, in the order of their paths."""
    import datasets

    classes = classes_of(part)
    label = datasets.ClassLabel(names=sorted(set(classes)))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [str(file) for file in part.files], "label": [label.str2int(name) for name in classes]}
    return datasets.Dataset.from_dict(rows, features=features)


def _cut(table: Any, piece: str) -> Any:
    """The rows that a slice such as ``[:80%]`` names."""
    import datasets

    (rows,) = datasets.ReadInstruction.from_spec(f"train{piece}").to_absolute({"train": len(table)})
    return table.select(range(rows.from_ or 0, len(table) if rows.to is None else rows.to))


def _split_names(task: Task, known: list[str], known_test: str | None = None) -> dict[str, str]:
    """The data's name (or slice) for each split that it has; a split that serves as another is not used twice."""
    given: dict[str, str] = {split: name for split in SPLITS if (name := getattr(task, split))}
    for name in () if known_test is None else (known_test, known_test.partition("_")[0]):
        if "test" not in given and name in known and name not in given.values():
            given["test"] = name
    taken: set[str] = set()
    for split, name in given.items():
        base, bracket, piece = name.partition("[")
        if base not in known:  # a folder of another case
            base = split_called(base) or base
            given[split] = f"{base}{bracket}{piece}"
        if base not in known:
            raise InputError(f"task {task.name!r} has no split {name!r} for {split}; {did_you_mean(name, known)}")
        if bracket and base in SPLITS and base not in given:
            raise InputError(
                f"task {task.name!r} uses {name!r} for {split}; say what is left of it too, e.g. {base}: '{base}[20%:]'"
            )
        taken.add(base)
    return given | {split: split for split in SPLITS if split not in given and split in known and split not in taken}


def split_rows(split: str, available: Sequence[str], remainders: np.ndarray) -> np.ndarray:
    """The rows of ``split``, int64, in the table that holds them: its own, or training's where the data lacks it.

    A split that the data lacks is carved out of training by a hash of each row's input (SHA-256, first four bytes,
    big-endian): a row is kept for validation if it is 0 modulo 10, and for test if it is 1. So a split is stable, and
    duplicates stay together.

    Args:
        split: train, validation or test.
        available: the splits that the data has.
        remainders: the hash modulo 10 of each row of the table.
    """
    carved = {name: remainder for name, remainder in CARVED.items() if name not in available}
    if split in carved:
        return np.flatnonzero(remainders == carved[split])
    if split == "train":
        return np.flatnonzero(~np.isin(remainders, list(carved.values())))
    return np.arange(len(remainders))


def remainder(data: bytes) -> int:
    """The hash of an input that decides its split where the data lacks one: 0..9."""
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") % 10


@contextmanager
def _input_errors(task: Task, what: str) -> Iterator[None]:
    """What ``datasets`` raises on input that it cannot read, as one clear message."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        hint = ""
        if not is_local(task) and not isinstance(error, InputError):
            hint = f" No network? Give a local copy: {{name: {task.name}, path: FOLDER}}"
        raise InputError(f"task {task.name!r}: {what} could not be read: {reason}.{hint}") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Local files are read in a moment; only downloads deserve a bar."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
