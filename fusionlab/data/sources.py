"""Where a task's samples come from: hub ids and local files as ``datasets`` tables, one per split."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from urllib.parse import quote

from fusionlab.data.layout import TABLES, files_below
from fusionlab.data.local import LocalFiles, Source, input_errors
from fusionlab.data.splits import Piece, check_apart, rows_of, split_names
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError
from fusionlab.tensors.fingerprints import times
from fusionlab.tensors.hub_refusals import patiently

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HEADER_BYTES = 1 << 16


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


def is_absent(task: Task) -> bool:
    """Whether the task's samples are neither here nor, as it is now, on the hub."""
    if task.path is None or Path(task.path).expanduser().exists() or task.path.startswith("embedded:"):
        return False
    import datasets

    try:
        datasets.load_dataset_builder(task.path, task.config, revision=task.revision)
    except Exception:  # whatever keeps it from being read
        return True
    return False


def local_fingerprint(task: Task) -> str:
    """SHA-256 over the local files' names, sizes, modification and change times and, for tables, headers.

    Cheap on purpose: it is what decides whether the cache of a former run still holds. A file that was exchanged for
    another of equal size and modification time has another change time.
    """
    root = Path(task.path or "").expanduser()
    digest = hashlib.sha256()
    files = [root] if root.is_file() else files_below(root)
    for file in files:
        stat = file.stat() if file.exists() else file.lstat()  # a link to nowhere is told when it is read
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{times(stat)}\0".encode())
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
    if path.exists():  # datasets itself knows a file by its modification time alone
        cache = cache / local_fingerprint(task)[:16]
    opener = LocalFiles(task, cache, None if definition is None else definition.test)
    if path.is_file():
        return opener.tables(path.parent, {"train": path})
    if path.is_dir():
        return opener.folder(path)
    return _open_hub(task)


def _open_hub(task: Task) -> Source:
    import datasets

    cache = None
    if task.revision is not None:  # without the hub, datasets takes what was prepared last, of whatever revision
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"revision-{quote(task.revision, safe='')}")
    load = partial(datasets.load_dataset_builder, task.path, task.config, revision=task.revision, cache_dir=cache)
    with input_errors(task, f"the hub set {task.path!r}"):
        builder = patiently(load)
        patiently(builder.download_and_prepare)
    names = split_names(task, [str(name) for name in builder.info.splits])
    sizes = {str(name): info.num_examples for name, info in builder.info.splits.items()}
    bases = {split: name.partition("[")[0] for split, name in names.items()}
    with input_errors(task, f"the hub set {task.path!r}"):
        pieces = {split: Piece(name, bases[split], rows_of(name, sizes[bases[split]])) for split, name in names.items()}
    check_apart(task, pieces)
    with input_errors(task, f"the hub set {task.path!r}"):
        return Source(task, {split: builder.as_dataset(split=name) for split, name in names.items()}, None)
