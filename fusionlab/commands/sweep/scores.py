"""Scores of one run's fused models, each computed once: together where outputs add up, else a few models at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusionlab.adapters import Adapter
from fusionlab.adapters.weights import state_of
from fusionlab.evaluation import Candidate, score_candidates, tangent_shortcut
from fusionlab.evaluation.rows import primary_rows
from fusionlab.fusion.finetuned import Finetuned, Fused
from fusionlab.search.validation import NOTHING, Cost
from fusionlab.search.workbench import Workbench

BYTES_AT_ONCE, CANDIDATES_AT_ONCE = 1 << 29, 64
Wanted = tuple[Fused, Sequence[str]]


def added(first: Mapping[str, float], second: Mapping[str, float], share: float = 1.0) -> Cost:
    """``first`` and a share of ``second``, by name."""
    return {name: value + share * second[name] for name, value in first.items()}


class ModelScores:
    """Rows by model, split and task.

    A cost is seconds, seconds of them that fusing took, and passes of a model over all tasks' data.

    Args:
        finetuned: the run's weights.
        bench: module and data.
    """

    def __init__(self, finetuned: Finetuned, bench: Workbench) -> None:
        self._finetuned, self._bench = finetuned, bench
        self._rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
        self._shortcut = tangent_shortcut(bench.module, bench.data, finetuned)

    def rows(self, plan: Fused, split: str) -> dict[str, dict[str, Any]]:
        """What is known of a model, by task."""
        return self._rows.setdefault((split, plan.signature), {})

    @property
    def adds_up(self) -> bool:
        """Whether weighted sums cost next to nothing once each task vector was run."""
        return self._shortcut is not None

    def recall(self, plan: Fused, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what another process has scored."""
        known = self.rows(plan, split)
        for row in rows:
            known.setdefault(row["task"], {**row, "split": split})

    def score_together(self, wanted: Iterable[Wanted], split: str) -> Cost:
        """Score what adds up, all in one go, where that pays; returns the cost."""
        started = time.monotonic()
        shortcut = self._shortcut
        if shortcut is None:
            return dict(NOTHING)
        sums, plans = {}, {}
        for number, (plan, tasks) in enumerate(self._distinct(wanted, split)):
            summed = [task for task in tasks if task in shortcut.tasks]
            if plan.by_task is not None and summed:
                sums[str(number)], plans[str(number)] = (plan.by_task, summed, {}), plan
        if not sums or not shortcut.pays(sums):
            return dict(NOTHING)
        before = shortcut.passes
        for name, found in shortcut.score(sums, split).items():
            self._keep(plans[name], split, found)
        passes = (shortcut.passes - before) / len(self._finetuned.tasks)
        return {"seconds": time.monotonic() - started, "fuse_seconds": 0.0, "passes": passes}

    def score_apart(self, wanted: Iterable[Wanted], split: str) -> Cost:
        """Score what is not known yet by models of their own, in one pass over the data; returns the cost."""
        started = time.monotonic()
        plans = [each for each in self._distinct(wanted, split) if each[1]]
        models, of_model = {}, {}
        for plan, of in plans:
            for weights, tasks in self._finetuned.acting(plan, of):
                name = str(len(models))
                models[name], of_model[name] = Candidate(weights, tuple(tasks), {}), plan
        fusing = time.monotonic() - started
        for name, found in score_candidates(self._bench.module, self._bench.data, models, split).items():
            self._keep(of_model[name], split, found)
        passes = sum(len(each.tasks) for each in models.values()) / len(self._finetuned.tasks)
        return {"seconds": time.monotonic() - started, "fuse_seconds": fusing, "passes": passes}

    def first_chunk(self, wanted: Mapping[str, Wanted], split: str) -> list[str]:
        """The first points whose distinct models are few enough to be held at once; all, where none is held."""
        first = next(iter(wanted.values()))[0]
        size = max(1, min(CANDIDATES_AT_ONCE, BYTES_AT_ONCE // max(1, self._nbytes(first))))
        chosen: list[str] = []
        models: set[tuple[Any, ...]] = set()
        for key, (plan, tasks) in wanted.items():
            if any(task not in self.rows(plan, split) for task in tasks):
                models.add(plan.signature)
            if len(models) > size:
                break
            chosen.append(key)
        return chosen

    def _distinct(self, wanted: Iterable[Wanted], split: str) -> list[tuple[Fused, list[str]]]:
        """Every model once, with the tasks that it is not scored on yet."""
        found: dict[tuple[Any, ...], tuple[Fused, list[str]]] = {}
        for plan, tasks in wanted:
            missing = found.setdefault(plan.signature, (plan, []))[1]
            missing += [task for task in tasks if task not in self.rows(plan, split) and task not in missing]
        return list(found.values())

    def _keep(self, plan: Fused, split: str, found: Iterable[dict[str, Any]]) -> None:
        for row in primary_rows(found):
            self.rows(plan, split)[row["task"]] = row

    def _nbytes(self, plan: Fused) -> int:
        total = 0
        if plan.knows_the_task:  # dense weights for each task
            inputs = self._finetuned.inputs(plan.tasks)
            return 4 * len(plan.tasks) * sum(inputs.units.tensors[name].numel for name in inputs.touched)
        for weights in (self._finetuned.weights[task] for task in plan.tasks):
            if isinstance(weights, Adapter):
                total += sum(each.lora_a.nbytes + each.lora_b.nbytes for each in weights.factors.values())
            else:
                total += sum(tensor.nbytes for tensor in state_of(weights).values())
        return total
