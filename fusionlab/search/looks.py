"""Which numbers to look at next when one number is chosen by its score: by steps to the top, or a whole grid.

Scores over a coefficient have one hump that is flat at its top, so a few looks find it. What is looked at next follows
from the scores so far alone: several processes, and a sweep that goes on after a kill, look at the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_Number = TypeVar("_Number", int, float)
BEYOND, LIMIT = 5, 3.0
MEAN_LOOKS = 5.5
"""Numbers that :class:`ToTheTop` looks at on average, for forecasts."""
NUM_STEPS = round(LIMIT / 0.05) + 1
"""Numbers that are all tried where many models cost as one."""
Scores = Mapping[float, float]
Looks = Callable[[Scores], tuple[float, ...]]
"""What to look at next by the scores so far; nothing at the end."""


def best(scores: Mapping[_Number, float]) -> _Number:
    """The number that scores best; ties go to the smaller.

    Example:
        >>> best({0.1: 0.5, 0.3: 0.7, 0.2: 0.7})
        0.2
    """
    return max(sorted(scores), key=lambda value: scores[value])


def look(score: Callable[[Sequence[float]], Sequence[float]], looks: Looks) -> dict[float, float]:
    """The scores of all numbers that ``looks`` asks for, in the order in which they were looked at."""
    scores: dict[float, float] = {}
    while values := looks(scores):
        scores |= dict(zip(values, score(values), strict=True))
    return scores


@dataclass(frozen=True)
class ToTheTop:
    """Look at 0.7, 1 and 1.4 times a start; then further out while an edge wins, then at the tops of parabolas.

    A parabola goes through the best number and its neighbours on either side that are known. The search ends where its
    top is known already. All numbers are whole multiples of a step, from 0 to 3.

    Args:
        start: where the top is expected.
        step: between numbers that count as different.

    Example:
        >>> list(look(lambda values: [-((value - 0.62) ** 2) for value in values], ToTheTop(0.4)))
        [0.3, 0.4, 0.55, 0.75, 0.6]
    """

    start: float
    step: float = 0.05

    def __call__(self, scores: Scores) -> tuple[float, ...]:
        known = {round(value / self.step): score for value, score in scores.items()}
        start = self._inside(max(1, round(self.start / self.step)))
        first = dict.fromkeys((self._below(start), start, self._above(start)))
        return tuple(self._number(place) for place in [p for p in first if p not in known] or self._next(known))

    def _next(self, known: Mapping[int, float]) -> tuple[int, ...]:
        top = best(known)
        if top == min(known):
            place = self._below(top)
        elif top == max(known):
            place = self._above(top)
        else:
            left = max(place for place in known if place < top)
            right = min(place for place in known if place > top)
            place = _vertex(*((place, known[place]) for place in (left, top, right)))
        return () if place in known else (place,)

    def _below(self, place: int) -> int:
        return self._inside(min(place - 1, round(0.7 * place)))

    def _above(self, place: int) -> int:
        return self._inside(max(place + 1, round(1.4 * place)))

    def _inside(self, place: int) -> int:
        return min(max(place, 0), round(LIMIT / self.step))

    def _number(self, place: int) -> float:
        return round(place * self.step, 10)


def looks_for(
    grid: Sequence[float] | None, at_once: bool, start: float, step: float = 0.05, beyond: bool = True
) -> Looks:
    """A grid that was asked for; every multiple of the step where many models cost as one; else steps to the top."""
    if grid is None and not at_once:
        return ToTheTop(start, step)
    every = (round(place * step, 10) for place in range(round(LIMIT / step) + 1))
    return Exhaustive(tuple(every if grid is None else grid), beyond)


def _vertex(left: tuple[int, float], top: tuple[int, float], right: tuple[int, float]) -> int:
    """The place where the parabola through three points is highest, rounded; their middle one is not below the others.

    Example:
        >>> _vertex((0, 0.0), (4, 1.0), (10, 0.0))
        5
    """
    before, after = top[0] - left[0], right[0] - top[0]
    rise, fall = (top[1] - left[1]) / before, (top[1] - right[1]) / after
    if not rise + fall:
        return top[0]
    return round(top[0] + 0.5 * (rise * after - fall * before) / (rise + fall))


@dataclass(frozen=True)
class Exhaustive:
    """Look at a whole grid at once; then at the next few beyond its largest number while that edge wins, up to 3.

    Example:
        >>> Exhaustive((0.0, 0.5, 1.0))({0.0: 0.1, 0.5: 0.2, 1.0: 0.3})
        (1.5, 2.0, 2.5, 3.0)
        >>> Exhaustive((0.0, 0.5, 1.0))({0.0: 0.1, 0.5: 0.3, 1.0: 0.2})
        ()
    """

    grid: tuple[float, ...]
    beyond: bool = True
    """Whether to look beyond the grid."""

    def __call__(self, scores: Scores) -> tuple[float, ...]:
        grid = sorted(dict.fromkeys(self.grid))
        missing = tuple(value for value in grid if value not in scores)
        if missing or len(grid) < 2 or not self.beyond:
            return missing
        edge = max(scores)
        if best(scores) != edge:
            return ()
        step = grid[-1] - grid[-2]
        values = (round(edge + step * k, 10) for k in range(1, BEYOND + 1))
        return tuple(value for value in values if value <= LIMIT)
