"""Searches that look at data and return a rule with its coefficients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from fusionlab.rules import TaskArithmetic

GRID = tuple(round(0.05 * step, 2) for step in range(21))


def validated_coefficient(
    rule: TaskArithmetic, score: Callable[[TaskArithmetic], float], grid: Sequence[float] = GRID
) -> tuple[TaskArithmetic, dict[float, float]]:
    """The rule with the coefficient of the grid that scores best; ties go to the smaller coefficient.

    Args:
        rule: task arithmetic without a coefficient.
        score: the mean validation score of a rule with its coefficient; higher is better.
        grid: coefficients to try, 0..1 by 0.05 as in the literature.

    Returns:
        The rule with its coefficient, and the score of every coefficient.

    Source: Ilharco et al. 2023, section 2.
    """
    scores = {value: score(dataclasses.replace(rule, scaling_coefficient=value)) for value in grid}
    best = max(sorted(scores), key=lambda value: scores[value])
    return dataclasses.replace(rule, scaling_coefficient=best), scores
