"""One number chosen on validation: task arithmetic's coefficient, or a factor on MetaGPT's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from fusionlab.errors import InputError
from fusionlab.rules import Metagpt, Rule, TaskArithmetic, with_coefficient
from fusionlab.search.base import Found, Problem

GRID = tuple(round(0.05 * step, 2) for step in range(21))
"""Coefficients to try first, 0..1 by 0.05 as in the literature."""
BEYOND, LIMIT = 5, 3.0


def next_coefficients(scores: Mapping[float, float], grid: Sequence[float] = GRID) -> tuple[float, ...]:
    """What to try next: the grid, then the next few beyond its largest value while that edge wins, at most up to 3.

    Example:
        >>> next_coefficients({0.0: 0.1, 0.5: 0.2, 1.0: 0.3}, (0.0, 0.5, 1.0))
        (1.5, 2.0, 2.5, 3.0)
        >>> next_coefficients({0.0: 0.1, 0.5: 0.3, 1.0: 0.2}, (0.0, 0.5, 1.0))
        ()
    """
    grid = sorted(dict.fromkeys(grid))
    missing = tuple(value for value in grid if value not in scores)
    if missing or len(grid) < 2:
        return missing
    edge = max(scores)
    if best_coefficient(scores) != edge:
        return ()
    step = grid[-1] - grid[-2]
    values = (round(edge + step * k, 10) for k in range(1, BEYOND + 1))
    return tuple(value for value in values if value <= LIMIT)


def best_coefficient(scores: Mapping[float, float]) -> float:
    """The one that scores best; ties go to the smaller."""
    return max(sorted(scores), key=lambda value: scores[value])


@dataclasses.dataclass(frozen=True)
class Validated:
    """An open rule with the coefficient that scores best on validation; ties go to the smaller.

    Args:
        rule: task arithmetic without a coefficient, by itself or inside transforms.
        grid: coefficients to try first, 0..1 by 0.05 as in the literature; beyond its largest value while that wins,
            up to 3.

    Source: Ilharco et al. 2023, section 2.
    """

    rule: Rule = dataclasses.field(default_factory=TaskArithmetic)
    grid: tuple[float, ...] = GRID

    def search(self, problem: Problem) -> Found:
        """Score all coefficients of the grid in one pass."""
        scores = climb(
            lambda values: problem.scores([with_coefficient(self.rule, value) for value in values]), self.grid
        )
        return _found(with_coefficient(self.rule, best_coefficient(scores)), scores, problem)


@dataclasses.dataclass(frozen=True)
class MetagptMultiplier:
    """MetaGPT with the multiplier that scores best on validation: Σλ is then no longer 1.

    Args:
        scope: of the norms, as in MetaGPT.
        grid: multipliers to try first; beyond its largest value while that wins.
    """

    scope: str = "model"
    grid: list | tuple = tuple(round(0.25 * step, 2) for step in range(1, 9))

    def __post_init__(self) -> None:
        Metagpt(self.scope)  # type: ignore[arg-type]
        if not self.grid or not all(isinstance(value, (int, float)) for value in self.grid):
            raise InputError(f"metagpt_multiplier.grid: expected numbers, at least one, got {list(self.grid)}")

    def search(self, problem: Problem) -> Found:
        """Score all multipliers of the grid in one pass."""

        def rule(value: float) -> Metagpt:
            return Metagpt(self.scope, value)  # type: ignore[arg-type]

        scores = climb(lambda values: problem.scores([rule(value) for value in values]), self.grid)
        return _found(rule(best_coefficient(scores)), scores, problem)


def climb(score: Callable[[Sequence[float]], Sequence[float]], grid: Sequence[float]) -> dict[float, float]:
    """The scores of the grid's coefficients, and of those beyond it that are tried while the largest one wins."""
    scores: dict[float, float] = {}
    while values := next_coefficients(scores, grid):
        scores |= dict(zip(values, score(values), strict=True))
    return scores


def _found(rule: Rule, scores: Mapping[float, float], problem: Problem) -> Found:
    seen = problem.num_samples()
    return Found(rule, {str(value): score for value, score in sorted(scores.items())}, seen, seen, float(len(scores)))
