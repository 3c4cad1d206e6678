"""What a fusion rule is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from fusionlab.blocks import kernels, scratch
from fusionlab.blocks.task_vectors import Statistics, TaskVectors

Granularity = Literal["elementwise", "tensor"]
StatisticsScope = Literal["model", "tensor"]


class Measuring(Protocol):
    """What every rule has: what it is handed, and zero or more measuring passes over the task vectors.

    ``granularity`` says what it is handed: ``elementwise`` flat blocks of whole cuts, ``tensor`` whole parameters.
    ``statistics_scope`` says which statistics it needs to fuse one parameter: those of the ``model`` or of that
    ``tensor`` only. ``passes`` names the quantities of each measuring pass; the keys of what ``measure`` returns are
    ``"quantity"`` or ``"quantity/..."``. ``measures_untransformed``: under DARE or a trim it measures the task vectors
    as they were before.
    """

    @property
    def granularity(self) -> Granularity: ...

    @property
    def statistics_scope(self) -> StatisticsScope: ...

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]: ...

    @property
    def measures_untransformed(self) -> bool: ...

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Statistics of one block: float64 partial sums ``(cuts,)`` or int64 counts, additive over blocks."""
        ...


@runtime_checkable
class Rule(Measuring, Protocol):
    """A fusion rule: its measuring passes, then one fusing pass."""

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """The fused block, in the dtype and shape of ``base``, which is left as it is."""
        ...


@runtime_checkable
class LinearRule(Rule, Protocol):
    """A rule whose result is θ₀ + Σ λ_t τ_t: it can also be applied to the factors of adapters."""

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """λ_t of every task for the parameter ``name``."""
        ...


def coefficients_by_norms(rule: object) -> TypeGuard[LinearRule]:
    """Whether the rule is linear and its coefficients need no more than the squared norms of the task vectors."""
    return isinstance(rule, LinearRule) and (not rule.passes or rule.passes == (("squared_norm",),))


def add_scaled(base: Tensor, task_vectors: TaskVectors, coefficients: Mapping[str, float]) -> Tensor:
    """θ₀ + Σ λ_t τ_t, added in recipe order in the dtype of ``base``.

    Product and sum are rounded apart: a fused multiply-add would make the bits depend on where a block ends.
    """
    fused = scratch.empty_like(base)
    if base.device.type == "cpu":
        rows = task_vectors.stacked.view(len(task_vectors), -1)
        scales = torch.tensor([coefficients[task] for task in task_vectors.tasks], dtype=base.dtype)
        kernels.add_scaled(base.view(-1).numpy(), rows.numpy(), scales.numpy(), fused.view(-1).numpy())
        return fused
    total, scaled = base, scratch.empty_like(base)
    for task, task_vector in zip(task_vectors.tasks, task_vectors.stacked, strict=True):
        total = torch.add(total, torch.mul(task_vector, coefficients[task], out=scaled), out=fused)
    return fused


def unmeasured(rule: Rule, earlier: Statistics) -> bool:
    """Whether ``rule`` still has something to measure."""
    return any(not earlier.has(quantity) for quantities in rule.passes for quantity in quantities)
