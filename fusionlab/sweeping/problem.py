"""What a search may see of one subset of a sweep's tasks, and what it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusionlab.evaluation import to_device
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.rules import Rule
from fusionlab.state import State
from fusionlab.sweeping.scores import NOTHING, Cost
from fusionlab.sweeping.sources import Workbench


class SubsetProblem:
    """What a search may see of one subset: the validation splits.

    Args:
        tasks: the subset.
        finetuned: the run's weights.
        bench: module and data.
        score: the mean scores of rules by task, as points of the ledger.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        finetuned: Finetuned,
        bench: Workbench,
        score: Callable[[Sequence[Rule]], list[dict[str, float]]],
    ) -> None:
        self.tasks, self._finetuned, self._bench, self._score = tasks, finetuned, bench, score
        self._module, self._data = bench.module, bench.data
        self.cost: Cost = dict(NOTHING)  # of what it ran itself, without the points; seconds apart

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        """Mean validation score; each is a point of the ledger."""
        return [sum(values.values()) / len(values) for values in self._score(rules)]

    @torch.no_grad()
    def losses(self, rules: Sequence[Rule], num_samples: int) -> list[float]:
        """Mean loss on the first validation samples of each task."""
        found = []
        for rule in rules:
            started = time.monotonic()
            weights = self._finetuned.make(self._finetuned.plan(rule, self.tasks))
            self.cost["fuse_seconds"] += time.monotonic() - started
            with self._module.evaluation_context(), self._module.use(weights):
                batches = {task: self._first(task, num_samples) for task in self.tasks}
                losses = [self._module.loss(task, batch).item() for task, batch in batches.items()]
            for task, batch in batches.items():
                self._count(task, batch)
            found.append(sum(losses) / len(losses))
        return found

    def inputs(self, task: str, step: int, batch_size: int) -> dict[str, Any]:
        """The next validation samples, round and round."""
        split = self._data.splits[task]["validation"]
        indices = (torch.arange(batch_size) + step * batch_size) % len(split)
        return to_device(split.batch(indices), self._module.device)

    def task_vectors(self) -> dict[str, State]:
        """τ on the module's device."""
        device = self._module.device
        return {
            task: {name: value.to(device) for name, value in self._finetuned.task_vector(task).items()}
            for task in self.tasks
        }

    def logits(self, task: str, batch: dict[str, Any], task_vector: State) -> Tensor:
        """By the base plus the task vector, linearized where the fine-tuned models are."""
        self._count(task, batch)
        weights = self._finetuned.moved(self._bench.base, task_vector)
        with self._module.evaluation_context(), self._module.use(weights):
            if hasattr(self._module, "log_likelihoods"):
                return self._module.log_likelihoods(task, batch)
            return self._module.logits(task, batch["images"])

    def num_samples(self, limit: int | None = None) -> int:
        """Validation samples of the subset's tasks, of each one ``limit`` at most."""
        sizes = [len(self._data.splits[task]["validation"]) for task in self.tasks]
        return sum(size if limit is None else min(size, limit) for size in sizes)

    def _count(self, task: str, batch: dict[str, Any]) -> None:
        """Passes count tasks alike, whatever their size, as those of points do."""
        self.cost["passes"] += len(batch["index"]) / len(self._data.splits[task]["validation"]) / len(self._data.tasks)

    def _first(self, task: str, num_samples: int) -> dict[str, Any]:
        split = self._data.splits[task]["validation"]
        return to_device(split.batch(torch.arange(min(num_samples, len(split)))), self._module.device)
