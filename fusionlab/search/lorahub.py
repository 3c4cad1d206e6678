"""LoraHub: a gradient-free search of one coefficient per task on a few labelled examples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from fusionlab.errors import InputError
from fusionlab.rules import TaskArithmetic
from fusionlab.search.base import Found, Problem


@dataclass(frozen=True)
class Lorahub:
    """θ₀ + Σ w_t τ_t with w minimising the loss on a few examples + regularization · mean|w|.

    Published as Σ w φ of raw factors; here of task vectors. Needs nevergrad.

    Args:
        budget: evaluations, the start at zero included.
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

    def _search(self, problem: Problem, nevergrad: Any) -> Found:
        start = nevergrad.p.Array(init=[0.0] * len(problem.tasks)).set_bounds(-self.bound, self.bound)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=start, budget=max(1, self.budget - 1))
        optimizer.parametrization.random_state.seed(self.seed)
        scores: dict[str, float] = {}
        best: tuple[float, dict[str, float]] | None = None
        for step in range(self.budget):
            asked = start if step == 0 else optimizer.ask()
            weights = {task: float(value) for task, value in zip(problem.tasks, asked.value, strict=True)}
            loss = problem.losses([TaskArithmetic(weights)], self.num_samples)[0]
            loss += self.regularization * sum(map(abs, weights.values())) / len(weights)
            if step > 0:
                optimizer.tell(asked, loss)
            scores[str(step)] = -loss
            if best is None or loss < best[0]:
                best = loss, weights
        assert best is not None
        seen = self.num_samples * len(problem.tasks)
        return Found(TaskArithmetic(best[1]), scores, seen, seen, float(self.budget))


def _nevergrad() -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise InputError(
            "lorahub needs nevergrad, which is not installed; install fusionlab[search], or choose another rule"
        ) from error
    return nevergrad
