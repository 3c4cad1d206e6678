"""The coefficient that validation chooses."""

from fusionlab.rules import TaskArithmetic
from fusionlab.search import GRID, validated_coefficient


def test_best_of_the_grid_and_the_smaller_of_equals() -> None:
    scores = {value: -abs(value - 0.375) for value in GRID}
    rule, tried = validated_coefficient(TaskArithmetic(), lambda rule: round(scores[rule.scaling_coefficient], 6))
    assert rule.scaling_coefficient == 0.35
    assert list(tried) == list(GRID)
    assert len(GRID) == 21
    assert (GRID[0], GRID[1], GRID[-1]) == (0.0, 0.05, 1.0)
