"""The points of one run: looked up in the ledger, or computed many at a time and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusionlab.commands.sweep.choosing import NotScoredError
from fusionlab.commands.sweep.identity import SCHEMA, Point, RunIdentity
from fusionlab.commands.sweep.ledger import Ledger
from fusionlab.commands.sweep.models import KnownModels
from fusionlab.commands.sweep.scores import ModelScores, added
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.evaluation import Candidate, score_candidates
from fusionlab.evaluation.rows import Row, primary_rows
from fusionlab.fusion.finetuned import Finetuned, Fused
from fusionlab.keys import FORMULAS, plain
from fusionlab.layout import MODELS
from fusionlab.memory import peak_bytes
from fusionlab.rules import AnyRule, TaskArithmetic, from_config, to_config
from fusionlab.search import Found, Running, Search, TrainingRuns, ValidationProblem
from fusionlab.search import to_config as search_config
from fusionlab.search.validation import NOTHING, Cost
from fusionlab.search.workbench import Workbench

PointOf = Callable[[str, AnyRule, tuple[str, ...]], Point]
"""Gives the point of a rule's name, the rule and a subset."""


class RunWorker:
    """Computes and records the points of one run; the module must have that run's heads then (:meth:`begin`).

    Args:
        source: the run.
        finetuned: its weights.
        identity: the keys of its points.
        bench: module and data.
        ledger: where records are.
        advance: called with the number of points that were recorded, or found.
    """

    def __init__(
        self,
        source: RunSource,
        finetuned: Finetuned,
        identity: RunIdentity,
        bench: Workbench,
        ledger: Ledger,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.source, self.finetuned, self.bench, self.ledger, self.advance = source, finetuned, bench, ledger, advance
        self.identity = identity
        self._models, self._known = ModelScores(finetuned, bench), KnownModels(Ledger(ledger.folder / MODELS), identity)
        self._spent: Cost = dict(NOTHING)  # on points
        self._training: TrainingRuns | None = None

    def begin(self) -> None:
        """Let the module score with the run's heads."""
        self.bench.module.read_run(self.source.folders, self.bench.data.tasks)

    def score(self, points: Sequence[Point]) -> list[list[Row]]:
        """Each point's rows, one of each scored task, from the ledger or computed."""
        keys = [self.identity.of_point(point) for point in points]
        records = {key: self.ledger.get(key) for key in keys}
        self.advance(sum(record is not None for record in records.values()))
        missing = {key: point for key, point in zip(keys, points, strict=True) if records[key] is None}
        for split in dict.fromkeys(point.split for point in missing.values()):
            records |= self._compute({key: point for key, point in missing.items() if point.split == split}, split)
        return [records[key]["values"] for key in keys]  # type: ignore[index]

    def known(self, points: Sequence[Point]) -> list[list[Row]]:
        """Each point's rows from the ledger.

        Raises:
            NotScoredError: one is not there.
        """
        found = []
        for key in map(self.identity.of_point, points):
            record = self.ledger.get(key)
            if record is None:
                raise NotScoredError(key)
            found.append(record["values"])
        return found

    def single_task(self, singles: Ledger) -> dict[str, float]:
        """What each fine-tuned model scores on its own task's test split, by the first metric.

        Args:
            singles: the ledger of these scores, which is another than that of points.
        """
        keys = {task: self.identity.of_single(task) for task in self.finetuned.tasks}
        missing = [task for task, key in keys.items() if singles.get(key) is None]
        for task, row in self._single_rows(missing).items():
            record = {"schema": SCHEMA, "kind": "single", "method": self.source.method, "seed": self.source.seed}
            singles.put(keys[task], record | {"values": [self._value(row)]})
        records = {task: singles.get(key) for task, key in keys.items()}
        return {task: record["values"][0]["value"] for task, record in records.items()}  # type: ignore[index]

    def _single_rows(self, tasks: Sequence[str]) -> dict[str, Row]:
        """By task. Where outputs add up, the passes are those that points need: each task vector whole, alone."""
        plans = {task: self.finetuned.plan(TaskArithmetic(1.0), (task,)) for task in tasks}
        self._models.score_together(((plan, [task]) for task, plan in plans.items()), "test")
        found = {task: self._models.rows(plan, "test").get(task) for task, plan in plans.items()}
        rows = {task: row for task, row in found.items() if row is not None}
        models = {task: Candidate(self.finetuned.weights[task], (task,), {}) for task in tasks if task not in rows}
        scored = score_candidates(self.bench.module, self.bench.data, models, "test") if models else {}
        return rows | {task: row for task, of in scored.items() for row in primary_rows(of)}

    def _value(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a record keeps of a result row."""
        kept = ("task", "metric", "value", "num_samples", "data_version", "higher_is_better", "stderr", "precision")
        return {field: row[field] for field in kept} | {"scored_by": self.identity.scored_by(row["task"], row["split"])}

    def search(self, rule_name: str, search: Search, subset: tuple[str, ...], point: PointOf) -> Point:
        """The point of what the search finds for a subset, from the ledger or searched.

        Statistics that a rule carries are in no ledger; they are found again where the point is not there yet.
        """
        key = self.identity.of_search(search, subset)
        record, fresh = self.ledger.get(key), None
        if record is not None and record["rule"] != rule_name:  # found under another name: tables go by names
            key = self.identity.of_renamed_search(search, subset, rule_name)
            self.ledger.put(key, {**record, "key": key, "rule": rule_name})
        elif record is None:
            fresh, cost = self._search(rule_name, search, subset)
            self.ledger.put(key, self._search_record(rule_name, subset, search, fresh, cost))
            record = self.ledger.get(key)
        assert record is not None
        self.advance(1)
        found = point(rule_name, from_config(record["rule_config"]), subset)
        if isinstance(search, Running) and self.ledger.get(self.identity.of_point(found)) is None:
            fresh = fresh or self._search(rule_name, search, subset)[0]
            found = point(rule_name, fresh.rule, subset)
        return found

    def _search(self, rule_name: str, search: Search, subset: tuple[str, ...]) -> tuple[Found, Cost]:
        def rows(rules: Sequence[AnyRule]) -> list[list[Row]]:
            return self.score([validation_point(rule_name, rule, subset) for rule in rules])

        if isinstance(search, Running) and self._training is None:
            self._training = TrainingRuns(self.finetuned, self.bench.module, self.bench.data)
        training = self._training
        problem = ValidationProblem(subset, self.finetuned, self.bench.module, self.bench.data, rows, training)
        started, before = time.monotonic(), self._spent["seconds"]
        trained = 0.0 if training is None else training.cost
        found = search.search(problem)
        seconds = time.monotonic() - started - (self._spent["seconds"] - before)  # its points tell theirs themselves
        passes = problem.cost["passes"] + (0.0 if training is None else training.cost - trained)
        return found, problem.cost | {"seconds": seconds, "passes": passes}

    def _compute(self, points: Mapping[str, Point], split: str) -> dict[str, dict[str, Any]]:
        plans = {key: self.finetuned.plan(point.rule, point.subset) for key, point in points.items()}
        for key, point in points.items():
            self._models.recall(plans[key], split, self._known.rows(plans[key], split, point.scored))
        waiting = {key: (plans[key], point.scored) for key, point in points.items()}
        together = self._models.score_together(waiting.values(), split)
        self._spent = added(self._spent, together)
        recorded: dict[str, dict[str, Any]] = {}
        while waiting:
            chunk = self._models.first_chunk(waiting, split)
            apart = self._models.score_apart([waiting.pop(key) for key in chunk], split)
            self._spent = added(self._spent, apart)
            cost = added(added(NOTHING, together, 1 / len(points)), apart, 1 / len(chunk))
            for key in chunk:
                recorded[key] = self._record(key, points[key], plans[key], cost)
            self.advance(len(chunk))
        return recorded

    def _record(self, key: str, point: Point, plan: Fused, cost: Cost) -> dict[str, Any]:
        known = self._models.rows(plan, point.split)
        values = {task: self._value(known[task]) for task in point.scored}
        record = {
            "schema": SCHEMA,
            "formulas": FORMULAS,
            "kind": "point",
            "method": self.source.method,
            "seed": self.source.seed,
            "rule": point.rule_name,
            "rule_config": plain(to_config(point.rule)),
            "scaling_coefficients": plan.scaling_coefficients,
            "fused_tasks": list(point.subset),
            "split": point.split,
            "values": list(values.values()),
            "cost": cost | {"peak_bytes": peak_bytes()},
        } | self.identity.space
        if plan.knows_the_task:
            record["task_known"] = True
        self.ledger.put(key, record)
        if not self._models.adds_up:
            self._known.keep(plan, point.split, point.scored, values)
        return record

    def _search_record(
        self, rule_name: str, subset: tuple[str, ...], search: Search, found: Found, cost: Cost
    ) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "formulas": FORMULAS,
            "kind": "search",
            "method": self.source.method,
            "seed": self.source.seed,
            "rule": rule_name,
            "search": search_config(search),
            "rule_config": plain(to_config(found.rule)),
            "fused_tasks": list(subset),
            "scores": found.scores,
            **found.figures,
            "cost": cost | {"peak_bytes": peak_bytes()},
        } | self.identity.space


def validation_point(rule_name: str, rule: AnyRule, subset: tuple[str, ...]) -> Point:
    """What a choice of a rule for a subset looks at."""
    return Point(rule_name, rule, subset, "validation", subset)
