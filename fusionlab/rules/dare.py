"""DARE: drop entries of the task vectors at random and rescale the rest, before any rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.rules import scratch
from fusionlab.rules.base import Granularity, Rule, Statistics, StatisticsScope, TaskVectors, unmeasured
from fusionlab.rules.checks import check_range, check_transform, of_task
from fusionlab.rules.sums import partial_sums, widened
from fusionlab.samplers import derive_seed

_WEYL, _MIX_1, _MIX_2 = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Dare:
    """``rule`` on the task vectors with entries dropped with probability p and the rest multiplied by 1/(1−p).

    One SplitMix64 generator per (seed, task, parameter), drawn in flat order, decides; it can be entered anywhere, so
    blocks, threads and devices do not matter. MetaGPT's norms are those before the drop.

    Args:
        rule: what is done with the remaining entries.
        drop_rate: p, one number or one per task.
        seed: of the generators.
        rescale: by 1/(1−p) (``probability``), so that every tensor keeps its L1 norm (``l1``), or ``none``.

    Raises:
        InputError: a drop rate outside 0..1 or of 1, an unknown choice, or a second transform before MetaGPT.

    Source: Language models are super Mario, arXiv 2311.03099.
    """

    rule: Rule
    drop_rate: float | Mapping[str, float] = 0.5
    seed: int = 0
    rescale: Literal["probability", "l1", "none"] = "probability"

    def __post_init__(self) -> None:
        for number in self.drop_rate.values() if isinstance(self.drop_rate, Mapping) else [self.drop_rate]:
            check_range("dare.drop_rate", number, 0.0, 1.0)
            if number == 1:
                raise InputError("dare.drop_rate: 1 drops everything; give a number below 1.")
        check_transform(self, self.rule)
        if self.rescale not in ("probability", "l1", "none"):
            raise InputError(f"dare.rescale: expected probability, l1 or none, got {self.rescale!r}.")

    @property
    def granularity(self) -> Granularity:
        """The rule's."""
        return self.rule.granularity

    @property
    def statistics_scope(self) -> StatisticsScope:
        """The rule's."""
        return self.rule.statistics_scope

    @property
    def measures_untransformed(self) -> bool:
        """A transform around this one comes first."""
        return False

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """L1 norms before and after, where they are kept, and the rule's own."""
        if self.rescale != "l1":
            return self.rule.passes
        own, inner = ("l1", "kept_l1"), self.rule.passes
        if inner and self.rule.measures_untransformed:
            return (own + inner[0], *inner[1:])
        return (own, *inner)

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """L1 norms where they are kept; the rule's quantities, on what remains."""
        found: dict[str, Tensor] = {}
        own = self.rescale == "l1" and not earlier.has("kept_l1")
        if own:
            remaining = self._masks(name, task_vectors).mul_(task_vectors.stacked)
            for quantity, values in (("l1", task_vectors.stacked), ("kept_l1", remaining)):
                partials = partial_sums(widened(values).abs_())
                found |= {f"{quantity}/{task}": row for task, row in zip(task_vectors.tasks, partials, strict=True)}
        if unmeasured(self.rule, earlier) and (not own or self.rule.measures_untransformed):
            seen = task_vectors if self.rule.measures_untransformed else self._drop(name, task_vectors, earlier)
            found |= self.rule.measure(name, base, seen, earlier)
        return found

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """What the rule makes of the remaining entries."""
        return self.rule.fuse(name, base, self._drop(name, task_vectors, statistics), statistics)

    def _drop(self, name: str, task_vectors: TaskVectors, statistics: Statistics) -> TaskVectors:
        masks = self._masks(name, task_vectors)
        for row, task in zip(masks, task_vectors.tasks, strict=True):
            row.mul_(self._scale(name, task, statistics))
        return task_vectors.replace(masks.mul_(task_vectors.stacked))

    def _scale(self, name: str, task: str, statistics: Statistics) -> float:
        if self.rescale == "none":
            return 1.0
        if self.rescale == "probability":
            return 1.0 / (1.0 - of_task(self.drop_rate, task, "dare.drop_rate"))
        kept = statistics.sum(f"kept_l1/{task}", [name])
        return statistics.sum(f"l1/{task}", [name]) / kept if kept else 1.0

    def _masks(self, name: str, task_vectors: TaskVectors) -> Tensor:
        """1 where an entry remains, else 0."""
        masks = scratch.empty_like(task_vectors.stacked)
        for row, task in zip(masks, task_vectors.tasks, strict=True):
            drop_rate = of_task(self.drop_rate, task, "dare.drop_rate")
            with scratch.frame():
                bits = scratch.empty((row.numel(),), row, torch.int64)
                random_bits_(bits, derive_seed(self.seed, task, name), task_vectors.start)
                torch.ge(bits, round(drop_rate * 2.0**64) - (1 << 63), out=row.view(-1))
        return masks


def random_bits_(values: Tensor, seed: int, start: int) -> Tensor:
    """Fill flat int64 ``values`` with all 64 bits of the draws from number ``start`` on of this seed's SplitMix64.

    Example:
        >>> random_bits_(torch.empty(3, dtype=torch.int64), 1234567, 0)[:2]
        tensor([6457827717110365317, 3203168211198807973])
        >>> random_bits_(torch.empty(1, dtype=torch.int64), 1234567, 1)
        tensor([3203168211198807973])
    """
    torch.arange(start + 1, start + values.numel() + 1, out=values)
    values.mul_(_WEYL).add_(seed)
    shifted = scratch.empty_like(values)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        torch.bitwise_right_shift(values, shift, out=shifted)
        values.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            values.mul_(factor)
    return values
