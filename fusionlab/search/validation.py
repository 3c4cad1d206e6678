"""What a search may see of fine-tuned models and data: their validation splits, and what models it runs on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusionlab.adapters import base_state
from fusionlab.adapters.weights import Weights
from fusionlab.contracts import Batch, Data, Module
from fusionlab.data.tasks import without_classes
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation import linear_tasks, score_linear_sums
from fusionlab.evaluation.loop import Acting, count_batches, in_evaluation_mode, to_device
from fusionlab.evaluation.rows import Row, mean_score, primary_rows
from fusionlab.evaluation.scores import evaluate
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.rules import AnyRule, Rule, is_open
from fusionlab.search.base import Found, Running, Search
from fusionlab.search.coefficients import Validated
from fusionlab.search.training import TO_FIRST_ORDER, TrainingRuns, drawn_order
from fusionlab.search.wemoe import Wemoe, check_several
from fusionlab.tensors.masked import MaskedVectors
from fusionlab.tensors.state import State

Cost = dict[str, float]
NOTHING: Mapping[str, float] = {"seconds": 0.0, "fuse_seconds": 0.0, "passes": 0.0}


class ValidationProblem:
    """What a search may see of some tasks: the validation splits.

    On all ranks the same samples are run, so that all find the same.

    Args:
        tasks: the tasks to fuse.
        finetuned: the fine-tuned weights, of these tasks at least.
        module: a module whose tasks are prepared.
        data: a data module that is set up.
        rows: the validation rows of the model that each rule fuses, of the tasks; of a rule that needs the task, each
            under its own weights.
        training: the models on training inputs, where some of that is known already.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        finetuned: Finetuned,
        module: Module,
        data: Data,
        rows: Callable[[Sequence[AnyRule]], list[list[Row]]],
        training: TrainingRuns | None = None,
    ) -> None:
        self.tasks, self._finetuned, self._rows = tasks, finetuned, rows
        self._module, self._data, self._training = module, data, training
        self.cost: Cost = dict(NOTHING)
        """Of what it ran itself, without what ``score`` did; seconds of fusing only."""

    @property
    def at_once(self) -> bool:
        """Whether outputs add up on all of the tasks."""
        return scored_at_once(self._module, self.tasks, self._finetuned)

    @property
    def training(self) -> TrainingRuns:
        """The models on unlabelled training inputs."""
        if self._training is None:
            self._training = TrainingRuns(self._finetuned, self._module, self._data)
        return self._training

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        """Mean validation scores."""
        return [mean_score(primary_rows(found)) for found in self._rows(rules)]

    def scores_by_task(self, rules: Sequence[AnyRule]) -> list[dict[str, float]]:
        """Validation scores by task."""
        return [{row["task"]: mean_score([row]) for row in primary_rows(found)} for found in self._rows(rules)]

    def losses(self, rules: Sequence[Rule], num_samples: int) -> list[float]:
        """Mean loss on some validation samples of each task, drawn once: data may be sorted by class."""
        found = []
        batches = {task: [self._first(task, num_samples)] for task in self.tasks}
        for rule in rules:
            started = time.monotonic()
            weights = self._finetuned.make(self._finetuned.plan(rule, self.tasks))
            assert not isinstance(weights, MaskedVectors)
            self.cost["fuse_seconds"] += time.monotonic() - started
            found.append(self._mean_loss(weights, batches))
        return found

    def _mean_loss(self, weights: Weights, batches: Mapping[str, Sequence[Batch]]) -> float:
        def count(task: str, batch: Batch, losses: list[float]) -> None:
            losses.append(self._module.loss(task, batch).item())
            self._count(task, batch)

        with self._module.use(weights):
            counted = count_batches(
                self._module, {"": Acting(self.tasks)}, batches.__getitem__, lambda task: [], count, tasks=self.tasks
            )
        return sum(loss for [loss] in counted[""].values()) / len(self.tasks)

    def inputs(self, task: str, step: int, batch_size: int, split_name: str = "validation") -> Batch:
        """The next samples in an order that is drawn once, round and round."""
        split = self._data.splits[task][split_name]
        places = (torch.arange(batch_size) + step * batch_size) % len(split)
        return to_device(split.batch(drawn_order(task, len(split))[places]), self._module.device)

    def task_vectors(self) -> dict[str, State]:
        """τ on the module's device."""
        device = self._module.device
        return {
            task: {name: value.to(device) for name, value in self._finetuned.task_vector(task).items()}
            for task in self.tasks
        }

    def logits(self, task: str, batch: Batch, task_vector: State) -> Tensor:
        """By the base plus the task vector, linearized where the fine-tuned models are."""
        self._count(task, batch)
        weights = self._finetuned.moved(base_state(self._module.base_model), task_vector)
        with in_evaluation_mode(self._module), self._module.use(weights):
            return self._module.scored_classes(task, batch)[0]

    def num_samples(self, limit: int | None = None, split: str = "validation") -> int:
        """Samples of the tasks, of each one ``limit`` at most."""
        sizes = [len(self._data.splits[task][split]) for task in self.tasks]
        return sum(size if limit is None else min(size, limit) for size in sizes)

    def _count(self, task: str, batch: Batch) -> None:
        """Passes count tasks alike, whatever their size, as those of scores do."""
        self.cost["passes"] += len(batch["index"]) / len(self._data.splits[task]["validation"]) / len(self._data.tasks)

    def _first(self, task: str, num_samples: int) -> Batch:
        split = self._data.splits[task]["validation"]
        return split.batch(drawn_order(task, len(split))[:num_samples].sort().values)


def scored_at_once(module: Module, tasks: Sequence[str], finetuned: Finetuned) -> bool:
    """Whether many weighted sums are scored on the tasks at about the cost of one."""
    return set(linear_tasks(module, tasks, finetuned.weights)) >= set(tasks)


def validation_rows(
    module: Module,
    data: Data,
    finetuned: Finetuned,
    rules: Sequence[AnyRule],
    line: Callable[[Sequence[str]], AbstractContextManager[Any]] = lambda tasks: nullcontext(),
) -> list[list[Row]]:
    """The validation rows of the tasks under the model that each rule fuses, on all ranks together.

    Weighted sums of what acts linearly share one pass for each task vector; other models have one each.

    Args:
        module: a module whose tasks are prepared.
        data: a data module that is set up.
        finetuned: what is fused.
        rules: with all their coefficients.
        line: a progress line over the tasks, which gives the function to call after each batch.
    """
    plans = {str(number): finetuned.plan(rule, finetuned.tasks) for number, rule in enumerate(rules)}
    rows: dict[str, list[Row]] = {number: [] for number in plans}
    summed = linear_tasks(module, finetuned.tasks, finetuned.weights)
    sums = {number: (plan.by_task, summed, {}) for number, plan in plans.items() if plan.by_task is not None}
    if sums and summed:
        with line(summed) as advance:
            rows |= score_linear_sums(module, data, finetuned.weights, sums, "validation", on_batch=advance)
    for number, plan in plans.items():
        known = {row["task"] for row in rows[number]}
        if rest := [task for task in finetuned.tasks if task not in known]:
            with line(rest) as advance:
                for weights, tasks in finetuned.acting(plan, rest):
                    with module.use(weights):
                        rows[number] += evaluate(module, data, tasks, "validation", on_batch=advance)
    return list(rows.values())


def looks_at_data(rule: AnyRule | Search) -> bool:
    """Whether the rule is chosen on data: a search, or a rule whose coefficient is open."""
    return isinstance(rule, Search) or is_open(rule)


def complete(rule: AnyRule | Search, problem: ValidationProblem) -> Found:
    """The rule with all its coefficients: itself, or what is found for an open one or by a search."""
    if is_open(rule):
        rule = Validated(rule)
    return rule.search(problem) if isinstance(rule, Search) else Found(rule)


def check_data(rules: Mapping[str, AnyRule | Search], data: Data, methods: Iterable[str] = ()) -> None:
    """Refuse searches and open rules that these tasks, or models of these methods, give nothing to look at.

    Raises:
        InputError: a task has no samples in the split, or a score for its answer where a search looks at the
            probabilities of classes; or the models act to first order where a search looks at training inputs.
    """
    for split in ("validation", "train", "test"):
        looking = [name for name, rule in rules.items() if split_looked_at(rule) == split]
        empty = [task for task in data.tasks if not len(data.splits[task].get(split, ()))]
        if looking and empty:
            what = {"validation": "validation data", "train": "training inputs", "test": "test inputs"}[split]
            raise InputError(
                f"rules {name_list(looking)} look at {what}, and {name_list(empty)} has no {split} samples; "
                f"give a {split} split, or rules with all their coefficients"
            )
    classifying = [name for name, rule in rules.items() if isinstance(rule, Search) and rule.needs_classes]
    scores = without_classes(data.tasks)
    if classifying and scores:
        raise InputError(
            f"rules {name_list(classifying)} need tasks with classes or label words, and {name_list(scores)} has a "
            f"score as its answer, or a text; leave out one or the other"
        )
    running = [name for name, rule in rules.items() if isinstance(rule, Running)]
    linear = [method for method in dict.fromkeys(methods) if method in LINEARIZED_METHODS]
    if running and linear:
        what = f"rules {name_list(running)}: models of method {name_list(linear)}"
        raise InputError(TO_FIRST_ORDER.format(what=what))
    for name in (name for name, rule in rules.items() if isinstance(rule, Wemoe)):
        check_several(f"rule {name}", len(data.tasks))


def split_looked_at(rule: AnyRule | Search) -> str | None:
    """The split that a search or an open rule looks at; None for other rules."""
    if isinstance(rule, Search):
        return rule.split
    return "validation" if is_open(rule) else None
