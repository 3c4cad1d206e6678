"""Which entries are among the k largest of one tensor or of several, found in passes over blocks without sorting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fusionlab.blocks import magnitudes, scratch
from fusionlab.blocks.kernels import CUT
from fusionlab.blocks.sums import num_cuts
from fusionlab.blocks.task_vectors import Statistics


@dataclass(frozen=True)
class Largest:
    """The largest of some values by their magnitude in float32, of one parameter or of all together.

    Two passes of histograms find the k-th largest magnitude exactly; a third one, with ``at_threshold`` ``first``, the
    places of the entries that equal it, so that exactly k are kept: those of the lowest flat index.

    Args:
        scope: what values are ranked over, the whole ``model`` or each ``tensor``.
        at_threshold: ``all`` keeps every entry that equals the k-th largest, ``first`` exactly k entries.
        prefix: of the keys of the statistics, for a rule that ranks two things.
    """

    scope: Literal["model", "tensor"]
    at_threshold: Literal["all", "first"]
    prefix: str = ""

    @property
    def steps(self) -> tuple[str, ...]:
        """The quantities of the passes, one a pass."""
        return tuple(self.prefix + step for step in ("coarse", "fine", "at")[: 2 + (self.at_threshold == "first")])

    def size(self, whose: str, name: str, statistics: Statistics) -> int:
        """Number of entries that are ranked together; known after the first pass."""
        place = self._place(whose, name)
        return statistics.once(
            (self.prefix, "size", place), lambda: int(statistics.counts[f"{self.prefix}coarse/{place}"].sum())
        )

    def measure(
        self, step: str, whose: str, name: str, values: Tensor, block: tuple[int, int], ranks: tuple[int, ...],
        earlier: Statistics,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What one of :attr:`steps` counts in a block.

        Args:
            step: which.
            whose: of what the values are, such as a task.
            name: the parameter.
            values: flat.
            block: the flat index of its first element in its parameter, and the parameter's size.
            ranks: the k that :meth:`mask` will be asked for; not needed in the first pass.
            earlier: the statistics of the passes before.
        """
        place = self._place(whose, name)
        if step == self.steps[0]:
            return {f"{step}/{place}": magnitudes.coarse_histogram(values)}
        found = {f"{step}/{place}": torch.zeros(1, dtype=torch.int64)}  # says that the pass was made
        for rank in self._inner(whose, name, ranks, earlier):
            if step == self.steps[1]:
                found[f"{step}/{place}/{rank}"] = self._fine(place, values, rank, earlier)
            else:
                sizes = magnitudes.sizes(values)
                value, _ = self._threshold(place, rank, earlier)
                per_cut = torch.zeros(num_cuts(block[1]), dtype=torch.int64)
                for cut, piece in enumerate(torch.split(sizes == value, CUT), start=block[0] // CUT):
                    per_cut[cut] = torch.count_nonzero(piece)
                found[f"{step}/{whose}/{rank}/{name}"] = per_cut
        return found

    def mask(self, whose: str, name: str, sizes: Tensor, start: int, rank: int, statistics: Statistics) -> Tensor:
        """1 where an entry is one of the ``rank`` largest by its magnitude in float32, ``sizes``, else 0."""
        if rank not in self._inner(whose, name, (rank,), statistics):
            return scratch.empty_like(sizes).fill_(float(rank > 0))
        value, at_value = self._threshold(self._place(whose, name), rank, statistics)
        if self.at_threshold == "all":
            return torch.ge(sizes, value, out=scratch.empty_like(sizes))
        kept = torch.gt(sizes, value, out=scratch.empty_like(sizes))
        room = at_value - self._before(whose, name, rank, start // CUT, statistics)
        if room > 0:
            equal = sizes == value
            kept += equal if room >= sizes.numel() else equal & (equal.cumsum(0) <= room)
        return kept

    def _place(self, whose: str, name: str) -> str:
        return f"{whose}/{name}" if self.scope == "tensor" else whose

    def _inner(self, whose: str, name: str, ranks: tuple[int, ...], statistics: Statistics) -> tuple[int, ...]:
        """Those ranks that are neither nothing nor everything, and so have a threshold."""
        size = self.size(whose, name, statistics)
        return tuple(rank for rank in ranks if 0 < rank < size)

    def _fine(self, place: str, values: Tensor, rank: int, earlier: Statistics) -> Tensor:
        histogram = earlier.counts[f"{self.steps[0]}/{place}"]
        coarse_bin, _ = earlier.once((self.prefix, "bin", place, rank), partial(magnitudes.find_bin, histogram, rank))
        return magnitudes.fine_histogram(values, coarse_bin)

    def _threshold(self, place: str, rank: int, statistics: Statistics) -> tuple[float, int]:
        """The ``rank``-th largest score, and how many of the entries with it are among the ``rank`` largest."""
        coarse = statistics.counts[f"{self.steps[0]}/{place}"]
        fine = statistics.counts[f"{self.steps[1]}/{place}/{rank}"]
        return statistics.once(
            (self.prefix, "threshold", place, rank), lambda: magnitudes.threshold(coarse, fine, rank)
        )

    def _before(self, whose: str, name: str, rank: int, cut: int, statistics: Statistics) -> int:
        """How many entries have the threshold's score before the cut, in the order of names and indices."""
        names = statistics.names if self.scope == "model" else (name,)

        def positions() -> dict[str, Tensor]:
            found, total = {}, torch.zeros(1, dtype=torch.int64)
            for one in names:
                counted = statistics.counts[f"{self.steps[2]}/{whose}/{rank}/{one}"]
                found[one] = torch.cat([total, total + counted.cumsum(0)])
                total = found[one][-1:]
            return found

        key = (self.prefix, "before", whose, rank, None if self.scope == "model" else name)
        return int(statistics.once(key, positions)[name][cut])
