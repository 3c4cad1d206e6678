"""The trim of TIES as a transform: only the largest entries of every task vector go into a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.rules import magnitudes, scratch
from fusionlab.rules.base import Granularity, Rule, Statistics, StatisticsScope, TaskVectors, unmeasured
from fusionlab.rules.checks import check_range, check_transform, of_task
from fusionlab.rules.kernels import CUT
from fusionlab.rules.sums import num_cuts


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
        own = tuple((step,) for step in self._steps)
        if not self.rule.measures_untransformed:
            return own + self.rule.passes
        inner = self.rule.passes + ((),) * len(own)
        return tuple(mine + inner[k] for k, mine in enumerate(own)) + self.rule.passes[len(own) :]

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """The next of the trim's own quantities; the rule's, on trimmed task vectors once they can be."""
        own = next((step for step in self._steps if not earlier.has(step)), None)
        found: dict[str, Tensor] = {}
        if own is not None:
            step = {"coarse": self._coarse, "fine": self._fine, "at": self._at}[own]
            for task in task_vectors.tasks:
                with scratch.frame():
                    found |= step(name, task, task_vectors, earlier)
        if unmeasured(self.rule, earlier) and (own is None or self.rule.measures_untransformed):
            seen = task_vectors if self.rule.measures_untransformed else self._trimmed(name, task_vectors, earlier)
            found |= self.rule.measure(name, base, seen, earlier)
        return found

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """What the rule makes of the trimmed task vectors."""
        return self.rule.fuse(name, base, self._trimmed(name, task_vectors, statistics), statistics)

    @property
    def _steps(self) -> tuple[str, ...]:
        return ("coarse", "fine", "at") if self.at_threshold == "first" else ("coarse", "fine")

    def _place(self, task: str, name: str) -> str:
        return f"{task}/{name}" if self.scope == "tensor" else task

    def _coarse(self, name: str, task: str, block: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        return {f"coarse/{self._place(task, name)}": magnitudes.coarse_histogram(block[task])}

    def _fine(self, name: str, task: str, block: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        place = self._place(task, name)
        histogram = earlier.counts[f"coarse/{place}"]
        found = {f"fine/{place}": torch.zeros(1, dtype=torch.int64)}  # says that the pass was made
        for rank in self._inner_ranks(task, name, earlier):
            coarse_bin, _ = earlier.once(("bin", place, rank), partial(magnitudes.find_bin, histogram, rank))
            found[f"fine/{place}/{rank}"] = magnitudes.fine_histogram(block[task], coarse_bin)
        return found

    def _at(self, name: str, task: str, block: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        sizes = magnitudes.sizes(block[task])
        found = {f"at/{self._place(task, name)}": torch.zeros(1, dtype=torch.int64)}
        for rank in self._inner_ranks(task, name, earlier):
            value, _ = self._threshold(task, name, rank, earlier)
            per_cut = torch.zeros(num_cuts(block.size), dtype=torch.int64)
            for cut, piece in enumerate((sizes == value).split(CUT), start=block.start // CUT):
                per_cut[cut] = torch.count_nonzero(piece)
            found[f"at/{task}/{rank}/{name}"] = per_cut
        return found

    def _ranks(self, task: str, name: str, statistics: Statistics) -> tuple[int, ...]:
        """Sizes of the set of largest entries that is kept and, with ``skip``, of the set inside it that is not."""
        histogram = statistics.counts[f"coarse/{self._place(task, name)}"]
        size = statistics.once(("size", self._place(task, name)), lambda: int(histogram.sum()))
        density = of_task(self.density, task, "trim.density")
        kept = int(density * size)
        if self.at_threshold == "all":
            return (kept + 1,)
        if not self.skip:
            return (max(1, kept) if density > 0 else 0,)
        skipped = min(int(of_task(self.skip, task, "trim.skip") * size), size - kept)
        return (skipped + kept, skipped)

    def _inner_ranks(self, task: str, name: str, statistics: Statistics) -> list[int]:
        """Those ranks that are neither nothing nor everything, and so have a threshold."""
        histogram = statistics.counts[f"coarse/{self._place(task, name)}"]
        size = statistics.once(("size", self._place(task, name)), lambda: int(histogram.sum()))
        return [rank for rank in self._ranks(task, name, statistics) if 0 < rank < size]

    def _threshold(self, task: str, name: str, rank: int, statistics: Statistics) -> tuple[float, int]:
        """The ``rank``-th largest magnitude, and how many of the entries with it are among the ``rank`` largest."""
        place = self._place(task, name)
        coarse, fine = statistics.counts[f"coarse/{place}"], statistics.counts[f"fine/{place}/{rank}"]
        return statistics.once(("threshold", place, rank), lambda: magnitudes.threshold(coarse, fine, rank))

    def _trimmed(self, name: str, block: TaskVectors, statistics: Statistics) -> TaskVectors:
        trimmed = scratch.empty_like(block.stacked)
        for row, task in zip(trimmed, block.tasks, strict=True):
            with scratch.frame():
                self._trim_row(row, name, task, block, statistics)
        return block.replace(trimmed)

    def _trim_row(self, row: Tensor, name: str, task: str, block: TaskVectors, statistics: Statistics) -> None:
        sizes, ranks = magnitudes.sizes(block[task]), self._ranks(task, name, statistics)
        kept = self._among_largest(sizes, ranks[0], name, task, block, statistics)
        for rank in ranks[1:]:
            kept -= self._among_largest(sizes, rank, name, task, block, statistics)
        torch.mul(block[task], kept, out=row)

    def _among_largest(
        self, sizes: Tensor, rank: int, name: str, task: str, block: TaskVectors, statistics: Statistics
    ) -> Tensor:
        """1 where an entry is one of the ``rank`` largest, else 0, as float32."""
        if rank not in self._inner_ranks(task, name, statistics):
            return scratch.empty_like(sizes).fill_(float(rank > 0))
        value, at_value = self._threshold(task, name, rank, statistics)
        if self.at_threshold == "all":
            return torch.ge(sizes, value, out=scratch.empty_like(sizes))
        kept = torch.gt(sizes, value, out=scratch.empty_like(sizes))
        room = at_value - self._before(task, name, rank, block.start // CUT, statistics)
        if room > 0:
            equal = sizes == value
            kept += equal if room >= sizes.numel() else equal & (equal.cumsum(0) <= room)
        return kept

    def _before(self, task: str, name: str, rank: int, cut: int, statistics: Statistics) -> int:
        """How many entries have the threshold's magnitude before the cut, in the order of names and indices."""
        names = statistics.names if self.scope == "model" else (name,)

        def positions() -> dict[str, Tensor]:
            found, total = {}, torch.zeros(1, dtype=torch.int64)
            for one in names:
                found[one] = torch.cat([total, total + statistics.counts[f"at/{task}/{rank}/{one}"].cumsum(0)])
                total = found[one][-1:]
            return found

        key = ("before", task, rank, None if self.scope == "model" else name)
        return int(statistics.once(key, positions)[name][cut])
