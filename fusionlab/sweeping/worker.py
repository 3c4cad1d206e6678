"""The points of one run: looked up in the ledger, or computed many at a time and recorded."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusionlab.candidates import Candidate, Finetuned, Fused, score_candidates, tangent_shortcut
from fusionlab.evaluation import primary_rows, to_device
from fusionlab.linearize import LinearizedState
from fusionlab.rules import Rule, to_config
from fusionlab.search import Found, Search
from fusionlab.search import to_config as search_config
from fusionlab.state import State
from fusionlab.sweeping.ledger import Ledger, key_of
from fusionlab.sweeping.sources import RunSource, Workbench

SCHEMA = 1
BYTES_AT_ONCE, CANDIDATES_AT_ONCE = 1 << 29, 64


@dataclass(frozen=True)
class Point:
    """A fused model on a split.

    Args:
        rule_name: what tables call the rule.
        rule: with all its coefficients.
        subset: the fused tasks.
        split: ``validation`` or ``test``.
        scored: the tasks it is scored on.
    """

    rule_name: str
    rule: Rule
    subset: tuple[str, ...]
    split: str
    scored: tuple[str, ...]


class RunWorker:
    """Computes and records the points of one run.

    Args:
        source: the run.
        finetuned: its weights.
        bench: module and data.
        ledger: where records are.
        advance: called with the number of points that were recorded, or found.
    """

    def __init__(
        self,
        source: RunSource,
        finetuned: Finetuned,
        bench: Workbench,
        ledger: Ledger,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.source, self.finetuned, self.bench, self.ledger, self.advance = source, finetuned, bench, ledger, advance
        self.hashes = {task: finetuned.hash(task) for task in finetuned.tasks}
        self._space = {} if finetuned.space == "delta_weight" else {"space": finetuned.space}
        beside = bench.module.read_run(source.folders, bench.data.tasks)
        self._beside = {"beside": beside} if beside else {}
        self._scores: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._spent = {"fuse_seconds": 0.0, "passes": 0.0}
        self._tangents = tangent_shortcut(bench.module, bench.data, finetuned)

    def score(self, points: Sequence[Point]) -> list[dict[str, float]]:
        """Each point's value by scored task, from the ledger or computed."""
        keys = [key_of(self._identity(point)) for point in points]
        records = {key: self.ledger.get(key) for key in keys}
        self.advance(sum(record is not None for record in records.values()))
        missing = {key: point for key, point in zip(keys, points, strict=True) if records[key] is None}
        for split in dict.fromkeys(point.split for point in missing.values()):
            records |= self._compute({key: point for key, point in missing.items() if point.split == split}, split)
        return [{row["task"]: row["value"] for row in records[key]["values"]} for key in keys]  # type: ignore[index]

    def search(self, rule_name: str, search: Search, subset: tuple[str, ...]) -> Rule:
        """What the search finds for a subset, from the ledger or searched."""
        from fusionlab.rules import from_config

        problem = SubsetProblem(self, rule_name, subset)
        identity = self._common(subset, "validation", subset) | {"search": search_config(search)}
        key = key_of(identity)
        record = self.ledger.get(key)
        if record is not None and record["rule"] != rule_name:  # found under another name: tables go by names
            key = key_of(identity | {"rule_name": rule_name})
            self.ledger.put(key, {**record, "key": key, "rule": rule_name})
        elif record is None:
            started, before = time.monotonic(), dict(self._spent)
            found = search.search(problem)
            cost = {name: value - before[name] for name, value in self._spent.items()}  # of the points that it scored
            cost["passes"] += problem.samples_run / problem.num_samples_of_all
            cost |= {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
            self.ledger.put(key, self._search_record(rule_name, subset, search, found, cost))
            record = self.ledger.get(key)
        assert record is not None
        self.advance(1)
        return from_config(record["rule_config"])

    def _compute(self, points: Mapping[str, Point], split: str) -> dict[str, dict[str, Any]]:
        plans = {key: self.finetuned.plan(point.rule, point.subset) for key, point in points.items()}
        recorded: dict[str, dict[str, Any]] = {}
        waiting = dict(points)
        while waiting:
            chunk = self._next_chunk({key: (plans[key], waiting[key]) for key in waiting})
            cost = self._score_models({key: plans[key] for key in chunk}, points, split)
            self._spent = {name: value + cost[name] for name, value in self._spent.items()}
            shared = {name: value / len(chunk) for name, value in cost.items()} | {"peak_bytes": peak_bytes()}
            for key in chunk:
                recorded[key] = self._record(key, points[key], plans[key], shared)
                del waiting[key]
            self.advance(len(chunk))
        return recorded

    def _next_chunk(self, waiting: Mapping[str, tuple[Fused, Point]]) -> list[str]:
        """The next points whose distinct models are few enough to be held at once; all, where none is held."""
        first = next(iter(waiting.values()))[0]
        size = max(1, min(CANDIDATES_AT_ONCE, BYTES_AT_ONCE // max(1, self._nbytes(first))))
        chosen: list[str] = []
        models: set[tuple[Any, ...]] = set()
        for key, (plan, point) in waiting.items():
            if set(point.scored) - set(self._by_shortcut(plan)):
                models.add(plan.signature)
            if len(models) > size:
                break
            chosen.append(key)
        return chosen

    def _nbytes(self, plan: Fused) -> int:
        total = 0
        for task in plan.tasks:
            weights = self.finetuned.weights[task]
            state = getattr(weights, "state", weights)
            tensors = (
                [tensor for each in weights.factors.values() for tensor in (each.lora_a, each.lora_b)]  # type: ignore[union-attr]
                if hasattr(weights, "factors") else list(state.values())
            )  # fmt: skip
            total += sum(tensor.nbytes for tensor in tensors)
        return total

    def _by_shortcut(self, plan: Fused) -> tuple[str, ...]:
        """The tasks on which the model is scored together with others of its kind."""
        return () if self._tangents is None or plan.by_task is None else self._tangents.tasks

    def _score_models(self, plans: Mapping[str, Fused], points: Mapping[str, Point], split: str) -> dict[str, float]:
        """Fill ``_scores`` for every (split, model, task) that the points need; equal models are scored once.

        Returns:
            the cost in all: seconds, seconds of them that fusing took, and passes of a model over the tasks' data.
        """
        started = time.monotonic()
        needed: dict[tuple[Any, ...], tuple[Fused, list[str]]] = {}
        for key, plan in plans.items():
            tasks = needed.setdefault(plan.signature, (plan, []))[1]
            known = self._scores.setdefault((split, plan.signature), {})
            tasks += [task for task in points[key].scored if task not in known and task not in tasks]
        names = {str(number): signature for number, signature in enumerate(needed)}
        short, direct = {}, {}
        for name, (plan, tasks) in zip(names, needed.values(), strict=True):
            together = [task for task in tasks if task in self._by_shortcut(plan)]
            apart = tuple(task for task in tasks if task not in together)
            if together:
                short[name] = (plan.by_task or {}, together, {})
            if apart:
                direct[name] = Candidate(self.finetuned.make(plan), apart, {})
        fusing = time.monotonic() - started
        rows = score_candidates(self.bench.module, self.bench.data, direct, split) if direct else {}
        passes = sum(len(each.tasks) for each in direct.values()) / len(self.finetuned.tasks)
        if self._tangents is not None and short:
            before = self._tangents.passes
            for name, found in self._tangents.score(short, split).items():
                rows[name] = rows.get(name, []) + found
            passes += (self._tangents.passes - before) / len(self.finetuned.tasks)
        for name, found in rows.items():
            for row in primary_rows(found):
                self._scores[split, names[name]][row["task"]] = row
        return {"seconds": time.monotonic() - started, "fuse_seconds": fusing, "passes": passes}

    def _record(self, key: str, point: Point, plan: Fused, cost: dict[str, float]) -> dict[str, Any]:
        known = self._scores[point.split, plan.signature]
        kept = ("task", "metric", "value", "num_samples", "data_version")
        record = {
            "schema": SCHEMA,
            "kind": "point",
            "method": self.source.method,
            "seed": self.source.seed,
            "rule": point.rule_name,
            "rule_config": plain(to_config(point.rule)),
            "scaling_coefficients": plan.scaling_coefficients,
            "fused_tasks": list(point.subset),
            "split": point.split,
            "values": [{field: known[task][field] for field in kept} for task in point.scored],
            "cost": cost,
        } | self._space
        self.ledger.put(key, record)
        return record

    def _search_record(
        self, rule_name: str, subset: tuple[str, ...], search: Search, found: Found, cost: dict[str, float]
    ) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "search",
            "method": self.source.method,
            "seed": self.source.seed,
            "rule": rule_name,
            "search": search_config(search),
            "rule_config": plain(to_config(found.rule)),
            "fused_tasks": list(subset),
            "scores": found.scores,
            "num_samples": found.num_samples,
            "num_labels": found.num_labels,
            "passes": found.passes,
            "cost": cost,
        } | self._space

    def _identity(self, point: Point) -> dict[str, Any]:
        common = self._common(point.subset, point.split, point.scored)
        return common | {"rule_name": point.rule_name, "rule": plain(to_config(point.rule))}

    def _common(self, subset: Sequence[str], split: str, scored: Sequence[str]) -> dict[str, Any]:
        return (
            {
                "schema": SCHEMA,
                "run": [self.source.method, self.source.seed],
                "base": self.bench.base_hash,
                "finetuned": [[task, self.hashes[task]] for task in subset],
                "split": split,
                "data": {task: self.bench.data.splits[task][split].data_version for task in scored},
                "eval_batch_size": self.bench.data.eval_batch_size,
            }
            | self._space
            | self._beside
        )


class SubsetProblem:
    """What a search may see of one subset: the validation splits.

    Args:
        worker: of the run.
        rule_name: what tables call the search.
        tasks: the subset.
    """

    def __init__(self, worker: RunWorker, rule_name: str, tasks: tuple[str, ...]) -> None:
        self._worker, self._rule_name, self.tasks = worker, rule_name, tasks
        self._module, self._data = worker.bench.module, worker.bench.data
        self.samples_run = 0  # through a fused model, the points of the ledger apart

    def scores(self, rules: Sequence[Rule]) -> list[float]:
        """Mean validation score; each is a point of the ledger."""
        points = [Point(self._rule_name, rule, self.tasks, "validation", self.tasks) for rule in rules]
        return [sum(values.values()) / len(values) for values in self._worker.score(points)]

    @torch.no_grad()
    def losses(self, rules: Sequence[Rule], num_samples: int) -> list[float]:
        """Mean loss on the first validation samples of each task."""
        found = []
        for rule in rules:
            weights = self._worker.finetuned.make(self._worker.finetuned.plan(rule, self.tasks))
            with self._module.evaluation_context(), self._module.use(weights):
                batches = {task: self._first(task, num_samples) for task in self.tasks}
                losses = [self._module.loss(task, batch).item() for task, batch in batches.items()]
            self.samples_run += sum(len(batch["index"]) for batch in batches.values())
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
            task: {name: value.to(device) for name, value in self._worker.finetuned.task_vector(task).items()}
            for task in self.tasks
        }

    def logits(self, task: str, batch: dict[str, Any], task_vector: State) -> Tensor:
        """By the base plus the task vector, linearized where the fine-tuned models are."""
        self.samples_run += len(batch["index"])
        base = self._worker.bench.base
        state = {name: base[name] + value for name, value in task_vector.items()}
        weights = LinearizedState(state) if self._worker.finetuned.is_linearized else state
        with self._module.evaluation_context(), self._module.use(weights):
            if hasattr(self._module, "log_likelihoods"):
                return self._module.log_likelihoods(task, batch)
            return self._module.logits(task, batch["images"])

    def num_samples(self, split: str = "validation") -> int:
        """Samples of the subset's tasks."""
        return sum(len(self._data.splits[task][split]) for task in self.tasks)

    @property
    def num_samples_of_all(self) -> int:
        """Validation samples of all tasks, the subset's and the others: what a pass goes over."""
        return sum(len(splits["validation"]) for splits in self._data.splits.values())

    def _first(self, task: str, num_samples: int) -> dict[str, Any]:
        split = self._data.splits[task]["validation"]
        return to_device(split.batch(torch.arange(min(num_samples, len(split)))), self._module.device)


def peak_bytes() -> int:
    """The most memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive parts of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def plain(value: Any) -> Any:
    """As JSON has it: mappings as dicts, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
