"""TALL's mask thresholds, each task's chosen on its own validation samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fusionlab.errors import InputError
from fusionlab.rules import Tall, TaskKnownRule
from fusionlab.search.base import Found, Problem


@dataclass(frozen=True)
class ValidatedMasks:
    """TALL with the λ_t of each task that scores best on its own validation samples; ties go to the smaller.

    A task's mask is a matter of its own threshold alone, so that one pass over all tasks tries a value for each.

    Args:
        grid: thresholds that are all tried.

    Source: Localizing task information for improved model merging and compression, arXiv 2405.07813, section 4.
    """

    grid: list | tuple = field(default=(0.2, 0.3, 0.4, 0.5, 0.6))

    looks_at: ClassVar[str] = "labels"
    split: ClassVar[str] = "validation"
    needs_classes: ClassVar[bool] = False
    gives: ClassVar[type] = Tall

    def __post_init__(self) -> None:
        numbers = [value for value in self.grid if isinstance(value, int | float) and not isinstance(value, bool)]
        if not numbers or len(numbers) < len(self.grid) or min(numbers) <= 0:
            raise InputError(f"validated_masks.grid: expected positive numbers, got {self.grid!r}.")

    def search(self, problem: Problem) -> Found:
        """As many passes as there are thresholds."""
        values = sorted(dict.fromkeys(map(float, self.grid)))
        found = dict(zip(values, problem.scores_by_task([Tall(value) for value in values]), strict=True))
        chosen = {task: max(values, key=lambda value: found[value][task]) for task in problem.tasks}
        told = {f"{task} {value}": found[value][task] for task in problem.tasks for value in values}
        seen = problem.num_samples()
        return Found(Tall(chosen), told, seen, seen, float(len(values)))

    def expected_rows(self, num_samples: int) -> float:
        """All samples at every threshold."""
        return float(num_samples * len(self.grid))

    def expected_points(self, at_once: bool) -> float:
        """Every threshold."""
        return float(len(self.grid))


def completing(rule: Any) -> Any:
    """The rule or search itself; the search for TALL that has no thresholds."""
    return ValidatedMasks() if isinstance(rule, Tall) and rule.mask_threshold is None else rule


def knows_the_task(rule: Any) -> bool:
    """Whether a rule, or what a search gives, makes weights for each task."""
    return isinstance(rule, TaskKnownRule | ValidatedMasks)
