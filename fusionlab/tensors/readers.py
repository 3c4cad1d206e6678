"""Lazy readers: safetensors, single and sharded, and pickled weights; nothing but headers is read on opening."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.files import accessed, is_there, mistaken, path_of
from fusionlab.foreign import ModelConfig, read_json
from fusionlab.tensors.headers import STORABLE, Header, Placed, read_header
from fusionlab.tensors.lazy import StateWeights, TensorInfo, Weights
from fusionlab.tensors.weight_files import indexed, is_index, unread_weights, weight_files

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Args:
        path: the folder, or the single file.
        files: the weight files.
        weights: its tensors, read when they are asked for.
        index: the index of the files, if they are shards.
    """

    path: Path
    files: tuple[Path, ...]
    weights: Weights
    index: Path | None = None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""
        return self.weights.tensors

    def state(self) -> dict[str, Tensor]:
        """All tensors, in memory and in their own dtypes."""
        return {name: self.weights.read(name) for name in self.weights.tensors}

    @property
    def folder(self) -> Path:
        """The folder that its files lie in."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``, empty where there is none."""
        return _config(self.folder)

    @property
    def unread(self) -> list[str]:
        """What looks like weights in its folder and is not read, by relative path."""
        read = {path for path in (*self.files, self.index) if path is not None}
        return unread_weights(self.path, read) if self.path.is_dir() else []


def open_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Open a model: a folder with safetensors or pickled weights, sharded or not, or a single such file or index.

    In a folder the files are those that ``from_pretrained`` reads. Pickled weights are read only through
    ``weights_only=True``.

    Args:
        path: the folder or file.
        variant: read a folder's files of this variant, such as ``model.fp16.safetensors``.

    Raises:
        InputError: no weights there, a missing shard, an index that points outside its folder or does not fit its
            shards, a corrupt file, or a pickle that is more than plain tensors.
    """
    path = path_of(path)
    if not (path.is_dir() or path.is_file()):
        what = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise InputError(f"{str(path)!r} {what}; give a model's folder or weight file.")
    files: tuple[Path, ...]
    index: Path | None
    if path.is_dir():
        files, index = weight_files(path, _config(path), variant)
    elif is_index(path.name):
        files, index = indexed(path.parent, path.name)
    else:
        files, index = (path,), None
    weights: Weights
    if files[0].suffix == ".safetensors":
        weights = SafetensorsWeights({file: read_header(file) for file in files})
    else:
        weights = StateWeights({name: tensor for file in files for name, tensor in load_pickle(file).items()})
    return Checkpoint(path, files, weights, index)


def _config(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    return read_json(config, ModelConfig) if is_there(config) else {}


def load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors by name in a pickled file, which is read through ``weights_only=True``.

    Raises:
        InputError: it cannot be read, is no such file, is more than tensors by name, or has one that is not dense or of
            a dtype that safetensors could not hold.
    """
    with accessed(file), open(file, "rb") as opened:
        begins = opened.read(256)
    if what := mistaken(file, begins):
        raise InputError(f"{str(file)!r} is not plain weights: {what}.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # on bytes that are no such file the unpickler raises whatever they lead it to
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{str(file)!r} is not plain weights and is not opened: {first_line} "
            "Convert it to safetensors where it came from."
        ) from error
    is_state = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not is_state or not all(isinstance(item, Tensor) for item in content.values()):
        raise InputError(f"{str(file)!r} is not a mapping of names to tensors; save the model's state_dict() alone.")
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in STORABLE:
            kind = "without values" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
            raise InputError(
                f"{str(file)!r}: {name} is {kind}; expected a dense tensor, not quantized. Save it so at its origin."
            )
    return dict(content)


class SafetensorsWeights:
    """Tensors in safetensors files, read straight into buffers that are used again.

    Args:
        headers: by file.
    """

    device = torch.device("cpu")
    held_bytes = 0

    def __init__(self, headers: Mapping[Path, Header]) -> None:
        self.headers = headers
        self._places: dict[str, tuple[Path, Placed]] = {
            name: (file, placed) for file, header in headers.items() for name, placed in header.tensors.items()
        }
        self.tensors = {name: placed.info for name, (_, placed) in self._places.items()}
        self._handles = {file: _Handle(file) for file in headers}
        self._local = threading.local()

    def read(self, name: str) -> Tensor:
        """The whole tensor as it is stored."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.numel:
            self._read_bytes(name, 0, tensor.reshape(-1).view(torch.uint8))
        return tensor

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the flat index ``start`` on, converted to its dtype."""
        dtype = self.tensors[name].dtype
        if dtype == out.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read_bytes(name, start * dtype.itemsize, out.view(torch.uint8))
            return
        step = _READ_BYTES // dtype.itemsize
        for position in range(0, out.numel(), step):
            piece = out if out.numel() <= step else out[position : position + step]
            values, data = self._raw(piece.numel(), dtype)
            self._read_data(name, (start + position) * dtype.itemsize, data)
            piece.copy_(values)

    def _raw(self, count: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """This thread's buffer as ``count`` values of ``dtype`` and as bytes; the views are kept, blocks are alike."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer, self._local.views = torch.empty(_READ_BYTES, dtype=torch.uint8), {}
        if (count, dtype) not in self._local.views:
            raw = self._local.buffer[: count * dtype.itemsize]
            self._local.views[count, dtype] = raw.view(dtype), raw.numpy().data
        views: tuple[Tensor, memoryview] = self._local.views[count, dtype]
        return views

    def _read_bytes(self, name: str, begin: int, out: Tensor) -> None:
        self._read_data(name, begin, out.numpy().data)

    def _read_data(self, name: str, begin: int, out: memoryview) -> None:
        file, placed = self._places[name]
        self._handles[file].read_into(placed.offset + begin, out)


class _Handle:
    """A file opened when it is first read, and closed with the last reference to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._number: int | None = None

    def read_into(self, offset: int, out: memoryview) -> None:
        with self._lock:
            if self._number is None:
                with accessed(self.path):
                    self._number = os.open(self.path, os.O_RDONLY)
        while out:
            count = os.preadv(self._number, [out], offset)
            if count == 0:
                raise InputError(f"{str(self.path)!r} became shorter while it was read; copy or download it again.")
            out, offset = out[count:], offset + count

    def __del__(self) -> None:
        if self._number is not None:
            os.close(self._number)
