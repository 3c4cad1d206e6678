"""Decoded images of one task: read once through ``datasets``, kept on disk, memory-mapped from then on."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusionlab.backbones.preprocessing import Preprocessing
from fusionlab.data import sources
from fusionlab.data.cache import cached_folder
from fusionlab.data.columns import column_of, find_column
from fusionlab.data.labels import display_names, read_labels
from fusionlab.data.local import is_local
from fusionlab.data.pixels import DECODE_ERRORS, decode
from fusionlab.data.splits import CARVED, remainder, split_rows
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError, name_list
from fusionlab.tensors.fingerprints import times

_FORMAT = 3
"""Raise to drop every cache, after a change to decoding or to the files below."""
_IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file", "file_name", "filename")
_CHUNK = 256
_log = logging.getLogger(__name__)

OnBadImage = Literal["error", "skip"]


class StoredImages:
    """One task's classes and splits.

    Args:
        task: the task, completed.
        definition: the known task of the same name, or None.
        how: how images are processed.
        on_bad_image: ``error`` names images that do not decode; ``skip`` leaves them out.
        cache: folder of all tasks' caches.
    """

    def __init__(
        self, task: Task, definition: Task | None, *, how: Preprocessing, on_bad_image: OnBadImage, cache: Path
    ) -> None:
        self.task = task
        self.definition = definition
        self.how = how
        self.on_bad_image = on_bad_image
        self._cache = cache
        self._folder = cache / f"{task.name}-{self._key()}"
        described = cached_folder(self._folder / "source", self._describe)
        description = json.loads((described / "index.json").read_text())
        self.class_names: tuple[str, ...] = tuple(description["class_names"])
        self.available: tuple[str, ...] = tuple(description["splits"])
        self._outside: dict[str, list[str]] = description["outside"]

    def split(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """Images (uint8, ``(rows, 3, size, size)``, memory-mapped), labels, the rows of ``split``, its data version.

        Raises:
            InputError: the data has neither the split nor a training split, it is empty, or images do not decode.
        """
        stored_as = split if split in self.available else "train"
        if stored_as not in self.available:
            raise InputError(
                f"task {self.task.name!r} has no {split} split, only {name_list(self.available)}; name one with "
                f"{split}: ..."
            )
        folder = self._decoded(stored_as)
        index = json.loads((folder / "index.json").read_text())
        self._report(stored_as, index["bad"], index["num_rows"])
        rows = split_rows(split, self.available, np.load(folder / "remainders.npy"))
        if not len(rows):
            raise InputError(self._empty(split, stored_as, index["num_rows"]))
        images, labels = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        present = set(labels[rows].tolist())
        missing = [name for label, name in enumerate(self.class_names) if label not in present]
        if split == "train" and missing:
            _log.warning("task %r has no training image of %s", self.task.name, name_list(missing))
        return images, labels, rows, index["data_versions"][split]

    @functools.cached_property
    def _source(self) -> sources.Source:
        return sources.open_source(self.task, self._cache / "datasets", self.definition)

    def _key(self) -> str:
        """What decides the cache: the files (or hub commit) and all that the labels and their order depend on."""
        files = sources.local_fingerprint(self.task) if is_local(self.task) else sources.hub_fingerprint(self._source)
        skipped = ("name", "path", "templates")
        settings = {key: value for key, value in asdict(self.task).items() if key not in skipped}
        known = None if (of := self.definition) is None else [of.class_names, of.class_aliases, of.test]
        text = json.dumps([_FORMAT, files, settings, known], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _describe(self, folder: Path) -> None:
        """Write classes, labels, and which files outside the task's own folder the tables point at."""
        labels = read_labels(self._source, self.definition)
        class_names = display_names(self.task, labels.class_names, self.definition)
        for split, values in labels.by_split.items():
            np.save(folder / f"{split}.npy", values)
        outside = {split: list(self._outside_files(split)) for split in labels.by_split}
        description = {"class_names": class_names, "splits": list(labels.by_split), "outside": outside}
        (folder / "index.json").write_text(json.dumps(description))

    def _outside_files(self, split: str) -> Iterator[str]:
        """Files that a column of paths names and the fingerprint of the task's own files does not cover."""
        table, column, is_path = self._image_column(split)
        if not is_path or not is_local(self.task):
            return
        own = Path(self.task.path or "").expanduser().resolve()
        for row in table:
            path = Path(_encoded(row[column], self._source.root)["path"] or "").resolve()
            if own.is_file() or own not in path.parents:
                yield str(path)

    def _images(self, split: str) -> Iterator[dict[str, Any]]:
        """Each row's ``{"bytes": ... or None, "path": ... or None}``."""
        table, column, _ = self._image_column(split)
        for row in table:
            yield _encoded(row[column], self._source.root)

    def _image_column(self, split: str) -> tuple[Any, str, bool]:
        """The table cut to its image column, undecoded; the column; whether it holds paths as text."""
        from datasets import Image, Value

        table = self._source.tables[split]
        column = column_of(self._source.tables, split, self._named_image_column)
        feature = table.features[column]
        table, dtype = table.select_columns([column]), getattr(feature, "dtype", "")
        if isinstance(feature, Image):
            return table.cast_column(column, Image(decode=False)), column, False
        if isinstance(feature, Value) and dtype.removeprefix("large_") in ("string", "binary"):
            return table, column, dtype.endswith("string")
        if isinstance(feature, Mapping) and "bytes" in feature:
            return table, column, False
        raise InputError(
            f"task {self.task.name!r}: column {column!r} holds neither images nor paths but {feature}; name another "
            f"with image_column: ..."
        )

    def _named_image_column(self, features: Mapping[str, Any]) -> str:
        from datasets import Image

        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        called = [[name] for name in _IMAGE_COLUMNS if name in features]
        candidates = [*([name] for [name] in called if name in images), images, *called]
        return find_column(self.task, features, self.task.image_column, candidates, "image")

    def _decoded(self, split: str) -> Path:
        files = hashlib.sha256()
        for path in self._outside[split]:
            stat = os.stat(path) if os.path.exists(path) else None
            files.update(f"{path}\0{stat and (stat.st_size, times(stat))}\0".encode())
        parts = (split, str(self.how.image_size), self.how.key, files.hexdigest()[:16] if self._outside[split] else "")
        name = "-".join(filter(None, parts))
        return cached_folder(self._folder / name, functools.partial(self._decode, split))

    def _decode(self, split: str, folder: Path) -> None:
        """Write images.npy, labels.npy, remainders.npy and index.json of the rows that decode."""
        labels = np.load(self._folder / "source" / f"{split}.npy")
        size, num_rows = self.how.image_size, len(labels)
        if not num_rows:
            raise InputError(f"the {split} split of task {self.task.name!r} is empty")
        shape = (num_rows, 3, size, size)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        remainders, bad = np.zeros(num_rows, np.uint8), {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start, chunk in _chunks(self._images(split)):
                for row, (pixels, kept_for) in enumerate(pool.map(self._decode_one, chunk), start):
                    remainders[row] = kept_for
                    if isinstance(pixels, str):
                        bad[row] = f"{chunk[row - start].get('path') or f'row {row}'} ({pixels})"
                    else:
                        images[row] = pixels
        good = np.setdiff1d(np.arange(num_rows), list(bad))
        if not len(good):
            raise InputError(self._bad_message(split, list(bad.values()), num_rows))
        if bad:
            images = _compacted(folder / "images.npy", images, good)
        labels, remainders = labels[good], remainders[good]
        images.flush()
        np.save(folder / "labels.npy", labels)
        np.save(folder / "remainders.npy", remainders)
        served = [split] + [other for other in CARVED if split == "train" and other not in self.available]
        rows = {name: split_rows(name, self.available, remainders) for name in served}
        versions = {name: data_version(images, labels, kept) for name, kept in rows.items()}
        index = {"num_rows": num_rows, "bad": list(bad.values()), "data_versions": versions}
        (folder / "index.json").write_text(json.dumps(index))

    def _decode_one(self, encoded: dict[str, Any]) -> tuple[np.ndarray | str, int]:
        """(pixels, or why there are none; the hash's remainder modulo 10)."""
        try:
            data = encoded["bytes"]
            if data is None:
                if encoded.get("path") is None:
                    return "no image", 0
                data = Path(encoded["path"]).read_bytes()
            return decode(data, self.how), remainder(data)
        except DECODE_ERRORS as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200], 0

    def _report(self, split: str, bad: list[str], num_rows: int) -> None:
        if not bad:
            return
        what = self._bad_message(split, bad, num_rows)
        if self.on_bad_image == "error":
            raise InputError(f"{what}. Repair or remove them, or leave them out with data.on_bad_image: skip")
        _log.warning("%s; left out", what)

    def _bad_message(self, split: str, bad: list[str], num_rows: int) -> str:
        return f"{len(bad)} of {num_rows} images of task {self.task.name!r} ({split}) do not decode: {name_list(bad)}"

    def _empty(self, split: str, stored_as: str, num_rows: int) -> str:
        if stored_as == split:
            return f"the {split} split of task {self.task.name!r} is empty"
        return (
            f"the {split} split of task {self.task.name!r} is empty: the data has none, and of its {num_rows} training "
            f"images none fell to it (about a tenth does); name one with {split}: ..."
        )


def data_version(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> str:
    """The first 16 hex digits of SHA-256 over the rows' pixels and then their labels (int64, little-endian)."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), _CHUNK):
        digest.update(np.ascontiguousarray(images[rows[start : start + _CHUNK]]).data)
    digest.update(labels[rows].astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _encoded(value: Any, root: Path | None) -> dict[str, Any]:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": str(root / value) if root and value else value or None}
    return value or {"bytes": None, "path": None}


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    start, chunk = 0, []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield start, chunk
            start, chunk = start + len(chunk), []
    if chunk:
        yield start, chunk


def _compacted(path: Path, images: np.ndarray, rows: np.ndarray) -> np.memmap:
    """The file at ``path`` with only the given rows."""
    beside = path.with_suffix(".good")
    good = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=(len(rows), *images.shape[1:]))
    for start in range(0, len(rows), _CHUNK):
        good[start : start + _CHUNK] = images[rows[start : start + _CHUNK]]
    beside.replace(path)
    return good
