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

from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.tasks import Task

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
CARVED = {"validation": 0, "test": 1}
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
_SPLIT_STEMS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
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
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        if file.suffix.lower() in _TABLES:
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
        return opener.files(path.parent, {"train": [path]})
    if path.is_dir():
        return opener.folder(path)
    return _open_hub(task)


def _open_hub(task: Task) -> Source:
    import datasets

    with _input_errors(task, f"the hub set {task.path!r}"):
        builder = datasets.load_dataset_builder(task.path, task.config, revision=task.revision)
        builder.download_and_prepare()
        names = _split_names(task, [str(name) for name in builder.info.splits])
        return Source(task, {split: builder.as_dataset(split=name) for split, name in names.items()}, None)


@dataclass(frozen=True)
class _Local:
    """Opens local files, each split by itself: files may list their classes in different orders, and keep them so."""

    task: Task
    cache: Path
    known_test: str | None

    def folder(self, folder: Path) -> Source:
        import datasets

        task = self.task
        given = {split: name for split in SPLITS if (name := getattr(task, split))}
        named = {str(split): name for split, name in given.items() if (folder / name).is_file()}
        if named:
            whole: dict[str, Any] = dict.fromkeys(named)
            files = {split: [folder / name] for split, name in named.items()}
            return replace(self, task=replace(task, **whole)).files(folder, files)
        if tables := _tables_named_for_splits(folder):
            return self.files(folder, {split: [file] for split, file in tables.items()})
        with _input_errors(task, f"the folder {str(folder)!r}"):
            builder = datasets.load_dataset_builder(str(folder), task.config, cache_dir=str(self.cache))
            found = {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}
        return self.files(folder, found, kind=builder.name)

    def files(self, root: Path, files: Mapping[str, list[Path]], kind: str | None = None) -> Source:
        names = _split_names(self.task, list(files), self.known_test)
        return Source(self.task, {split: self._table(name, files, kind) for split, name in names.items()}, root)

    def _table(self, name: str, files: Mapping[str, list[Path]], kind: str | None) -> Any:
        import datasets

        base, bracket, part = name.partition("[")
        found = files[base]
        suffix = found[0].suffix.lower()
        builder = kind or _TABLES.get(suffix)
        if builder is None:
            raise InputError(f"{found[0]} of task {self.task.name!r} is no table; expected {name_list(_TABLES)}")
        options: dict[str, Any] = {"drop_labels": False} if builder == "imagefolder" else {}
        if suffix == ".tsv":
            options["sep"] = "\t"
        paths = {base: [str(file) for file in found]}
        with _input_errors(self.task, f"{name} ({found[0]})"), no_progress_bars():
            return datasets.load_dataset(
                builder, data_files=paths, split=f"{base}{bracket}{part}", cache_dir=str(self.cache), **options
            )


def _tables_named_for_splits(folder: Path) -> dict[str, Path]:
    """``train.csv`` and the like in the folder itself, also where images lie beside them."""
    found = {}
    for split, stems in _SPLIT_STEMS.items():
        files = [file for file in sorted(folder.iterdir()) if file.suffix in _TABLES and file.stem in stems]
        if files:
            found[split] = files[0]
    return found


def _split_names(task: Task, known: list[str], known_test: str | None = None) -> dict[str, str]:
    """The data's name (or slice) for each split that it has; a split that serves as another is not used twice."""
    given: dict[str, str] = {split: name for split in SPLITS if (name := getattr(task, split))}
    for name in () if known_test is None else (known_test, known_test.partition("_")[0]):
        if "test" not in given and name in known and name not in given.values():
            given["test"] = name
    taken: set[str] = set()
    for split, name in given.items():
        base, bracket, _ = name.partition("[")
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
    except InputError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        hint = ""
        if not is_local(task):
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
