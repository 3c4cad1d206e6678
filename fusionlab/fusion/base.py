"""The base of a fusion in memory: its weights, and what its files call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusionlab.adapters import Adapter, base_state, under_first_names
from fusionlab.adapters.weights import Weights, state_of
from fusionlab.backbones.layout import Layout
from fusionlab.contracts import Backbone, Source, is_backbone, is_source
from fusionlab.engine import StateWeights
from fusionlab.errors import InputError
from fusionlab.linearize import LinearizedState
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class Base:
    """What fusion adds to, as the base's files hold it.

    Args:
        state: by name in memory.
        layout: what the files call it.
        model: the model in memory, where there is one.
        name: what a backbone is called; empty for others.
    """

    state: State
    layout: Layout = field(default_factory=Layout)
    model: nn.Module | None = None
    name: str = ""

    @classmethod
    def of(cls, source: AnyBase) -> Base:
        """The base that ``source`` is: a backbone, a module or a model, or a state under its names on disk.

        Raises:
            InputError: it is none of these.
        """
        if isinstance(source, Base):
            return source
        if isinstance(source, Mapping):
            return cls({name: tensor.detach().cpu() for name, tensor in source.items()})
        inner = source.backbone if is_source(source) else source
        model, name = (inner.model, inner.name) if is_backbone(inner) else (inner, "")
        if not isinstance(model, nn.Module):
            raise InputError(f"base: expected a backbone, a module, a model or a state, got a {type(model).__name__}.")
        state = {name: tensor.cpu() for name, tensor in base_state(model).items()}
        return cls(state, Layout.of(model), model, name)

    def named(self, weights: Weights) -> Weights:
        """Fine-tuned weights by the base's names: of a tensor that the model has under several, the first alone.

        Raises:
            InputError: they have two values for one tensor.
        """
        if self.model is None or isinstance(weights, Adapter):
            return weights
        state = under_first_names(self.model, state_of(weights))
        return LinearizedState(state) if isinstance(weights, LinearizedState) else state

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Its tensors as they are on disk."""
        return self.layout.to_disk(self.state)

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Weights of linear layers that are stored ``(in, out)``, by name on disk; not known without a model."""
        parts = () if self.model is None else self.model.named_modules()
        names = (f"{name.removesuffix('.base_layer')}.weight" for name, part in parts if isinstance(part, Conv1D))
        return frozenset(self.layout.names.get(name, name) for name in names)

    @cached_property
    def weights(self) -> StateWeights:
        """The same, for the engine."""
        return StateWeights(self.stored)


AnyBase: TypeAlias = Base | State | nn.Module | Backbone | Source
"""What is a base, or has one."""
