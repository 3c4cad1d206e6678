"""The safetensors format: an 8-byte length, a JSON header with dtype, shape and offsets of every tensor, the data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, mistaken
from fusionlab.tensors.lazy import TensorInfo

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
STORABLE = frozenset(_CODES)
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Placed:
    """A tensor in a file.

    Args:
        info: shape and dtype.
        offset: of its first byte, from the beginning of the file.
    """

    info: TensorInfo
    offset: int


@dataclass(frozen=True)
class Header:
    """What the header of one file says.

    Args:
        tensors: name -> where it is, in the order of the data.
        digest: SHA-256 of the header's bytes.
    """

    tensors: Mapping[str, Placed]
    digest: str


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
        InputError: truncated or corrupt: no JSON, unknown dtypes, offsets that overlap, leave holes, pass the end of
            the file or do not fit the shape.
    """
    with accessed(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            what = mistaken(path, prefix + file.read(64))
            raise _corrupt(path, what or f"it says a header of {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _corrupt(path, "its header is not a mapping")
    content.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry) for name, entry in content.items()}
    tensors = {}
    position = 0
    for name, (info, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != position:
            problem = "overlap" if begin < position else "leave a hole"
            raise _corrupt(path, f"offsets {problem} at {name}: data begins at {begin:,}, expected {position:,}")
        tensors[name] = Placed(info, 8 + length + begin)
        position = end
    if 8 + length + position != size:
        raise _corrupt(path, f"its tensors end at byte {8 + length + position:,}, the file has {size:,}")
    return Header(tensors, hashlib.sha256(prefix + raw).hexdigest())


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(path, f"the entry of {name} lacks dtype, shape or data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise _corrupt(path, f"the entry of {name} has shape {shape} and data_offsets {begin}, {end}")
    if not isinstance(code, str) or code not in _DTYPES:
        known = name_list(_DTYPES, 10)
        raise InputError(
            f"{str(path)!r}: {name} is stored as {code}; expected one of {known}. Give the unquantized model."
        )
    info = TensorInfo(shape, _DTYPES[code])
    if end - begin != info.nbytes:
        raise _corrupt(path, f"{name} has {end - begin:,} bytes, its shape {shape} and {code} need {info.nbytes:,}")
    return info, begin, end


def _corrupt(path: Path, what: str) -> InputError:
    return InputError(f"{str(path)!r} is truncated or corrupt: {what}. Copy or download it again.")


def build_header(tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The header of a new file, and where its tensors go: widest dtype first, so that all are aligned."""
    ordered = sorted(tensors, key=lambda item: -item[1].dtype.itemsize)
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in ordered:
        code = _CODES.get(info.dtype)
        if code is None:
            raise InputError(f"{name}: {info.dtype} cannot be stored; expected one of {name_list(_DTYPES, 10)}.")
        offsets = [position, position := position + info.nbytes]
        content[name] = {"dtype": code, "shape": list(info.shape), "data_offsets": offsets}
    raw = json.dumps(content, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    data = len(raw).to_bytes(8, "little") + raw
    placed = {name: Placed(info, len(data) + content[name]["data_offsets"][0]) for name, info in ordered}
    return data, Header(placed, hashlib.sha256(data).hexdigest())
