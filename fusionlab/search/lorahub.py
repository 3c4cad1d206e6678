"""LoraHub: a gradient-free search of one coefficient per task on a few labelled examples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusionlab.errors import InputError
from fusionlab.rules import TaskArithmetic
from fusionlab.search.base import Found, Problem


@dataclass(frozen=True)
class Lorahub:
    """θ₀ + Σ w_t τ_t with w minimising the loss on a few examples + regularization · mean|w|.

    Published as Σ w φ of raw factors; here of task vectors. Needs nevergrad.

    Args:
        budget: models to evaluate at most, the start at zero included; none is evaluated twice.
        bound: w lies in ±bound.
        regularization: weight of mean|w|.
        num_samples: labelled validation samples of each task that the loss is taken on.
        seed: seed of the optimizer.

    Source: LoraHub, arXiv 2307.13269, section 3; settings of arXiv 2310.04742.
    """

    budget: int = 40
    bound: float = 1.5
    regularization: float = 0.05
    num_samples: int = 32
    seed: int = 42

    looks_at: ClassVar[str] = "labels"
    split: ClassVar[str] = "validation"
    needs_classes: ClassVar[bool] = False
    gives: ClassVar[type] = TaskArithmetic

    def __post_init__(self) -> None:
        if min(self.budget, self.num_samples) < 1 or self.bound <= 0:
            raise InputError(
                f"lorahub: budget, num_samples and bound must be positive, got {self.budget}, {self.num_samples}, "
                f"{self.bound}"
            )
        _nevergrad()

    def search(self, problem: Problem) -> Found:
        """Ask, score, tell; the best of all that were tried."""
        with (
            warnings.catch_warnings()
        ):  # for small budgets its optimizer is scipy's COBYLA, which corrects its settings
            warnings.filterwarnings("ignore", message="COBYLA")
            return self._search(problem, _nevergrad())

    def expected_rows(self, num_samples: int) -> float:
        """The samples that it draws, at every look."""
        return float(self.budget * min(self.num_samples, num_samples))

    def expected_points(self, at_once: bool) -> float:
        """None."""
        return 0.0

    def _search(self, problem: Problem, nevergrad: Any) -> Found:
        start = nevergrad.p.Array(init=[0.0] * len(problem.tasks)).set_bounds(-self.bound, self.bound)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=start, budget=self.budget)
        optimizer.parametrization.random_state.seed(self.seed)
        losses = {(0.0,) * len(problem.tasks): self._loss(problem, start.value)}
        for _ in range(self.budget):
            if len(losses) == self.budget:
                break
            asked = optimizer.ask()
            point = tuple(map(float, asked.value))
            if point not in losses:  # it begins with the start, and may come back to a point
                losses[point] = self._loss(problem, point)
            optimizer.tell(asked, losses[point])
        best = dict(zip(problem.tasks, min(losses, key=losses.__getitem__), strict=True))
        scores = {str(step): -loss for step, loss in enumerate(losses.values())}
        seen = problem.num_samples(self.num_samples)
        return Found(TaskArithmetic(best), scores, seen, seen, float(len(losses)))

    def _loss(self, problem: Problem, point: Sequence[float]) -> float:
        weights = {task: float(value) for task, value in zip(problem.tasks, point, strict=True)}
        penalty = self.regularization * sum(map(abs, weights.values())) / len(weights)
        return problem.losses([TaskArithmetic(weights)], self.num_samples)[0] + penalty


def _nevergrad() -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise InputError(
            "lorahub needs nevergrad, which is not installed; install fusionlab[search], or choose another rule"
        ) from error
    return nevergrad
