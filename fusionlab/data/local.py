"""Local files as ``datasets`` tables, one per split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusionlab.data.layout import (
    TABLES,
    Part,
    classes_of,
    files_below,
    images_among,
    images_by_split,
    metadata_among,
    tables_among,
    tables_by_split,
    tables_named_for_splits,
    tell_left_out,
)
from fusionlab.data.splits import SPLITS, Piece, check_apart, rows_of, split_names
from fusionlab.data.tables import TEXT_TABLES, read_tables
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError, name_list
from fusionlab.foreign.cards import card_head
from fusionlab.tensors.hub_refusals import hub_errors, hub_refusal

_METADATA = "metadata"


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


@dataclass(frozen=True)
class LocalFiles:
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
        with input_errors(self.task, f"the folder {str(folder)!r}"):
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
        is_named = len(_files_of(tables_named_for_splits(tables))) == len(tables)
        if tables and (is_named or len({image.parent for image in images}) < 2):  # images of no classes
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
        names = split_names(self.task, list(parts), self.known_test)
        tables, pieces = {}, {}
        for split, name in names.items():
            part = parts[name.partition("[")[0]]
            with input_errors(self.task, f"{name} ({part.files[0]})"), no_progress_bars():
                table = self._with_paths(part.files) if kind == _METADATA else self._read(part, kind)
                rows = rows_of(name, len(table))
                tables[split] = table if len(rows) == len(table) else table.select(rows)
            pieces[split] = Piece(name, tuple(part.files), rows)
        check_apart(self.task, pieces)
        return Source(self.task, tables, root)

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
    return bool(card_head(folder / "README.md").get("configs"))


def _of_images(part: Part) -> Any:
    """The images of a split with their classes, in the order of their paths."""
    import datasets

    classes = classes_of(part)
    label = datasets.ClassLabel(names=sorted(set(classes)))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [str(file) for file in part.files], "label": [label.str2int(name) for name in classes]}
    return datasets.Dataset.from_dict(rows, features=features)


def is_local(task: Task) -> bool:
    """Whether the task's path is a file or folder on this machine."""
    return Path(task.path or "").expanduser().exists()


@contextmanager
def input_errors(task: Task, what: str) -> Iterator[None]:
    """What ``datasets`` raises on input that it cannot read, as one clear message."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, RecursionError, OverflowError, *hub_errors()) as error:  # the middle two of a line of JSON
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not is_local(task) and not isinstance(error, InputError):
            reason = hub_refusal(error) or reason
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        hint = ""
        if not is_local(task) and not isinstance(error, InputError):
            hint = f" No network? Give a local copy: {{name: {task.name}, path: FOLDER}}"
        raise InputError(f"task {task.name!r}: {what} could not be read: {reason.rstrip('.')}.{hint}") from error


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
