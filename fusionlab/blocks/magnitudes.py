"""The largest entries of a task vector without sorting it: histograms over the bits of |τ| in two measuring passes.

The bits of a non-negative float32 are ordered like its value. The first pass counts the upper 15 bits, which tells the
bin that holds the k-th largest; the second counts the lower 16 bits inside that bin, which tells its value exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusionlab.blocks import kernels, scratch

COARSE_BINS = 1 << 15
FINE_BINS = 1 << 16


def sizes(task_vector: Tensor) -> Tensor:
    """|τ| in float32."""
    return torch.abs(task_vector.float(), out=scratch.empty_like(task_vector, torch.float32))


def coarse_histogram(task_vector: Tensor) -> Tensor:
    """Counts of |τ| in float32 by the upper 15 of 31 bits, int64 ``(32768,)``."""
    counts = torch.zeros(COARSE_BINS, dtype=torch.int64)
    kernels.add_upper_bits(_values(task_vector), counts.numpy())
    return counts


def fine_histogram(task_vector: Tensor, coarse_bin: int) -> Tensor:
    """Counts of |τ| in float32 by the lower 16 bits among the entries in ``coarse_bin``, int64 ``(65536,)``."""
    counts = torch.zeros(FINE_BINS, dtype=torch.int64)
    kernels.add_lower_bits(_values(task_vector), coarse_bin, counts.numpy())
    return counts


def _values(task_vector: Tensor) -> np.ndarray:
    return task_vector.float().flatten().cpu().numpy()


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
