"""WEMoE: MLPs whose task vectors a router weighs for every sample, trained on inputs without labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fusionlab.errors import InputError
from fusionlab.rules.routed import RoutedMlp, RoutedMlps, Router
from fusionlab.samplers import derive_seed
from fusionlab.search.adamerging import entropy
from fusionlab.search.base import Found, Problem, Training


@dataclass(frozen=True)
class Wemoe:
    """Every MLP as θ₀ + Σ w_t τ_t, w_t of each sample by a router on what the MLP reads; all else task arithmetic.

    w is the mean over the tokens of one sample (padding left out) of an affine map, or of two with a ReLU between, of
    each token; never over a batch. It begins at λ for every task. Trained are the routers alone, on the entropy of the
    predictions: over classes, or of text models over label words, so that these alone are taken. A text model's sample
    is its prompt: the text that T5's encoder reads and what its decoder starts with, the tokens before an answer of a
    causal model; whole texts (perplexity) have none and are refused. Routed are modules called mlp, DenseReluDense
    (T5), feed_forward or ffn with all their linear layers, two or three, Conv1D too; those with experts of their own
    are left alone. A layer costs the base's product and one of each task, (T + 1) times the MLP, of adapters two of
    rank T·rank; memory is that of the task vectors of the MLPs, low-rank where adapters were trained.

    Args:
        num_steps: steps of Adam; each takes one batch of every task.
        learning_rate: of Adam.
        scaling_coefficient: λ.
        batch_size: inputs in a batch.
        num_layers: affine maps of a router: 1, or 2 with as many hidden numbers as the MLP reads.
        inputs: unlabelled inputs of the ``train`` split, or as published of ``test``, which rows then say.
        seed: of the routers.

    Raises:
        InputError: numbers out of range, or (when searching) one task, models that act to first order, no MLP that was
            trained, or a task without classes.

    Source: Merging multi-task models via weight-ensembling mixture of experts, arXiv 2402.00433, section 3.
    """

    num_steps: int = 1000
    learning_rate: float = 1e-3
    scaling_coefficient: float = 0.3
    batch_size: int = 16
    num_layers: Literal[1, 2] = 2
    inputs: Literal["train", "test"] = "train"
    seed: int = 0

    looks_at: ClassVar[str] = "unlabelled training inputs"
    needs_classes: ClassVar[bool] = True
    gives: ClassVar[type] = RoutedMlps

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch_size) < 1 or self.learning_rate <= 0:
            raise InputError(
                f"wemoe: num_steps, batch_size and learning_rate must be positive, got {self.num_steps}, "
                f"{self.batch_size}, {self.learning_rate}"
            )
        for name, known in (("num_layers", (1, 2)), ("inputs", ("train", "test"))):
            if getattr(self, name) not in known:
                raise InputError(f"wemoe.{name}: expected {known[0]} or {known[1]}, got {getattr(self, name)!r}")

    @property
    def split(self) -> str:
        """The split whose inputs it looks at."""
        return self.inputs

    def bytes_needed(self, training: Training) -> int:
        """Of the task vectors beside one another, the fused rest, and the routers with Adam's moments."""
        routers = sum(each.width * (training.num_tasks + each.width) for each in training.mlps().values())
        return 4 * training.num_elements * (training.num_tasks + 1) + 16 * routers

    def search(self, problem: Problem) -> Found:
        """Descend; one update is the summed entropy of all tasks."""
        training, tasks = problem.training, problem.tasks
        rule = self.start(training, tasks)
        parameters = [value for mlp in rule.mlps.values() for value in mlp.router.tensors.values()]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        scores = {}
        with training.routed(rule, self.inputs) as logits:
            for step in range(self.num_steps):
                total = 0.0
                optimizer.zero_grad()
                for task in tasks:
                    loss = entropy(logits(task, step, self.batch_size))
                    loss.backward()
                    total += loss.item()
                optimizer.step()
                scores[str(step)] = -total / len(tasks)
        shown = self.num_steps * self.batch_size  # of each task, round and round
        seen = training.num_samples(tasks, shown, self.inputs)
        looked_at = {} if self.inputs == "train" else {"split": self.inputs}
        return Found(self.found(rule), scores, seen, 0, shown * len(tasks) / seen, **looked_at)

    def start(self, training: Training, tasks: tuple[str, ...]) -> RoutedMlps:
        """The rule with routers that give λ, ready to be trained.

        Raises:
            InputError: one task, or no MLP that was trained.
        """
        check_several("wemoe", len(tasks))
        mlps = {}
        for name, mlp in training.mlps(tasks).items():
            seed = derive_seed("wemoe", self.seed, name)
            router = Router.constant(self.scaling_coefficient, len(tasks), mlp.width, self.num_layers, seed)
            mlps[name] = RoutedMlp(mlp.layers, router.to(training.device))
            for value in mlps[name].router.tensors.values():
                value.requires_grad_()
        return RoutedMlps(self.scaling_coefficient, mlps=mlps, tasks=tasks)

    def found(self, rule: RoutedMlps) -> RoutedMlps:
        """The rule with its routers as they are now, on the CPU and without gradient."""
        mlps = {}
        for name, mlp in rule.mlps.items():
            tensors = {part: value.detach().cpu().clone() for part, value in mlp.router.tensors.items()}
            mlps[name] = replace(mlp, router=Router.of(tensors))
        return RoutedMlps.of(self.scaling_coefficient, mlps, rule.tasks)

    def expected_rows(self, num_samples: int) -> float:
        """A batch a step, with gradients."""
        return 3.0 * self.num_steps * self.batch_size

    def expected_points(self, at_once: bool) -> float:
        """None."""
        return 0.0


def check_several(name: str, num_tasks: int) -> None:
    """Raise if there is one task only, whose experts there is nothing to weigh against.

    Raises:
        InputError: with the number.
    """
    if num_tasks < 2:
        raise InputError(f"{name} weighs the experts of several tasks, got {num_tasks}; give two tasks or more")
