"""The base of a fusion in memory: its weights, and what its files call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusionlab.adapters import base_state
from fusionlab.backbones.layout import Layout
from fusionlab.contracts import Backbone, Source, is_backbone, is_source
from fusionlab.engine import StateWeights
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
        """The base that ``source`` is: a backbone, a module or a model, or a state under its names on disk."""
        if isinstance(source, Base):
            return source
        if isinstance(source, Mapping):
            return cls({name: tensor.detach().cpu() for name, tensor in source.items()})
        inner = source.backbone if is_source(source) else source
        model, name = (inner.model, inner.name) if is_backbone(inner) else (inner, "")
        assert isinstance(model, nn.Module), f"no base: {type(source).__name__}"
        state = {name: tensor.cpu() for name, tensor in base_state(model).items()}
        return cls(state, Layout.of(model), model, name)

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
