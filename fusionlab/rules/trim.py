"""The trim of TIES as a transform: only the largest entries of every task vector go into a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionlab.blocks import magnitudes, scratch
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, Rule, StatisticsScope, unmeasured
from fusionlab.rules.checks import check_range, check_transform, of_task
from fusionlab.rules.largest import Largest


@dataclass(frozen=True)
class Trim:
    """``rule`` on the task vectors with all but their largest entries set to zero.

    With n entries and k = int(density·n): ``all`` keeps every entry at least as large as the (k+1)-th largest, as TIES
    defines it, ties included; ``first`` keeps exactly k entries (one at least, for a density above 0) and, of those at
    the threshold, the ones with the lowest flat index. Magnitudes are compared in float32. MetaGPT's norms are those
    before the trim.

    Args:
        rule: what is done with the trimmed task vectors.
        density: the share of entries to keep, one number or one per task.
        scope: what the entries are ranked over: the whole task vector or each tensor.
        at_threshold: see above.
        skip: share of the very largest entries to drop as well; with it, int(skip·n) are dropped, or as many as leave
            enough, and the next int(density·n) kept. Needs ``first``.

    Raises:
        InputError: a value out of range, a trim inside a trim, a rule on whole tensors, or a second transform before
            MetaGPT.

    Source: TIES-Merging, arXiv 2306.01708, section 4.1.
    """

    rule: Rule
    density: float | Mapping[str, float] = 0.2
    scope: Literal["model", "tensor"] = "model"
    at_threshold: Literal["all", "first"] = "all"
    skip: float | Mapping[str, float] = 0.0

    least: ClassVar[int] = 1  # kept without ``skip``, where the density is above 0

    def __post_init__(self) -> None:
        for what in ("density", "skip"):
            value = getattr(self, what)
            for number in value.values() if isinstance(value, Mapping) else [value]:
                check_range(f"trim.{what}", number, 0.0, 1.0)
        if self.scope not in ("model", "tensor"):
            raise InputError(f"trim.scope: expected model or tensor, got {self.scope!r}.")
        if self.at_threshold not in ("all", "first"):
            raise InputError(f"trim.at_threshold: expected all or first, got {self.at_threshold!r}.")
        if self.skip and self.at_threshold == "all":
            raise InputError("trim.skip needs at_threshold: first.")
        check_transform(self, self.rule)
        if self.rule.granularity != "elementwise":
            raise InputError(f"trim: {type(self.rule).__name__} works on whole tensors, which a trim cannot precede.")
        if any("coarse" in quantities for quantities in self.rule.passes):
            raise InputError(f"trim: {type(self.rule).__name__} trims already.")

    @property
    def granularity(self) -> Granularity:
        """Blocks."""
        return "elementwise"

    @property
    def statistics_scope(self) -> StatisticsScope:
        """The wider one of both."""
        return "tensor" if self.scope == self.rule.statistics_scope == "tensor" else "model"

    @property
    def measures_untransformed(self) -> bool:
        """A transform around this one comes first."""
        return False

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """Two histograms, where it matters the places of the entries at the threshold, and the rule's own."""
        own = tuple((step,) for step in self._largest.steps)
        if not self.rule.measures_untransformed:
            return own + self.rule.passes
        inner = self.rule.passes + ((),) * len(own)
        return tuple(mine + inner[k] for k, mine in enumerate(own)) + self.rule.passes[len(own) :]

    @property
    def _largest(self) -> Largest:
        return Largest(self.scope, self.at_threshold)

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """The next of the trim's own quantities; the rule's, on trimmed task vectors once they can be."""
        own = next((step for step in self._largest.steps if not earlier.has(step)), None)
        found: dict[str, Tensor] = {}
        if own is not None:
            block = (task_vectors.start, task_vectors.size)
            for task in task_vectors.tasks:
                with scratch.frame():
                    ranks = () if own == "coarse" else self._ranks(task, name, earlier)
                    found |= self._largest.measure(own, task, name, task_vectors[task], block, ranks, earlier)
        if unmeasured(self.rule, earlier) and (own is None or self.rule.measures_untransformed):
            seen = task_vectors if self.rule.measures_untransformed else self._trimmed(name, task_vectors, earlier)
            found |= self.rule.measure(name, base, seen, earlier)
        return found

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """What the rule makes of the trimmed task vectors."""
        return self.rule.fuse(name, base, self._trimmed(name, task_vectors, statistics), statistics)

    def _ranks(self, task: str, name: str, statistics: Statistics) -> tuple[int, ...]:
        """Sizes of the set of largest entries that is kept and, with ``skip``, of the set inside it that is not."""
        size = self._largest.size(task, name, statistics)
        density = of_task(self.density, task, "trim.density")
        kept = int(density * size)
        if self.at_threshold == "all":
            return (kept + 1,)
        if not self.skip:
            return (max(self.least, kept) if density > 0 else 0,)
        skipped = min(int(of_task(self.skip, task, "trim.skip") * size), size - kept)
        return (skipped + kept, skipped)

    def _trimmed(self, name: str, block: TaskVectors, statistics: Statistics) -> TaskVectors:
        trimmed = scratch.empty_like(block.stacked)
        for row, task in zip(trimmed, block.tasks, strict=True):
            with scratch.frame():
                self._trim_row(row, name, task, block, statistics)
        return block.replace(trimmed)

    def _trim_row(self, row: Tensor, name: str, task: str, block: TaskVectors, statistics: Statistics) -> None:
        sizes, (rank, *skipped) = magnitudes.sizes(block[task]), self._ranks(task, name, statistics)
        kept = self._largest.mask(task, name, sizes, block.start, rank, statistics)
        for rank in skipped:
            kept -= self._largest.mask(task, name, sizes, block.start, rank, statistics)
        torch.mul(block[task], kept, out=row)
