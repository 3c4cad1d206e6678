"""The largest entries of a task vector without sorting it: histograms over the bits of |τ| in two measuring passes.

The bits of a non-negative float32 are ordered like its value. The first pass counts the upper 15 bits, which tells the
bin that holds the k-th largest; the second counts the lower 16 bits inside that bin, which tells its value exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionlab.rules import scratch

COARSE_BINS = 1 << 15
FINE_BINS = 1 << 16


def sizes(task_vector: Tensor) -> Tensor:
    """|τ| in float32."""
    return torch.abs(task_vector.float(), out=scratch.empty_like(task_vector, torch.float32))


def bits(task_vector: Tensor) -> Tensor:
    """The bits of |τ| in float32, as int32."""
    return sizes(task_vector).view(torch.int32)


def coarse_histogram(values: Tensor) -> Tensor:
    """Counts of the upper 15 of 31 bits, int64 ``(32768,)``."""
    with scratch.frame():
        upper = torch.bitwise_right_shift(values, 16, out=scratch.empty_like(values))
        return torch.bincount(upper, minlength=COARSE_BINS)


def fine_histogram(values: Tensor, coarse_bin: int) -> Tensor:
    """Counts of the lower 16 bits among the entries in ``coarse_bin``, int64 ``(65536,)``."""
    with scratch.frame():
        inside = torch.sub(values, coarse_bin << 16, out=scratch.empty_like(values)).clamp_(-1, FINE_BINS).add_(1)
        return torch.bincount(inside, minlength=FINE_BINS + 2)[1:-1]


def find_bin(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the ``rank``-th largest entry (from 1), and its rank among the entries of that bin.

    Example:
        >>> find_bin(torch.tensor([5, 2, 1]), 2)
        (1, 1)
    """
    from_above = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_above, rank))
    above = int(from_above[position - 1]) if position else 0
    return len(histogram) - 1 - position, rank - above


def threshold(coarse: Tensor, fine: Tensor, rank: int) -> tuple[float, int]:
    """The ``rank``-th largest magnitude, and how many of the entries with it are among the ``rank`` largest."""
    coarse_bin, rank_inside = find_bin(coarse, rank)
    low, at_value = find_bin(fine, rank_inside)
    return torch.tensor((coarse_bin << 16) | low, dtype=torch.int32).view(torch.float32).item(), at_value
