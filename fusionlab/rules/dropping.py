"""What DARE and DELLA share: entries of task vectors dropped at random and the others made larger, before a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.sums import partial_sums, widened
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, Rule, StatisticsScope, unmeasured
from fusionlab.rules.checks import check_range, check_transform
from fusionlab.samplers import derive_seed

_WEYL, _MIX_1, _MIX_2 = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Dropping(ABC):
    """``rule`` on task vectors of which entries were dropped and the rest rescaled; subclasses say which and how.

    MetaGPT's norms are those before the drop.
    """

    rule: Rule
    seed: int
    rescale: Literal["probability", "l1", "none"]

    measures_untransformed: ClassVar[bool] = False  # a transform around this one comes first

    @abstractmethod
    def masks(self, name: str, task_vectors: TaskVectors) -> Tensor:
        """1 where an entry remains, else 0, in the shape of ``task_vectors.stacked``."""

    @abstractmethod
    def unbias_(self, masks: Tensor, task_vectors: TaskVectors) -> None:
        """Divide what remains by its probability to remain, in place."""

    def check(self, what: str) -> None:
        """Raise if the arguments that all such transforms have do not fit.

        Raises:
            InputError: an unknown choice, or a second transform before MetaGPT.
        """
        check_transform(self, self.rule)
        if self.rescale not in ("probability", "l1", "none"):
            raise InputError(f"{what}.rescale: expected probability, l1 or none, got {self.rescale!r}.")

    @property
    def granularity(self) -> Granularity:
        """The rule's."""
        return self.rule.granularity

    @property
    def statistics_scope(self) -> StatisticsScope:
        """The rule's."""
        return self.rule.statistics_scope

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
            remaining = self.masks(name, task_vectors).mul_(task_vectors.stacked)
            for quantity, values in (("l1", task_vectors.stacked), ("kept_l1", remaining)):
                partials = partial_sums(widened(values).abs_())
                found |= {f"{quantity}/{task}": row for task, row in zip(task_vectors.tasks, partials, strict=True)}
        if unmeasured(self.rule, earlier) and (not own or self.rule.measures_untransformed):
            seen = task_vectors if self.rule.measures_untransformed else self._drop(name, task_vectors, earlier)
            found |= self.rule.measure(name, *self._handed(base, seen), earlier)
        return found

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """What the rule makes of the remaining entries."""
        remaining = self._drop(name, task_vectors, statistics)
        return self.rule.fuse(name, *self._handed(base, remaining), statistics).view(base.shape)

    def _handed(self, base: Tensor, task_vectors: TaskVectors) -> tuple[Tensor, TaskVectors]:
        """As the rule takes them: flat, where it works on blocks."""
        if self.rule.granularity == "tensor":
            return base, task_vectors
        return base.reshape(-1), task_vectors.replace(task_vectors.stacked.reshape(len(task_vectors), -1))

    def _drop(self, name: str, task_vectors: TaskVectors, statistics: Statistics) -> TaskVectors:
        masks = self.masks(name, task_vectors)
        if self.rescale == "probability":
            self.unbias_(masks, task_vectors)
        elif self.rescale == "l1":
            for row, task in zip(masks, task_vectors.tasks, strict=True):
                kept = statistics.sum(f"kept_l1/{task}", [name])
                row.mul_(statistics.sum(f"l1/{task}", [name]) / kept if kept else 1.0)
        return task_vectors.replace(masks.mul_(task_vectors.stacked))

    def draws(self, name: str, task: str, like: Tensor, start: int) -> Tensor:
        """All 64 bits of one draw for every entry of ``like``, flat: of the generator of this seed, task and name."""
        bits = scratch.empty((like.numel(),), like, torch.int64)
        return random_bits_(bits, derive_seed(self.seed, task, name), start)


def check_rates(what: str, value: float | Mapping[str, float]) -> list[float]:
    """The numbers in ``value``.

    Raises:
        InputError: one outside 0..1.
    """
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    for number in numbers:
        check_range(what, number, 0.0, 1.0)
    return numbers


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
