"""The task vectors of several tasks as masks of one: a unified vector, one bit an entry and task, a number a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fusionlab.blocks.bits import packed_size, unpack
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.layout import MASKS, UNIFIED
from fusionlab.tensors.headers import read_header
from fusionlab.tensors.lazy import StateWeights, TensorInfo, Weights
from fusionlab.tensors.readers import SafetensorsWeights
from fusionlab.tensors.writers import WeightsWriter

_ONE_FILE = 1 << 62  # bytes
_PIECE = 1 << 20  # elements


@dataclass(frozen=True)
class MaskedVectors:
    """τ_t = s_t M_t ⊙ u of every task.

    Args:
        unified: u by name on disk.
        masks: M_t as bits, uint8 ``(num_tasks, ceil(elements / 8))``, under the same names; a name without one is
            the same for all tasks.
        scales: s_t by task, in the order of the masks' rows.
        is_linearized: whether they act to first order about the base only.
    """

    unified: Weights
    masks: Weights
    scales: Mapping[str, float]
    is_linearized: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.scales)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the unified vector and of all masks."""
        parts = {"unified_bytes": self.unified, "mask_bytes": self.masks}
        return {what: sum(info.nbytes for info in part.tensors.values()) for what, part in parts.items()}

    def of(self, task: str) -> MaskedWeights:
        """τ of a task, read piece by piece.

        Raises:
            InputError: there is no mask for it.
        """
        if task not in self.scales:
            raise InputError(
                f"there is no mask for task {task!r}: these weights know {name_list(self.tasks)}; "
                f"{did_you_mean(task, self.tasks)}"
            )
        return MaskedWeights(self, task)

    def as_read(self) -> MaskedVectors:
        """The same in memory."""
        unified, masks = ({name: part.read(name) for name in part.tensors} for part in (self.unified, self.masks))
        return MaskedVectors(StateWeights(unified), StateWeights(masks), self.scales, self.is_linearized)


class MaskedWeights:
    """τ of one task, as the engine reads it.

    Args:
        vectors: of all tasks.
        task: which.
    """

    device = torch.device("cpu")
    held_bytes = 0

    def __init__(self, vectors: MaskedVectors, task: str) -> None:
        self._vectors, self._row, self._scale = vectors, vectors.tasks.index(task), vectors.scales[task]
        wide = {name: torch.promote_types(each.dtype, torch.float32) for name, each in vectors.unified.tensors.items()}
        self.tensors = {name: TensorInfo(each.shape, wide[name]) for name, each in vectors.unified.tensors.items()}

    def read(self, name: str) -> Tensor:
        """The whole tensor, float32 or wider."""
        info = self.tensors[name]
        found = torch.empty(info.numel, dtype=info.dtype)
        self.read_into(name, 0, found)
        return found.view(info.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the flat index ``start`` on."""
        self._vectors.unified.read_into(name, start, out)
        masks = self._vectors.masks
        if name not in masks.tensors:
            return
        first, end = start // 8, packed_size(start + out.numel())
        packed = torch.empty(end - first, dtype=torch.uint8)
        masks.read_into(name, self._row * masks.tensors[name].shape[1] + first, packed)
        out.mul_(self._scale).mul_(unpack(packed, start % 8, out.numel()).to(out.device))


def base_hash(weights: Weights, names: Mapping[str, str], dtype: torch.dtype | None = None) -> str:
    """Short SHA-256 over a base's tensors in float32, as they are or rounded first; read piece by piece.

    Args:
        weights: of the base.
        names: what a tensor is called in the hash -> its name there; what is not there is left out.
        dtype: round to this one.
    """
    digest, buffer = hashlib.sha256(), torch.empty(_PIECE)
    for name, own in sorted(names.items()):
        if (info := weights.tensors.get(own)) is None:
            continue
        digest.update(f"{name}{info.shape}".encode())
        for start in range(0, info.numel, _PIECE):
            piece = buffer[: min(_PIECE, info.numel - start)]
            weights.read_into(own, start, piece)
            digest.update((piece if dtype is None else piece.to(dtype).float()).numpy().data)
    return digest.hexdigest()[:16]


Place = Callable[[str], tuple[str, int]]


def mask_infos(tensors: Mapping[str, TensorInfo], common: Mapping[str, Any], num_tasks: int) -> dict[str, TensorInfo]:
    """The masks of unified vectors, but for what is the same for all tasks."""
    return {
        name: TensorInfo((num_tasks, packed_size(info.numel)), torch.uint8)
        for name, info in tensors.items()
        if name not in common
    }


class MaskBuffers:
    """Takes unified vectors and masks block by block and keeps them in memory.

    Args:
        unified: what will be written, by stored name.
        masks: the same of :func:`mask_infos`.
        place: the stored tensor that a unit is in, and its flat index there.
    """

    def __init__(self, unified: Mapping[str, TensorInfo], masks: Mapping[str, TensorInfo], place: Place) -> None:
        self.unified = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in unified.items()}
        self.masks = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in masks.items()}
        self._place = place

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store u of a block."""
        stored, offset = self._place(name)
        self.unified[stored].view(-1)[offset + start : offset + start + values.numel()].copy_(values)

    def write_masks(self, name: str, start: int, packed: Tensor) -> None:
        """Store the bits of a block, ``(num_tasks, bytes)``; ``start`` is its first entry."""
        stored, offset = self._place(name)
        first = whole_bytes(stored, offset + start)
        self.masks[stored][:, first : first + packed.shape[1]] = packed


class MaskWriter:
    """Takes the same and writes it into the two files of an existing folder.

    Args:
        folder: where to.
        unified: what will be written, by stored name.
        masks: the same of :func:`mask_infos`.
        place: the stored tensor that a unit is in, and its flat index there.
    """

    def __init__(
        self, folder: Path, unified: Mapping[str, TensorInfo], masks: Mapping[str, TensorInfo], place: Place
    ) -> None:
        self._unified = WeightsWriter(folder, unified, max_shard_size=_ONE_FILE, name=UNIFIED)
        self._masks = WeightsWriter(folder, masks, max_shard_size=_ONE_FILE, name=MASKS)
        self._infos, self._place = masks, place

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store u of a block."""
        stored, offset = self._place(name)
        self._unified.write(stored, offset + start, values)

    def write_masks(self, name: str, start: int, packed: Tensor) -> None:
        """Store the bits of a block, ``(num_tasks, bytes)``; ``start`` is its first entry."""
        stored, offset = self._place(name)
        first = whole_bytes(stored, offset + start)
        for row, of_task in enumerate(packed):
            self._masks.write(stored, row * self._infos[stored].shape[1] + first, of_task.contiguous())

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unified.close()
        self._masks.close()


def whole_bytes(name: str, start: int) -> int:
    """The byte in which the bit of entry ``start`` is the first.

    Raises:
        InputError: it is not the first there: a part of a stored tensor begins within a byte.
    """
    if start % 8:
        raise InputError(
            f"{name}: masks of q, k and v of fused attention must begin at whole bytes, and a part has {start} entries"
            f" before it; merge the adapters into full models first."
        )
    return start // 8


def save_masked(folder: Path, vectors: MaskedVectors) -> None:
    """Write what is in memory into an existing folder, as :class:`MaskWriter` does."""
    with MaskWriter(folder, vectors.unified.tensors, vectors.masks.tensors, lambda name: (name, 0)) as writer:
        for name in vectors.unified.tensors:
            writer.write(name, 0, vectors.unified.read(name).contiguous().flatten())
        for name in vectors.masks.tensors:
            writer.write_masks(name, 0, vectors.masks.read(name))


def open_masked(folder: Path, scales: Mapping[str, float]) -> MaskedVectors:
    """What :func:`save_masked` or a :class:`MaskWriter` wrote, read when it is asked for.

    Args:
        folder: where it is.
        scales: s_t by task, as ``fusion.json`` there has them.

    Raises:
        InputError: a file is missing or corrupt, or they do not fit one another.
    """
    unified, masks = (SafetensorsWeights({folder / name: read_header(folder / name)}) for name in (UNIFIED, MASKS))
    expected = mask_infos(unified.tensors, dict.fromkeys(set(unified.tensors) - set(masks.tensors)), len(scales))
    wrong = [name for name in {**expected, **masks.tensors} if expected.get(name) != masks.tensors.get(name)]
    if wrong:
        raise InputError(
            f"{str(folder)!r}: masks of {name_list(wrong)} do not fit {UNIFIED} and {len(scales)} tasks; make it anew."
        )
    return MaskedVectors(unified, masks, scales)
