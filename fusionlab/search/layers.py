"""The linear layers of a network by the units that fusion knows, and the Gram matrices of what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusionlab.adapters.base import tied_names
from fusionlab.adapters.fused_attention import PARTS
from fusionlab.adapters.targets import LINEAR
from fusionlab.backbones.layout import Layout
from fusionlab.errors import InputError

Grams = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Place:
    """Where a layer's weight is.

    Args:
        unit: the unit that holds it.
        part: its number among the layers that the unit holds one below the other.
        transposed: whether the weight is stored ``(in, out)``.
        width: numbers that the layer reads at once.
    """

    unit: str
    part: int
    transposed: bool
    width: int


@dataclass(frozen=True)
class Block:
    """A part of the network through which a search goes at once.

    Args:
        linear: the units of its linear layers.
        units: all units that are fused in it.
    """

    linear: tuple[str, ...]
    units: tuple[str, ...]


class LinearLayers:
    """The linear layers whose weights are fused.

    A weight that an embedding has too is left to the embedding; layers that have one weight are one.

    Args:
        model: with or without adapters in it.
        layout: what files call its weights.
        units: the units that are fused.
    """

    def __init__(self, model: nn.Module, layout: Layout, units: Collection[str]) -> None:
        self.places: dict[nn.Module, Place] = {}
        tied = tied_names(model)
        parts = list(model.named_modules())
        embedded = {id(part.weight) for _, part in parts if isinstance(part, nn.Embedding)}
        for name, part in parts:
            if isinstance(part, LINEAR) and ".lora_" not in name and id(part.weight) not in embedded:
                own = f"{name}.weight".replace(".base_layer.", ".")
                place = _place(tied.get(own, own), layout, units)
                if place is not None:
                    transposed = not isinstance(part, nn.Linear)
                    self.places[part] = Place(*place, transposed, part.weight.shape[0 if transposed else 1])
        self.units = {place.unit: place for place in self.places.values()}

    @property
    def gram_bytes(self) -> int:
        """Of the Gram matrices of one task."""
        return sum(8 * place.width**2 for place in self.places.values())

    @contextmanager
    def reading(self, units: Collection[str]) -> Iterator[Reading]:
        """What the layers of ``units`` read while the network runs within the block."""
        found = Reading()
        with ExitStack() as stack:
            for part, place in self.places.items():
                if place.unit in units:
                    hook = part.register_forward_pre_hook(partial(found.read, place), with_kwargs=True)
                    stack.callback(hook.remove)
            yield found


class Reading:
    """Σ x xᵀ and the number of x of each layer, in float64 on the network's device; additive over batches."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None
        self.order: dict[str, None] = {}
        """The units by when they read first."""

    def read(self, place: Place, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add what a layer is about to read."""
        inputs = args[0] if args else kwargs["input"]
        key = place.unit, place.part
        self.order.setdefault(place.unit)
        product = self._product(inputs)
        known = self._sums.get(key)
        self._sums[key] = product if known is None else known + product
        self._counts[key] = self._counts.get(key, 0) + inputs.numel() // place.width

    def _product(self, inputs: Tensor) -> Tensor:
        """Of layers that read the very same tensor, as q, k and v do, once."""
        if self._last is not None and self._last[0] is inputs and self._last[1] == inputs._version:
            return self._last[2]
        with torch.autocast(inputs.device.type, enabled=False):
            rows = inputs.detach().double().reshape(-1, inputs.shape[-1])
            product = rows.T @ rows
        self._last = inputs, inputs._version, product
        return product

    def grams(self, layers: LinearLayers, units: Collection[str]) -> Grams:
        """G by unit, on the CPU; zero of a layer that never ran, one where all layers of a unit read the same.

        Raises:
            InputError: NaN or Inf.
        """
        found: dict[str, dict[int, Tensor]] = {}
        for place in layers.places.values():
            if place.unit in units:
                found.setdefault(place.unit, {})[place.part] = self._gram(place)
        return {unit: _once([of for _, of in sorted(parts.items())]) for unit, parts in found.items()}

    def _gram(self, place: Place) -> Tensor:
        key = place.unit, place.part
        if key not in self._sums:
            return torch.zeros(place.width, place.width, dtype=torch.float64)
        gram = (self._sums[key] / self._counts[key]).cpu() if self._counts[key] else self._sums[key].cpu()
        if not gram.isfinite().all():
            raise InputError(
                f"{place.unit} reads NaN or Inf while a fine-tuned model runs over training inputs; leave that model "
                f"out, or compute in float32"
            )
        return gram


def _once(grams: list[Tensor]) -> tuple[Tensor, ...]:
    """One, where all are equal."""
    return (grams[0],) if all(torch.equal(grams[0], each) for each in grams) else tuple(grams)


def _place(name: str, layout: Layout, units: Collection[str]) -> tuple[str, int] | None:
    """The unit that holds the weight ``name`` in memory, and the number of the part that it is; None for none."""
    unit = layout.names.get(name, name)
    if unit in units:
        return unit, 0
    attention, _, part = name.removesuffix(".weight").rpartition(".")
    joined = f"{attention}.in_proj_weight"
    joined = layout.names.get(joined, joined)
    if part in PARTS and attention in layout.attentions and joined in units:
        return joined, PARTS.index(part)
    return None
