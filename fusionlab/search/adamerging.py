"""AdaMerging: coefficients by entropy minimisation on unlabelled inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionlab.engine.planning import AVERAGED
from fusionlab.errors import InputError
from fusionlab.rules import TaskArithmetic
from fusionlab.search.base import Found, Problem
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class Adamerging:
    """θ₀ + Σ λ_t τ_t with λ minimising the entropy of the predictions on unlabelled validation inputs.

    Gradients go through the fused forward pass; λ is clamped to 0..1 after each step.

    Args:
        scope: one λ per ``task``, or one per task and parameter tensor (``layer``, as the paper calls it).
        num_steps: steps of Adam.
        learning_rate: of Adam.
        initial: λ to start from.
        batch_size: inputs in a batch; each task gives two batches a step.
        inputs: unlabelled inputs of the ``validation`` split, or as published of ``test``, which rows then say.

    Source: AdaMerging, arXiv 2310.02575, equations 3 to 5.
    """

    scope: Literal["task", "layer"] = "task"
    num_steps: int = 500
    learning_rate: float = 1e-3
    initial: float = 0.3
    batch_size: int = 16
    inputs: Literal["validation", "test"] = "validation"

    looks_at: ClassVar[str] = "unlabelled inputs"
    needs_classes: ClassVar[bool] = True
    gives: ClassVar[type] = TaskArithmetic

    def __post_init__(self) -> None:
        if self.scope not in ("task", "layer"):
            raise InputError(f"adamerging.scope: expected task or layer, got {self.scope!r}")
        if self.inputs not in ("validation", "test"):
            raise InputError(f"adamerging.inputs: expected validation or test, got {self.inputs!r}")
        if min(self.num_steps, self.batch_size) < 1 or self.learning_rate <= 0:
            raise InputError(
                f"adamerging: num_steps, batch_size and learning_rate must be positive, got {self.num_steps}, "
                f"{self.batch_size}, {self.learning_rate}"
            )

    @property
    def split(self) -> str:
        """The split whose inputs it looks at."""
        return self.inputs

    def search(self, problem: Problem) -> Found:
        """Descend; one update is the summed entropy of all tasks."""
        task_vectors, statistics = _apart(problem.task_vectors())
        names = list(dict.fromkeys(name for task_vector in task_vectors.values() for name in task_vector))
        columns = 1 if self.scope == "task" else len(names)
        device = next(iter(next(iter(task_vectors.values())).values())).device
        lambdas = torch.full((len(problem.tasks), columns), self.initial, requires_grad=True, device=device)
        optimizer = torch.optim.Adam([lambdas], lr=self.learning_rate)
        scores = {}
        for step in range(self.num_steps):
            optimizer.zero_grad()
            total = 0.0
            for task in problem.tasks:
                for half in range(2):
                    batch = problem.inputs(task, 2 * step + half, self.batch_size, self.inputs)
                    fused = _combine(lambdas, task_vectors, names, problem.tasks) | statistics
                    loss = entropy(problem.logits(task, batch, fused)) / 2
                    loss.backward()
                    total += loss.item()
            optimizer.step()
            with torch.no_grad():
                lambdas.clamp_(0.0, 1.0)
            scores[str(step)] = -total / len(problem.tasks)
        rule = self._rule(lambdas.detach().cpu(), names, problem.tasks)
        shown = 2 * self.num_steps * self.batch_size  # of each task, round and round
        seen = problem.num_samples(shown, self.inputs)
        looked_at = {} if self.inputs == "validation" else {"split": self.inputs}
        return Found(rule, scores, seen, 0, shown * len(problem.tasks) / seen, **looked_at)

    def expected_rows(self, num_samples: int) -> float:
        """Two batches a step, with gradients."""
        return 3.0 * 2 * self.num_steps * self.batch_size

    def expected_points(self, at_once: bool) -> float:
        """None."""
        return 0.0

    def _rule(self, lambdas: Tensor, names: list[str], tasks: tuple[str, ...]) -> TaskArithmetic:
        if self.scope == "task":
            return TaskArithmetic({task: float(value) for task, value in zip(tasks, lambdas[:, 0], strict=True)})
        by_name = {
            name: {task: float(value) for task, value in zip(tasks, lambdas[:, column], strict=True)}
            for column, name in enumerate(names)
        }
        return TaskArithmetic(0.0, by_name)


def entropy(logits: Tensor) -> Tensor:
    """Mean over the batch of −Σ p log p, a scalar.

    Example:
        >>> entropy(torch.zeros(3, 2))  # log 2
        tensor(0.6931)
    """
    log_p = logits.float().log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def _apart(task_vectors: dict[str, State]) -> tuple[dict[str, State], dict[str, Tensor]]:
    """What is weighed, and the mean of BatchNorm's running statistics, which a fused model has whatever the rule is."""
    weighed = {
        task: {name: value for name, value in vector.items() if not name.endswith(AVERAGED)}
        for task, vector in task_vectors.items()
    }
    summed: dict[str, Tensor] = {}
    for vector in task_vectors.values():
        for name, value in vector.items():
            if name.endswith(AVERAGED):
                summed[name] = summed[name] + value if name in summed else value
    return weighed, {name: value / len(task_vectors) for name, value in summed.items()}


def _combine(
    lambdas: Tensor, task_vectors: dict[str, State], names: list[str], tasks: tuple[str, ...]
) -> dict[str, Tensor]:
    combined: dict[str, Tensor] = {}
    for column, name in enumerate(names):
        for row, task in enumerate(tasks):
            if name in task_vectors[task]:
                term = lambdas[row, column if lambdas.shape[1] > 1 else 0] * task_vectors[task][name]
                combined[name] = combined[name] + term if name in combined else term
    return combined
