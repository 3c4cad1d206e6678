"""Fused models as the callback makes them, and how they are scored, told in rows and logged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import Trainer

from fusionlab import search
from fusionlab.callbacks.progress import FusionProgressBar
from fusionlab.contracts import Data, Module
from fusionlab.evaluation.loop import rank_and_world_size
from fusionlab.evaluation.rows import Row
from fusionlab.evaluation.scores import evaluate
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.fused import FusedModel
from fusionlab.samplers import FirstSamples


@dataclasses.dataclass(frozen=True)
class Made:
    """A fused model, what was found for it, and further fields of its rows."""

    model: FusedModel
    found: search.Found
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores weights on tasks, with a progress line."""

    module: Module
    data: Data
    progress: Any

    def __call__(self, what: str, weights: Any, tasks: list[str], split: str, **labels: Any) -> list[Row]:
        with self.module.use(weights), self._line(what, tasks, split) as advance:
            return evaluate(self.module, self.data, tasks, split, on_batch=advance, **labels)

    def problem(self, what: str, finetuned: Finetuned) -> search.ValidationProblem:
        """What a search may see; the models of its rules are scored on validation by all ranks together."""
        line = partial(self._line, what, split="validation")
        rows = partial(search.validation_rows, self.module, self.data, finetuned, line=line)
        return search.ValidationProblem(finetuned.tasks, finetuned, self.module, self.data, rows)

    def _line(self, what: str, tasks: Sequence[str], split: str) -> Any:
        if not isinstance(self.progress, FusionProgressBar):
            return nullcontext()
        rank, world_size = rank_and_world_size()
        batches = sum(len(range(rank, self.data.num_eval_batches(task, split), world_size)) for task in tasks)
        return self.progress.scoring(f"scoring {what} on {split}", batches)


def with_bounds_of_choice(rows: list[Row], data: Data) -> list[Row]:
    """The rows, which say so where the coefficient was chosen on a part of the validation samples."""
    bounds = [
        f"{task} {split.limited}"
        for task, splits in data.splits.items()
        if isinstance(split := splits["validation"], FirstSamples)
    ]
    if not bounds:
        return rows
    chosen = f"the coefficient is chosen on a part of validation ({'; '.join(bounds)})"
    return [{**row, "limited": "; ".join(filter(None, (row.get("limited"), chosen)))} for row in rows]


def row_of(rule: str, made: Made, tasks: Sequence[str]) -> Row:
    """What a row says of a fused model."""
    row = {"model": "fused", "rule": rule, "fused_tasks": tasks, "task_known": bool(made.model.masks)}
    searched = made.found.figures if made.found.num_samples else None
    return row | {"scaling_coefficients": made.model.scaling_coefficients, "search": searched}


def log_scores(trainer: Trainer, rows: list[Row]) -> None:
    """The final scores to the loggers, which Lightning no longer asks by then."""
    scores = {key: row["value"] for row in rows if (key := log_key(row))}
    for logger in trainer.loggers:
        logger.log_metrics(scores, step=trainer.global_step)


def log_key(row: Row) -> str | None:
    """The name by which a row is logged; None for one that is not."""
    if row["denominator"] == "full" or (row["model"] == "finetuned" and row["finetuned_on"] != row["task"]):
        return None
    name = row["rule"] if row["model"] == "fused" else row["model"]
    return f"{row['split']}/{row['task']}/{row['metric']}/{name}"
