"""Weights of which some matrices have other rows: taken from several models, in another order, or zeros."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fusionlab.tensors.lazy import TensorInfo, Weights


@dataclass(frozen=True)
class Run:
    """Rows that follow one another.

    Args:
        count: how many.
        sources: where they are read from, and the first row there; several: the mean of all; none: zeros.
    """

    count: int
    sources: tuple[tuple[Weights, int], ...]

    def is_continued_by(self, weights: Weights, row: int) -> bool:
        """Whether a row of ``weights`` comes after the last of these, of one source."""
        return self.sources[0][0] is weights and self.sources[0][1] + self.count == row


class RowWeights:
    """Weights whose matrices ``names`` have the rows of ``runs``, one after the other.

    Args:
        weights: what the other tensors are read from; it says the dtypes.
        names: the matrices, under the same names in all sources.
        runs: their rows.
    """

    def __init__(self, weights: Weights, names: Collection[str], runs: Sequence[Run]) -> None:
        self._weights, self._names, self._runs = weights, set(names), list(runs)
        self._starts = list(accumulate((run.count for run in runs), initial=0))
        self.tensors = {
            name: TensorInfo((self._starts[-1], *info.shape[1:]), info.dtype) if name in self._names else info
            for name, info in weights.tensors.items()
        }
        self.device, self.held_bytes = weights.device, weights.held_bytes

    def read(self, name: str) -> Tensor:
        """The whole tensor as it is stored."""
        if name not in self._names:
            return self._weights.read(name)
        info = self.tensors[name]
        found = torch.empty(info.numel, dtype=info.dtype)
        self.read_into(name, 0, found)
        return found.view(info.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the flat index ``start`` on, converted to its dtype; means in float32 or wider."""
        if name not in self._names:
            self._weights.read_into(name, start, out)
            return
        width = self.tensors[name].shape[1]
        end = start + out.numel()
        place = bisect_right(self._starts, start // width) - 1
        while start < end:
            run, first = self._runs[place], self._starts[place] * width
            piece = out[: min(end, first + run.count * width) - start]
            self._fill(piece, name, run, start - first, width)
            out, start, place = out[piece.numel() :], start + piece.numel(), place + 1

    def _fill(self, piece: Tensor, name: str, run: Run, offset: int, width: int) -> None:
        if len(run.sources) == 1:
            weights, row = run.sources[0]
            weights.read_into(name, row * width + offset, piece)
            return
        total = torch.zeros_like(piece, dtype=torch.promote_types(piece.dtype, torch.float32))
        for weights, row in run.sources:
            part = torch.empty_like(total)
            weights.read_into(name, row * width + offset, part)
            total += part / len(run.sources)
        piece.copy_(total)
