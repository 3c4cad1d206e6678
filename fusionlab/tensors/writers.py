"""Weights in sharded safetensors with an index, written piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fusionlab.tensors.headers import Header, build_header
from fusionlab.tensors.lazy import TensorInfo
from fusionlab.tensors.state import State

MAX_SHARD_SIZE = 5_000_000_000
_WRITE_BYTES = 1 << 24
_HELD_BYTES = 1 << 26


def save_state(
    folder: str | Path,
    state: State,
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    name: str = "model.safetensors",
) -> None:
    """Write ``state`` as ``model.safetensors`` (or shards with an index) into an existing folder.

    Not atomic by itself: use it inside :func:`fusionlab.files.write_folder`.

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
        data = values.cpu().view(torch.uint8).numpy().data
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
