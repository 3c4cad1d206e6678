"""Single-task scores, which those of fused models are divided by: a run's own, or of full fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fusionlab.contracts import Data, Module, Row
from fusionlab.errors import InputError, name_list
from fusionlab.evaluation.rows import higher_is_better, read_rows
from fusionlab.keys import scoring_key
from fusionlab.layout import RESULTS

_log = logging.getLogger(__name__)


def normalize(rows: Sequence[Row], full: dict[tuple[str, str], float] | None = None) -> list[Row]:
    """Every row with its share of the single-task value; ``own`` is this run's, ``full`` that of full fine-tuning.

    Args:
        rows: rows of one run, with the fine-tuned models on their own tasks.
        full: values of full fine-tuning by (task, metric); each row is then given a second time under ``full``.

    Returns:
        The rows with ``denominator`` and ``normalized``; None where there is no denominator, it is not positive, or
        the value is not better where it is higher.
    """
    own = {
        (row["task"], row["metric"]): row["value"]
        for row in rows
        if row["model"] == "finetuned" and row["finetuned_on"] == row["task"]
    }
    return [
        {**row, "denominator": name, "normalized": _share(row, values)}
        for name, values in (("own", own), ("full", full))
        if values is not None
        for row in rows
    ]


def _share(row: Row, values: dict[tuple[str, str], float]) -> float | None:
    single = values.get((row["task"], row["metric"])) if higher_is_better(row) else None
    return share(row["value"], single)


def share(value: float, single: float | None) -> float | None:
    """A score over the single-task score; None where that is unknown or not positive, which has no shares."""
    return value / single if single is not None and single > 0 else None


def single_task_values(run: Path) -> dict[tuple[str, str], float]:
    """Values of a run's fine-tuned models on their own tasks, by (task, metric).

    Raises:
        InputError: the folder has no results.
    """
    return {(row["task"], row["metric"]): row["value"] for row in _single_task_rows(run)}


def check_reference(run: Path, module: Module, data: Data, whole: bool = False) -> None:
    """Raise if a run's single-task values, which others are divided by, were scored in another way than others are.

    Args:
        run: its folder.
        module: with its tasks prepared.
        data: set up.
        whole: it has to have every task.

    Raises:
        InputError: other samples, label words, prompts, metric, precision or settings of the model, by task; where it
            has to be whole, tasks that it lacks.
    """
    if whole:
        _check_whole(run, list(data.tasks))
    differing, unknown = [], []
    for row in _single_task_rows(run):
        task, split = row["task"], row["split"]
        if split not in data.splits.get(task, {}):
            continue
        samples, key = data.splits[task][split].data_version, scoring_key(module, data, task, split)
        if row["data_version"] != samples:
            differing.append(f"{task} {split} (samples {row['data_version']} there, {samples} now)")
        elif row.get("scored_by") is None:
            unknown.append(task)
        elif row["scored_by"] != key:
            differing.append(f"{task} {split} (label words, prompts, metric, precision or settings of the model)")
    if differing:
        raise InputError(
            f"full_reference: {str(run)!r} was scored in another way: {name_list(dict.fromkeys(differing))}; give a "
            f"run that was scored as this one is"
        )
    if unknown:
        _log.warning(
            "full_reference: %r is of an earlier version, which did not say how it scored: %s",
            *(str(run), name_list(dict.fromkeys(unknown))),
        )


def _check_whole(run: Path, tasks: Sequence[str]) -> None:
    """Raise if the run has no single-task value of one of ``tasks``."""
    known = dict.fromkeys(task for task, _ in single_task_values(run))
    missing = [task for task in tasks if task not in known]
    if missing:
        raise InputError(
            f"full_reference: {str(run)!r} has no fine-tuned model scored on its own task for {name_list(missing)}; it "
            f"has {name_list(known) or 'none'}. Give a run of fit with all tasks of the sweep"
        )


def _single_task_rows(run: Path) -> list[Row]:
    path = run / RESULTS
    if not path.is_file():
        raise InputError(f"no {RESULTS} in {str(run)!r}; give the folder of a finished run")
    return [
        row
        for row in read_rows(path)
        if row["model"] == "finetuned" and row["finetuned_on"] == row["task"] and row["denominator"] == "own"
    ]
