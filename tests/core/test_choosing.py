"""A sweep's coefficients: few looks, the same whoever looks, and the best of all of them."""

import itertools
from collections.abc import Sequence

import pytest

from fusionlab.commands.sweep.choosing import NotScoredError, Tried, choose, start_of
from fusionlab.search import START, Exhaustive, ToTheTop

TASKS = "abcdef"
SUBSETS = [subset for size in (2, 3, 4, 6) for subset in itertools.combinations(TASKS, size)]


def top(subset: tuple[str, ...]) -> float:
    """Where the scores of a subset are highest: lower with more tasks."""
    return round(1.6 / len(subset) + 0.05 * (ord(subset[0]) - ord("a")), 2)


class Asked:
    """Scores with a known top, and what was asked for."""

    def __init__(self) -> None:
        self.looks: list[Tried] = []

    def __call__(self, tried: Sequence[Tried]) -> list[float]:
        self.looks += tried
        return [-((value - top(subset)) ** 2) for subset, value in tried]


def test_the_top_of_every_subset_by_few_looks() -> None:
    score = Asked()
    chosen = choose(SUBSETS, score, ToTheTop)
    assert all(chosen[subset] == pytest.approx(top(subset), abs=0.026) for subset in SUBSETS)
    assert len(score.looks) == len(set(score.looks)) <= 5.5 * len(SUBSETS)


def test_a_grid_is_tried_whole() -> None:
    score = Asked()
    chosen = choose(SUBSETS, score, lambda start: Exhaustive((0.2, 0.4, 0.6)))
    assert {subset: [value for other, value in score.looks if other == subset][:3] for subset in SUBSETS} == {
        subset: [0.2, 0.4, 0.6] for subset in SUBSETS
    }
    assert chosen["a", "b", "c", "d", "e", "f"] == 0.2


def test_the_order_of_subsets_does_not_matter() -> None:
    one, other = Asked(), Asked()
    assert choose(SUBSETS, one, ToTheTop) == choose(list(reversed(SUBSETS)), other, ToTheTop)
    assert sorted(one.looks) == sorted(other.looks)


def test_a_size_starts_at_the_median_of_leading_choices_of_the_next_smaller_one() -> None:
    sizes = {2: [("a", "b"), ("a", "c"), ("b", "c")], 3: [("a", "b", "c")], 6: [tuple(TASKS)]}
    assert start_of(2, sizes, {}) == START
    chosen = {("a", "b"): 0.9, ("a", "c"): 0.5, ("b", "c"): 0.8, ("a", "b", "c"): 0.2}
    assert start_of(2, sizes, chosen) == START
    assert start_of(3, sizes, chosen) == 0.8
    assert start_of(6, sizes, chosen) == 0.2  # sizes in between were not asked for
    del chosen["b", "c"]
    with pytest.raises(NotScoredError, match="subsets of 2 tasks"):
        start_of(3, sizes, chosen)
