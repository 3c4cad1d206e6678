"""What a fusion rule is, and the sums it may rely on: the same bits on any block size, thread count and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fusionlab.rules import scratch

CUT = 32_768
"""Elements in one cut: sums are taken per cut, in flat order, and meet in ``math.fsum``."""

Granularity = Literal["elementwise", "tensor"]
StatisticsScope = Literal["model", "tensor"]
_T = TypeVar("_T")


class TaskVectors(Mapping[str, Tensor]):
    """The task vectors of one block of one parameter, by task in recipe order.

    Args:
        tasks: the tasks, in recipe order.
        stacked: all task vectors, ``(num_tasks, elements)``; ``(num_tasks, *shape)`` for rules on whole tensors.
        start: flat index of the block's first element in its parameter, a multiple of ``CUT``.
        size: number of elements of the whole parameter.
    """

    def __init__(self, tasks: tuple[str, ...], stacked: Tensor, *, start: int = 0, size: int | None = None) -> None:
        self.tasks = tasks
        self.stacked = stacked
        self.start = start
        self.size = stacked[0].numel() if size is None else size

    def replace(self, stacked: Tensor) -> TaskVectors:
        """The same block with other values, as a transform returns it."""
        return TaskVectors(self.tasks, stacked, start=self.start, size=self.size)

    def __getitem__(self, task: str) -> Tensor:
        try:
            return self.stacked[self.tasks.index(task)]
        except ValueError:
            raise KeyError(task) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True)
class Statistics:
    """What the measuring passes found: exact sums by (key, parameter) and counts by key.

    Args:
        tasks: the tasks, in recipe order.
        names: every parameter that is fused, in order.
        sums: key -> parameter -> the sum of its partials as an exact expansion (see :func:`exact_sum`).
        counts: key -> int64 tensor, added up over all blocks.
    """

    tasks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sums: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    _memory: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    def sum(self, key: str, names: Iterable[str] | None = None) -> float:
        """The correctly rounded sum of ``key`` over ``names`` (default: every parameter measured)."""
        found = self.sums.get(key, {})
        chosen = found.values() if names is None else [found[name] for name in names if name in found]
        return math.fsum(part for parts in chosen for part in parts)

    def has(self, quantity: str) -> bool:
        """Whether an earlier pass measured ``quantity``."""
        keys = (*self.sums, *self.counts)
        return self.once(("has", quantity), lambda: any(key.partition("/")[0] == quantity for key in keys))

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """``compute()``, remembered under ``key``: rules ask for their coefficients once a block."""
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]  # type: ignore[return-value]


@runtime_checkable
class Rule(Protocol):
    """A fusion rule: zero or more measuring passes over the task vectors, then one fusing pass.

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

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """The fused block, in the dtype and shape of ``base``, which is left as it is."""
        ...


@runtime_checkable
class LinearRule(Rule, Protocol):
    """A rule whose result is θ₀ + Σ λ_t τ_t: it can also be applied to the factors of adapters."""

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """λ_t of every task for the parameter ``name``."""
        ...


def add_scaled(base: Tensor, task_vectors: TaskVectors, coefficients: Mapping[str, float]) -> Tensor:
    """θ₀ + Σ λ_t τ_t, added in recipe order in the dtype of ``base``.

    Product and sum are rounded apart: a fused multiply-add would make the bits depend on where a block ends.
    """
    fused, scaled, total = scratch.empty_like(base), scratch.empty_like(base), base
    for task, task_vector in zip(task_vectors.tasks, task_vectors.stacked, strict=True):
        total = torch.add(total, torch.mul(task_vector, coefficients[task], out=scaled), out=fused)
    return fused


def partial_sums(values: Tensor) -> Tensor:
    """One float64 sum per cut of the last dimension.

    A cut is short enough for torch to sum it in one order whatever the number of threads; cuts are rows of a matrix,
    so that neither does their number matter.

    Args:
        values: float64, ``(..., elements)``.

    Returns:
        float64, ``(..., cuts)``.

    Example:
        >>> partial_sums(torch.ones(2, 40_000, dtype=torch.float64))
        tensor([[32768.,  7232.],
                [32768.,  7232.]], dtype=torch.float64)
    """
    whole = values.shape[-1] // CUT * CUT
    if whole == values.shape[-1] > 0:
        return values.unflatten(-1, (-1, CUT)).sum(-1)
    parts = [values[..., :whole].unflatten(-1, (-1, CUT)).sum(-1)] if whole else []
    if whole < values.shape[-1]:
        parts.append(values[..., whole:].sum(-1, keepdim=True))
    return torch.cat(parts, dim=-1)


def unmeasured(rule: Rule, earlier: Statistics) -> bool:
    """Whether ``rule`` still has something to measure."""
    return any(not earlier.has(quantity) for quantities in rule.passes for quantity in quantities)


def squared_norms(task_vectors: TaskVectors) -> dict[str, Tensor]:
    """``"squared_norm/<task>"``: the partial sums of τ² in float64, ``(cuts,)`` each."""
    found = {}
    with scratch.frame():
        wide = scratch.empty((task_vectors.stacked[0].numel(),), task_vectors.stacked, torch.float64)
        for task, task_vector in zip(task_vectors.tasks, task_vectors.stacked, strict=True):
            wide.copy_(task_vector.flatten())
            found[f"squared_norm/{task}"] = partial_sums(wide.mul_(wide))
    return found


def inner_products(task_vectors: TaskVectors, *, norms: bool = False) -> dict[str, Tensor]:
    """``"inner_product/<i>/<j>"`` for task numbers i < j: the partial sums of τ_i τ_j in float64, ``(cuts,)`` each.

    With ``norms`` also what :func:`squared_norms` gives, to the same bits and at less cost.
    """
    found = {}
    with scratch.frame():
        wide = widened(task_vectors.stacked).unbind()
        product = scratch.empty_like(wide[0])
        for i, first in enumerate(wide):
            if norms:
                key = f"squared_norm/{task_vectors.tasks[i]}"
                found[key] = partial_sums(torch.mul(first, first, out=product))
            for j, second in enumerate(wide[i + 1 :], start=i + 1):
                found[f"inner_product/{i}/{j}"] = partial_sums(torch.mul(first, second, out=product))
    return found


def widened(stacked: Tensor) -> Tensor:
    """A float64 copy of stacked tensors, each one flat."""
    flat = stacked.reshape(len(stacked), -1)
    return scratch.empty_like(flat, torch.float64).copy_(flat)


def exact_sum(partials: Iterable[float]) -> tuple[float, ...]:
    """The sum of ``partials`` without any rounding, as the few doubles that add up to it, largest first.

    Sums of such expansions by ``math.fsum`` equal the ``math.fsum`` of all partials bit for bit, so one short tuple
    per parameter is all that is kept or stored.

    Example:
        >>> exact_sum([1e16, 1.0, 1e-3])
        (1.0000000000000002e+16, -0.999, -8.673617379884035e-19)
    """
    values, parts = list(partials), []
    while part := math.fsum(values):
        parts.append(part)
        values.append(-part)
    return tuple(parts)
