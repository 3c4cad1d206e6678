"""What a fusion rule is, and what it is handed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fusionlab.rules import kernels, scratch

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
        sums: key -> parameter -> the sum of its partials as an exact expansion (``sums.exact_sum``).
        counts: key -> int64 tensor, added up over all blocks.
        model: every tensor of the model, fused or not, for rules that count its blocks; ``names`` where it is empty.
        remarks: parameter -> what the user should know of how it was fused.
    """

    tasks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sums: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    model: tuple[str, ...] = ()
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    _memory: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    def sum(self, key: str, names: Iterable[str] | None = None) -> float:
        """The correctly rounded sum of ``key`` over ``names`` (default: every parameter measured)."""
        found = self.sums.get(key, {})
        chosen = found.values() if names is None else [found[name] for name in names if name in found]
        return math.fsum(part for parts in chosen for part in parts)

    def remark(self, name: str, remarks: Iterable[str]) -> None:
        """Keep what the user should know of how ``name`` was fused."""
        if found := tuple(remarks):
            self.remarks[name] = found

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
