"""Fisher merging: every entry nearer to the models whose predictions it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusionlab.rules.weighted_by_fisher import WeightedByFisher
from fusionlab.search.base import Found, Problem, Training
from fusionlab.search.regmean import check_settings


@dataclass(frozen=True)
class Fisher:
    """Σ F̂_t θ_t / Σ F̂_t entry by entry, F̂_t = F_t + floor, F_t the mean of (∂ log p(y|x)/∂θ)² in task t's own model.

    Over unlabelled training inputs x, each y drawn from p(y|x) by a seeded generator: one forward and one backward pass
    each, of the input alone, sums in float64. Of tasks with label words p is over these words. Takes 8 bytes an entry
    and task. One task gives its own model.

    Args:
        num_samples: training inputs of each task, a fixed choice.
        floor: added to every F_t.
        seed: of the draws.

    Raises:
        InputError: numbers out of range, or (when searching) models that act to first order, or a task without classes.

    Source: Merging models with Fisher-weighted averaging, arXiv 2111.09832, section 3.
    """

    num_samples: int = 256
    floor: float = 1e-6
    seed: int = 0

    looks_at: ClassVar[str] = "unlabelled training inputs"
    split: ClassVar[str] = "train"
    needs_classes: ClassVar[bool] = True
    gives: ClassVar[type] = WeightedByFisher

    def __post_init__(self) -> None:
        check_settings("fisher", self.num_samples)
        WeightedByFisher(self.floor)

    def bytes_needed(self, training: Training) -> int:
        """Of the squares, and of a task vector with its gradient beside them."""
        return training.num_elements * (8 * training.num_tasks + 8)

    def search(self, problem: Problem) -> Found:
        """Run every task's own model over its inputs once, forward and backward."""
        training, tasks = problem.training, problem.tasks
        of_task = {task: training.expert_squared_gradients(task, self.num_samples, self.seed) for task in tasks}
        fishers = {
            unit: {task: of[unit] for task, of in of_task.items()}
            for unit in training.units(tasks)
            if unit in of_task[tasks[0]]
        }
        rule = WeightedByFisher.of(self.floor, fishers)
        return Found(rule, {}, training.num_samples(tasks, self.num_samples), 0, 1.0)

    def expected_rows(self, num_samples: int) -> float:
        """Its training inputs once, with gradients, each alone."""
        return 3.0 * self.num_samples

    def expected_points(self, at_once: bool) -> float:
        """None."""
        return 0.0
