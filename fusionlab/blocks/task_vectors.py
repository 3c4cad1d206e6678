"""What a rule is handed: the task vectors of one block, and what the passes before measured of all blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

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
        transposed: weights of linear layers that are stored ``(in, out)``, for rules that tell their sides apart.
        remarks: parameter -> what the user should know of how it was fused.
    """

    tasks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sums: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    model: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
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
