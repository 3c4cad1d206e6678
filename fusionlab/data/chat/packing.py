"""Samples into rows of a limited length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch


def best_fit(lengths: Sequence[int], capacity: int) -> list[torch.Tensor]:
    """Samples by row, int64 indices: longest first, each into the fullest row that still takes it.

    Args:
        lengths: of the samples, each at most ``capacity``.
        capacity: of a row.

    Example:
        >>> [row.tolist() for row in best_fit([3, 5, 2, 4], 7)]
        [[1, 2], [3, 0]]

    Source: best-fit decreasing, as TRL packs.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row, ordered by what is left of it
    for sample in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[sample]
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([sample])
            insort(room, (capacity - length, len(rows) - 1))
            continue
        left, row = room.pop(place)
        rows[row].append(sample)
        insort(room, (left - length, row))
    return [torch.tensor(row) for row in rows]
