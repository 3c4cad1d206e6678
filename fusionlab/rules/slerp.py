"""Spherical interpolation between two fine-tuned models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.sums import inner_products
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.checks import check_range

_COLLINEAR = 1 - 1e-12  # beyond it the angle is lost in rounding


@dataclass(frozen=True)
class Slerp:
    """(sin((1−t)ω)·θ_a + sin(tω)·θ_b) / sin ω per tensor, ω the angle between θ_a and θ_b; linear for small angles.

    θ = θ₀ + τ of the two tasks in recipe order. Norms and inner products are float64; zero tensors are interpolated
    linearly.

    Args:
        t: 0 gives the first model, 1 the second.
        linear_above: the |cos ω| above which the interpolation is linear.

    Raises:
        InputError: t outside 0..1, or (when fusing) not two tasks.
    """

    t: float = 0.5
    linear_above: float = 0.9995

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = (("slerp",),)
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("slerp.t", self.t, 0.0, 1.0)
        check_range("slerp.linear_above", self.linear_above, 0.0, 1.0)

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Both squared norms and the inner product of the weights."""
        weights = task_vectors.replace(_weights(base, task_vectors))
        first, both, second = inner_products(weights, norms=True).values()
        return {"slerp/first": first, "slerp/second": second, "slerp/both": both}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """The interpolated weights."""
        first, second = _weights(base, task_vectors)
        scale_first, scale_second = statistics.once(("slerp", name), lambda: self._scales(name, statistics))
        fused: Tensor = first.mul_(scale_first).add_(second.mul_(scale_second))
        return fused

    def _scales(self, name: str, statistics: Statistics) -> tuple[float, float]:
        first, second, both = (statistics.sum(f"slerp/{key}", [name]) for key in ("first", "second", "both"))
        norm = math.sqrt(first) * math.sqrt(second)
        cosine = both / norm if norm else 1.0
        if abs(cosine) > min(self.linear_above, _COLLINEAR):
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)


def _weights(base: Tensor, task_vectors: TaskVectors) -> Tensor:
    if len(task_vectors) != 2:
        raise InputError(
            f"slerp is between two models, got {len(task_vectors)}: {name_list(task_vectors.tasks)}; give "
            f"two, or take karcher, a mean on the sphere of any number."
        )
    return torch.add(task_vectors.stacked, base, out=scratch.empty_like(task_vectors.stacked))
