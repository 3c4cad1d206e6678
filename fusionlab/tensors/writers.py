"""Atomic writers: folders that appear whole or not at all, and weights in sharded safetensors with an index."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.files import accessed, path_of
from fusionlab.tensors.headers import Header, build_header
from fusionlab.tensors.lazy import TensorInfo
from fusionlab.tensors.state import State

MAX_SHARD_SIZE = 5_000_000_000
_WRITE_BYTES = 1 << 24
_HELD_BYTES = 1 << 26
_LONGEST_FILE = 64  # characters in the name of a file that is written into a folder


@contextmanager
def write_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends without an exception, and else disappears.

    It is made beside ``path`` as ``.NAME.tmp-*`` and held by a lock; left-overs of dead processes are removed first.
    At the end everything is synced to disk before it is renamed.

    Args:
        path: the folder to make; its parent is created.
        overwrite: replace a folder that exists; the old one is put back by the next run after a crash in between.

    Yields:
        the folder to write into.

    Raises:
        InputError: ``path`` exists (without ``overwrite``), cannot be made where it is, or the disk is full.
    """
    path = _absolute(path)
    remove_leftovers(path)
    refuse_existing(path, overwrite=overwrite)
    with _staging_folder(path) as staging:
        yield staging
        _sync_tree(staging)
        _rename(staging, path, overwrite=overwrite)
        _sync(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise unless :func:`write_folder` could begin: it is tried, and what that made is removed again.

    Raises:
        InputError: ``path`` exists, or cannot be made where it is: below a file, without the right to, too long.
    """
    path = _absolute(path)
    refuse_existing(path)
    with _staging_folder(path) as staging:
        (staging / ("x" * _LONGEST_FILE)).touch()


@contextmanager
def _staging_folder(path: Path) -> Iterator[Path]:
    """A locked folder beside ``path`` that is removed in the end, with the parents that were made for it alone."""
    missing = [parent for parent in path.parents if not parent.exists()]
    staging = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    with accessed(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    handle = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {str(path)!r} is full; nothing was written.") from error
        if str(error.filename).startswith(str(staging)) or error.errno in (errno.EFBIG, errno.EROFS):
            raise InputError(f"{str(path)!r} cannot be written: {error.strerror}; nothing was.") from error
        raise
    finally:
        os.close(handle)
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path_of(path)))


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raise if ``path`` is taken.

    Raises:
        InputError: it exists (without ``overwrite``), or is a file.
    """
    if path.exists() and (not overwrite or not path.is_dir()):
        raise InputError(f"the output {str(path)!r} exists; give another one or remove it.")


def remove_leftovers(path: Path) -> list[Path]:
    """Remove the staging folders of ``path`` that no living process holds, and return them.

    An old output that a dead process had moved aside, without moving the new one in, is put back instead.
    """
    removed = []
    for leftover in sorted(path.parent.glob(f".{_escape(path.name)}.tmp-*")):
        if leftover.name.endswith("-old") and not path.exists():
            os.rename(leftover, path)
        elif leftover.is_dir() and not _is_held(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
            removed.append(leftover)
    return removed


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_held(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its process renamed or removed it just now
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or a file system without locks on folders, where nothing is removed
        return True
    finally:
        os.close(handle)
    return False


def _rename(staging: Path, path: Path, *, overwrite: bool) -> None:
    if not overwrite or not path.exists():
        try:
            os.rename(staging, path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise InputError(f"the output {str(path)!r} appeared meanwhile; nothing was written.") from error
            raise
        return
    old = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}-old"
    os.rename(path, old)
    os.rename(staging, path)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_state(
    folder: str | Path,
    state: State,
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    name: str = "model.safetensors",
) -> None:
    """Write ``state`` as ``model.safetensors`` (or shards with an index) into an existing folder.

    Not atomic by itself: use it inside :func:`write_folder`.

    Args:
        folder: where to.
        state: tensors on any device, written in their own dtypes; names that share memory are all written.
        metadata: for the file's header, beside ``format: pt``.
        max_shard_size: bytes of tensors in one file.
        name: of the file; one that is there is replaced.
    """
    (Path(folder) / name).unlink(missing_ok=True)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    with WeightsWriter(Path(folder), infos, metadata, max_shard_size=max_shard_size, name=name) as writer:
        for key, tensor in state.items():
            writer.write(key, 0, tensor.detach().cpu().contiguous().flatten())


class WeightsWriter:
    """Safetensors files in transformers' layout, written piece by piece in any order and by several threads.

    Args:
        folder: an existing folder.
        tensors: what will be written.
        metadata: for every file's header, beside ``format: pt``.
        max_shard_size: bytes of tensors in one file; a larger tensor has a file of its own.
        name: of the file.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        *,
        max_shard_size: int = MAX_SHARD_SIZE,
        name: str = "model.safetensors",
    ) -> None:
        self._handles: list[int] = []
        self._held_bytes = 0
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        shards = _shards(tensors, max_shard_size)
        names = [name]
        if len(shards) > 1:
            stem = name.removesuffix(".safetensors")
            names = [f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
            weight_map = {key: file for shard, file in zip(shards, names, strict=True) for key in shard}
            total = sum(info.nbytes for info in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for shard, file in zip(shards, names, strict=True):
            data, header = build_header(list(shard.items()), {"format": "pt"} | dict(metadata or {}))
            self._handles.append(self._begin(folder / file, data, header))

    def _begin(self, path: Path, data: bytes, header: Header) -> int:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(handle, data)
        size = max((item.offset + item.info.nbytes for item in header.tensors.values()), default=len(data))
        os.truncate(handle, size)
        for name, item in header.tensors.items():
            self._places[name] = (handle, item.offset, item.info.dtype)
        return handle

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store the flat contiguous ``values``, in the tensor's own dtype, from its flat index ``start`` on."""
        handle, offset, dtype = self._places[name]
        assert values.dtype == dtype, f"{name}: expected {dtype}, got {values.dtype}"
        if values.numel() == 0:
            return
        data = memoryview(values.cpu().view(torch.uint8).numpy())
        position = offset + start * dtype.itemsize
        while data:
            written = os.pwrite(handle, data[:_WRITE_BYTES], position)
            data, position = data[written:], position + written
            self._send_to_disk(handle, written)

    def _send_to_disk(self, handle: int, written: int) -> None:
        """Every so many bytes, have the system write out what it holds of the file, and forget what is on the disk.

        A large output then neither waits for the disk at the end nor pushes the inputs out of the page cache.
        """
        self._held_bytes += written
        if self._held_bytes >= _HELD_BYTES and hasattr(os, "posix_fadvise"):
            self._held_bytes = 0
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            os.close(self._handles.pop())

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shards(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards
