"""Weights by unit: what a rule takes for one matrix, under its name on disk."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from copy import copy

from torch import Tensor

from fusionlab.tensors.lazy import TensorInfo, Weights


class UnitWeights:
    """Stored weights, some of which are read as several matrices of equally many rows; in the order of their names.

    A rule that settles ties by order then chooses the same in whatever order files or modules have them.

    Args:
        weights: as they are stored.
        parts: the units that a stored tensor holds, one below the other; what is not named is one unit.
    """

    def __init__(self, weights: Weights, parts: Mapping[str, Sequence[str]] | None = None) -> None:
        self.stored, self._parts = weights, dict(parts or {})
        self._places: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in sorted(weights.tensors.items()):
            units = self._parts.get(name, (name,))
            shape = (info.shape[0] // len(units), *info.shape[1:]) if name in self._parts else info.shape
            for number, unit in enumerate(units):
                self.tensors[unit] = TensorInfo(shape, info.dtype)
                self._places[unit] = name, number * self.tensors[unit].numel
        self.device, self.held_bytes = weights.device, weights.held_bytes

    def only(self, units: Container[str]) -> UnitWeights:
        """The same without the other units."""
        fewer = copy(self)
        fewer.tensors = {name: info for name, info in self.tensors.items() if name in units}
        return fewer

    def first_unit(self, stored: str) -> str:
        """The unit, or the first of those, that a stored tensor holds."""
        return self._parts.get(stored, (stored,))[0]

    def place(self, unit: str) -> tuple[str, int]:
        """The stored tensor that holds ``unit``, and the flat index of its first element there."""
        return self._places[unit]

    def read(self, name: str) -> Tensor:
        """The whole unit as it is stored."""
        stored, start = self._places[name]
        whole = self.stored.read(stored)
        info = self.tensors[name]
        return whole if stored == name else whole.reshape(-1)[start : start + info.numel].reshape(info.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the unit's flat index ``start`` on."""
        stored, offset = self._places[name]
        self.stored.read_into(stored, offset + start, out)
