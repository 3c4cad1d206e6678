"""Weights of which a part is weighed anew for every sample, and how that part acts in a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.adapters.factors import Adapter
from fusionlab.adapters.samples import SampleTokens
from fusionlab.adapters.weights import Weights
from fusionlab.errors import InputError
from fusionlab.rules.routed import RoutedMlp, Router
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class DenseExperts:
    """τ_t of one linear layer for every task.

    Args:
        weight: shape ``(num_tasks, out, in)``.
        bias: shape ``(num_tasks, out)``; None where none was trained.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Σ_t w_t (τ_t x + its bias), the layer's update of samples ``(batch, ..., in)`` by ``(batch, num_tasks)``."""
        shape = (len(weights), *(1,) * (inputs.dim() - 1))
        parts = [F.linear(inputs * weights[:, t].view(shape), each) for t, each in enumerate(self.weight)]
        total = _sum(parts)
        return total if self.bias is None else total + (weights @ self.bias).view(*shape[:-1], -1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def to(self, device: torch.device) -> DenseExperts:
        """The same there."""
        return DenseExperts(**{name: each.to(device) for name, each in self.tensors.items()})


@dataclass(frozen=True)
class LowRankExperts:
    """τ_t = B_t A_t of one linear layer for every task, as adapters have it.

    Args:
        lora_a: [A_1; …; A_T], shape ``(Σ rank_t, in)``.
        lora_b: [s_1 B_1 … s_T B_T], shape ``(out, Σ rank_t)``.
        ranks: by task; 0 where a task does not adapt the layer.
    """

    lora_a: Tensor
    lora_b: Tensor
    ranks: tuple[int, ...]

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Σ_t w_t B_t A_t x; shapes as those of :class:`DenseExperts`."""
        repeats = torch.tensor(self.ranks, device=weights.device)
        each = weights.repeat_interleave(repeats, dim=1).view(len(weights), *(1,) * (inputs.dim() - 2), -1)
        return F.linear(F.linear(inputs, self.lora_a) * each, self.lora_b)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def to(self, device: torch.device) -> LowRankExperts:
        """The same there."""
        return replace(self, lora_a=self.lora_a.to(device), lora_b=self.lora_b.to(device))


Experts: TypeAlias = DenseExperts | LowRankExperts


@dataclass(frozen=True)
class RoutedWeights:
    """Ordinary weights, and MLPs to whose base weights Σ w_t τ_t is added with w_t of each sample.

    Args:
        tasks: in the order of the routers' outputs.
        rest: what acts as it is: an adapter, or base weights by name that change.
        mlps: by name in memory: linear layers and router.
        experts: by linear layer; layers that no task has changed are left out.
    """

    tasks: tuple[str, ...]
    rest: Adapter | State
    mlps: Mapping[str, RoutedMlp]
    experts: Mapping[str, Experts]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the rest, the experts and the routers."""
        if isinstance(self.rest, Adapter):
            rest = sum(each.lora_a.nbytes + each.lora_b.nbytes for each in self.rest.factors.values())
        else:
            rest = sum(value.nbytes for value in self.rest.values())
        experts = sum(value.nbytes for each in self.experts.values() for value in each.tensors.values())
        routers = sum(value.nbytes for mlp in self.mlps.values() for value in mlp.router.tensors.values())
        return {"rest_bytes": rest, "expert_bytes": experts, "router_bytes": routers}


FusedWeights: TypeAlias = Weights | RoutedWeights
"""What acts as one model."""


@contextmanager
def routed(model: nn.Module, weights: RoutedWeights, samples: SampleTokens | None = None) -> Iterator[None]:
    """Within the block the experts act in ``model``, differentiable in routers that ask for a gradient.

    A layer costs the base's product and one of each task's τ_t (of adapters two of rank Σ rank_t), in float32, whatever
    autocast says; no weights of a sample are ever written out, so that memory does not grow with the batch.

    Args:
        model: in which the rest acts already.
        weights: whose experts and routers act.
        samples: which tokens are a sample's own, for networks that read texts; by default all of a row.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name, mlp in weights.mlps.items():
            gate = _Gate(name, mlp.router.to(device), samples)
            part = model.get_submodule(name)
            stack.callback(part.register_forward_pre_hook(gate.read, with_kwargs=True).remove)
            for layer in mlp.layers:
                if layer in weights.experts:
                    add = partial(gate.add, weights.experts[layer].to(device))
                    stack.callback(model.get_submodule(layer).register_forward_hook(add).remove)
        yield


class _Gate:
    """The weights of the samples that an MLP reads."""

    def __init__(self, name: str, router: Router, samples: SampleTokens | None) -> None:
        self._name, self._router, self._samples = name, router, samples
        self._weights = torch.empty(0)

    def read(self, part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The MLP is about to run."""
        inputs = args[0] if args else next(iter(kwargs.values()))
        if inputs.dim() != 3:
            raise InputError(
                f"{self._name} reads a tensor of shape {tuple(inputs.shape)}, not (batch, tokens, width), so that the "
                f"tokens of a sample are not known; this architecture cannot be routed"
            )
        if self._samples is None:
            self._weights = self._of(inputs, None)
        elif self._name not in self._samples.found:
            mask = self._samples.mask(self._name, inputs.shape[1])
            if mask is None:
                raise InputError(
                    f"{self._name}: these weights are chosen by each sample's prompt, and what is run here has none, "
                    f"such as the whole texts of perplexity; leave such tasks out"
                )
            self._weights = self._samples.found[self._name] = self._of(inputs, mask)
        else:
            self._weights = self._samples.found[self._name]

    def _of(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return self._router(inputs, mask)

    def add(self, experts: Experts, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output with its update."""
        with torch.autocast(output.device.type, enabled=False):
            update = experts(inputs[0].to(self._weights.dtype), self._weights)
            return (output + update).to(output.dtype)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
