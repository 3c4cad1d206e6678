"""MLPs whose task vectors are weighed anew for every sample: the rule that WEMoE finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fusionlab.errors import InputError, name_list
from fusionlab.rules.carried import UNTOLD, check_carried, hash_of


@dataclass(frozen=True)
class Router:
    """w_t of one sample: the mean over its tokens x of W x + b, or of W₂ relu(W₁ x + b₁) + b₂.

    Args:
        layers: weight ``(out, in)`` and bias ``(out,)`` of each affine map, one or two, the last with one row a task.

    Example:
        >>> Router.constant(0.3, num_tasks=2, width=3)(torch.ones(1, 4, 3))
        tensor([[0.3000, 0.3000]])
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def constant(cls, value: float, num_tasks: int, width: int, num_layers: int = 1, seed: int = 0) -> Router:
        """One that gives every sample ``value`` for all tasks: the last map's weight is zero, its bias ``value``.

        The first of two maps, ``(width, width)``, is drawn from a normal distribution of deviation .01.
        """
        last = torch.zeros(num_tasks, width), torch.full((num_tasks,), value)
        if num_layers == 1:
            return cls((last,))
        draws = torch.Generator().manual_seed(seed)
        return cls(((torch.randn(width, width, generator=draws) * 0.01, torch.zeros(width)), last))

    def __call__(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights of samples, float32 (float64 where the router is), shape ``(batch, num_tasks)``.

        Args:
            tokens: what the MLP reads, shape ``(batch, tokens, width)``.
            mask: bool ``(batch, tokens)``, False on what is no part of a sample; by default all is.
        """
        found = tokens.to(self.layers[0][0].dtype)
        for number, (weight, bias) in enumerate(self.layers):
            found = F.linear(found.relu() if number else found, weight, bias)
        if mask is None:
            return found.mean(dim=1)
        return (found * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def to(self, device: torch.device) -> Router:
        """The same there."""
        return Router(tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        parts = [(f"{number}.{name}", each) for number, pair in enumerate(self.layers) for name, each in _named(pair)]
        return dict(parts)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Router:
        """The inverse of :attr:`tensors`."""
        count = len(tensors) // 2
        return cls(tuple((tensors[f"{number}.weight"], tensors[f"{number}.bias"]) for number in range(count)))


@dataclass(frozen=True)
class RoutedMlp:
    """One MLP.

    Args:
        layers: its linear layers by name in memory, with whether the weight is stored ``(in, out)``.
        router: what weighs their task vectors.
    """

    layers: Mapping[str, bool]
    router: Router


@dataclass(frozen=True)
class RoutedMlps:
    """Every MLP's linear layers as θ₀ + Σ w_t τ_t with w_t of each sample by a router; all else θ₀ + λ Σ τ_t.

    Each sample has weights of its own, whatever batch it is in; the model is told no task.

    Args:
        scaling_coefficient: λ.
        statistics: the hash of the routers, which stands for them in configurations.
        mlps: by name in memory; given by the search wemoe.
        tasks: in the order of the routers' outputs.

    Raises:
        InputError: (when fusing) no routers, or those of other tasks.

    Source: Merging multi-task models via weight-ensembling mixture of experts, arXiv 2402.00433, section 3.
    """

    scaling_coefficient: float = 0.3
    statistics: str = ""
    mlps: Mapping[str, RoutedMlp] = field(default_factory=dict, repr=False, compare=False, metadata=UNTOLD)
    tasks: tuple[str, ...] = field(default=(), metadata=UNTOLD)

    @classmethod
    def of(cls, scaling_coefficient: float, mlps: Mapping[str, RoutedMlp], tasks: Sequence[str]) -> RoutedMlps:
        """The rule with these routers."""
        tensors = {f"{name} {part}": each for name, mlp in mlps.items() for part, each in mlp.router.tensors.items()}
        return cls(scaling_coefficient, hash_of(tensors), mlps, tuple(tasks))

    @property
    def layers(self) -> dict[str, bool]:
        """The linear layers of all MLPs."""
        return {layer: is_transposed for mlp in self.mlps.values() for layer, is_transposed in mlp.layers.items()}

    def check(self, tasks: Sequence[str]) -> None:
        """Raise unless it has routers for these tasks in this order.

        Raises:
            InputError: as when fusing.
        """
        check_carried("routed_mlps", "wemoe", dict.fromkeys(self.mlps, self.tasks), tasks)
        if tuple(tasks) != self.tasks:
            raise InputError(f"routed_mlps: the routers are for {name_list(self.tasks)} in this order")


def _named(pair: tuple[Tensor, Tensor]) -> list[tuple[str, Tensor]]:
    return [("weight", pair[0]), ("bias", pair[1])]
