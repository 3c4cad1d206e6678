"""Which coefficient of an open rule counts for each subset, and which ones are looked at to find it.

A size's search starts at the median choice of some subsets of the next smaller size, so that few looks are needed; what
is looked at follows from scores alone, whichever process made them, in whatever order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fusionlab.evaluation.rows import Row, higher_is_better, mean_score
from fusionlab.search import START, Looks, best

Subset = tuple[str, ...]
Tried = tuple[Subset, float]
Score = Callable[[Sequence[Tried]], Sequence[float]]
SPLITS = {"strict": "validation", "published": "test"}
"""Where a protocol chooses."""


class NotScoredError(LookupError):
    """A point that a choice needs is not computed yet."""


def by_size(subsets: Iterable[Subset]) -> dict[int, list[Subset]]:
    """Subsets by their number of tasks."""
    found: dict[int, list[Subset]] = {}
    for subset in subsets:
        found.setdefault(len(subset), []).append(subset)
    return found


def leading(of_size: Sequence[Subset]) -> list[Subset]:
    """The three subsets of a size that the next size's searches start from, evenly spread in the order of names.

    Example:
        >>> leading([("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")])
        [('a', 'b'), ('b', 'c'), ('c', 'd')]
    """
    if len(of_size) <= 3:
        return list(of_size)
    ordered = sorted(of_size)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def choose(subsets: Iterable[Subset], score: Score, looks: Callable[[float], Looks]) -> dict[Subset, float]:
    """The best coefficient of every subset, size after size; subsets whose points are not all scored are left out.

    Args:
        subsets: of all sizes up to one.
        score: of subsets with a coefficient each; raises :class:`NotScoredError` for what is not there.
        looks: what is looked at from a start.
    """
    chosen: dict[Subset, float] = {}
    sizes = by_size(subsets)
    for size, of_size in sorted(sizes.items()):
        try:
            start = start_of(size, sizes, chosen)
        except NotScoredError:
            continue
        for subset in of_size:
            with suppress(NotScoredError):
                chosen |= choose_of_size([subset], score, looks(start))
    return chosen


def choose_of_size(subsets: Sequence[Subset], score: Score, looks: Looks) -> dict[Subset, float]:
    """The best coefficient of subsets of one size; what all of them look at next is scored at once."""
    scores: dict[Subset, dict[float, float]] = {subset: {} for subset in subsets}
    while tried := [(subset, value) for subset in subsets for value in looks(scores[subset])]:
        for (subset, value), found in zip(tried, score(tried), strict=True):
            scores[subset][value] = found
    return {subset: best(found) for subset, found in scores.items()}


def start_of(size: int, sizes: Mapping[int, Sequence[Subset]], chosen: Mapping[Subset, float]) -> float:
    """Where the searches of a size start: the median choice of the leading subsets of the next smaller size.

    Args:
        size: the number of tasks.
        sizes: all subsets by their number of tasks.
        chosen: coefficients.

    Raises:
        NotScoredError: one of them is not chosen yet.
    """
    smaller = [other for other in sizes if other < size]
    if not smaller:
        return START
    before = leading(sizes[max(smaller)])
    if not all(subset in chosen for subset in before):
        raise NotScoredError(f"subsets of {max(smaller)} tasks")
    return statistics.median_low(chosen[subset] for subset in before)


def score_of(protocol: str, rows: Iterable[Row], single: Mapping[str, float]) -> float:
    """What a protocol chooses by: the mean validation score, or the published criterion on test."""
    return mean_score(rows) if protocol == "strict" else share_of_all(rows, single)


def share_of_all(rows: Iterable[Mapping[str, Any]], single: Mapping[str, float]) -> float:
    """The published criterion, ``own_all``: the mean over the tasks of the share of their single-task score.

    Errors have no share, nor have tasks whose single-task score is not positive, and these do not count; where none has
    one, the mean score.

    Example:
        >>> rows = [{"task": task, "metric": "accuracy", "value": value} for task, value in (("a", 0.4), ("b", 0.3))]
        >>> share_of_all(rows, {"a": 0.8, "b": 0.0})
        0.5
    """
    rows = list(rows)
    values = {row["task"]: row["value"] for row in rows if higher_is_better(row) and single.get(row["task"], 0.0) > 0}
    return math.fsum(values[task] / single[task] for task in values) / len(values) if values else mean_score(rows)
