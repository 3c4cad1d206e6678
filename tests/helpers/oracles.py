"""What only tests need beside the package: single passes of the linearized network, merging, steps of the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fusionlab.adapters import Adapter
from fusionlab.linearize import linearized_call, tangent_outputs
from fusionlab.samplers import TrainingOrder
from fusionlab.tensors.state import State


def select_parameters(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the module's parameters that match one of ``patterns``; each matches something."""
    names = [name for name, _ in module.named_parameters()]
    assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns), patterns
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def jvp_call(call: Callable[[], Tensor], module: nn.Module, point: State, tangent: State) -> tuple[Tensor, Tensor]:
    """``(f(φ₀), J(φ₀)·tangent)``."""
    base, outputs = tangent_outputs(call, module, point, {"": tangent})
    return base, outputs[""]


def primal_call(call: Callable[[], Tensor], module: nn.Module, point: State) -> Tensor:
    """f(φ₀) with the kernels of a linearized call."""
    return jvp_call(call, module, point, {name: torch.zeros_like(value) for name, value in point.items()})[0]


class LinearizedModule(nn.Module):
    """A module that trains some of its parameters to first order about where they are now, which buffers keep."""

    def __init__(self, module: nn.Module, patterns: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, select_parameters(module, patterns)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self.names)
            if name in self.names:
                self.register_buffer(name.replace(".", "_"), parameter.detach().clone())

    def forward(self, *args: Any) -> Tensor:
        own = dict(self.module.named_parameters())
        point = {name: self.get_buffer(name.replace(".", "_")) for name in self.names}
        return linearized_call(lambda: self.module(*args), self.module, {name: own[name] for name in point}, point)


def merge_adapter(base_state: State, adapter: Adapter) -> dict[str, Tensor]:
    """base + τ by name, summed in float32 or wider and cast once."""
    merged = dict(base_state)
    for name, vector in adapter.task_vector().items():
        merged[name] = (base_state[name].to(vector.dtype) + vector).to(base_state[name].dtype)
    return merged


def training_indices(num_samples: int, batch_size: int, step: int, *, seed: int, task: str) -> Tensor:
    """The global batch at ``step``, of an order that was asked nothing before."""
    return TrainingOrder(num_samples, batch_size, seed=seed, task=task).indices(step)
