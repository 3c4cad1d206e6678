"""The released result files of arXiv 2310.04742, read by the ``published`` protocol; data only, for comparison.

A folder holds one folder per model with ``{mode}_{method}_num-tasks={n}.csv`` and ``single_task.csv``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusionlab.errors import InputError
from fusionlab.reporting import protocols
from fusionlab.reporting.protocols import Denominators, Score, Summary

MODES = {"standard": "fft", "fullfinetuned": "fft", "lora": "lora", "l_lora": "l_lora"}
VIT_STEP, T5_RANK = "6000", 16.0
# what the source calls things, and what this package calls them
METHOD_OF_MODE = {"fft": "full", "lora": "lora", "l_lora": "l_lora"}
RULE_OF_METHOD = {
    "average": "average",
    "task_addition": "task_arithmetic",
    "ties_merging": "ties",
    "lorahub": "lorahub",
}
_FILE = re.compile(r"^(?P<mode>fft|lora|l_lora)_(?P<method>\w+)_num-tasks=(?P<num_tasks>\d+)\.csv$")
_SELECTIONS = {
    "per_subset_best": ("abs_sub", "abs_all", "own_sub", "own_all"),
    "common_best": ("abs_sub", "abs_all", "own_sub"),
}


@dataclass(frozen=True)
class PublishedSummary:
    """One published average.

    Args:
        model: the model's folder.
        mode: ``fft``, ``lora`` or ``l_lora``.
        method: the fusion method as the source calls it.
        num_tasks: fused tasks.
        selection: how the coefficient was chosen, always on the reported scores.
        num_rows: rows of the released file.
        summary: means and standard deviations over subsets.
    """

    model: str
    mode: str
    method: str
    num_tasks: int
    selection: str
    num_rows: int
    summary: Summary


def published_summaries(folder: Path) -> list[PublishedSummary]:
    """Every average that the released files give.

    Args:
        folder: the folder that holds the models' folders, or one with such a folder named ``raw``.

    Raises:
        InputError: no released files there.
    """
    folder = folder / "raw" if (folder / "raw").is_dir() else folder
    models = sorted(path.parent for path in folder.glob("*/single_task.csv"))
    if not models:
        raise InputError(f"no MODEL/single_task.csv below {str(folder)!r}; give the folder of the released files")
    return [summary for model in models for summary in _summaries_of(model)]


def _summaries_of(model: Path) -> Iterator[PublishedSummary]:
    singles = single_task_scores(model / "single_task.csv")
    for path in sorted(model.glob("*_num-tasks=*.csv")):
        match = _FILE.match(path.name)
        if match is None:
            continue
        scores = read_scores(path)
        known = Denominators(tuple(singles["fft"]), singles[match["mode"]], singles["fft"])
        for selection, summary in _select(scores, known, int(match["num_tasks"]), match["method"]):
            yield PublishedSummary(
                model.name, match["mode"], match["method"], int(match["num_tasks"]), selection, len(scores), summary
            )


def _select(scores: list[Score], known: Denominators, num_tasks: int, method: str) -> Iterator[tuple[str, Summary]]:
    if not scores[0].candidate:
        yield "none", protocols.per_subset_best(scores, known, "abs_sub")
        return
    for criterion in _SELECTIONS["per_subset_best"]:
        yield f"per_subset_best:{criterion}", protocols.per_subset_best(scores, known, criterion)
    for criterion in _SELECTIONS["common_best"]:
        summary = protocols.common_best(scores, known, criterion)
        if summary is not None:
            yield f"common_best:{criterion}", summary
    for value in dict.fromkeys((0.3, 1.0, round(1 / num_tasks, 4))) if len(scores[0].candidate) == 1 else ():
        summary = protocols.fixed(scores, known, (value,))
        if summary is not None:
            yield f"fixed:{value}", summary


def single_task_scores(path: Path) -> dict[str, dict[str, float]]:
    """Single-task scores by mode and task: the last step of ViT, the best T5 run (adapters at rank 16)."""
    found: dict[str, dict[str, float]] = {}
    for row in _read(path):
        is_vit = "finetune_mode" in row
        mode = MODES.get(row["finetune_mode" if is_vit else "method"])
        rank = "" if is_vit else row["LoRA.r"]
        if mode is None or (is_vit and row["step"] != VIT_STEP):
            continue
        if not is_vit and mode != "fft" and (not rank or float(rank) != T5_RANK):
            continue
        task, value = row["task" if is_vit else "dataset"], _number(row["accuracy"])
        of_mode = found.setdefault(mode, {})
        of_mode[task] = max(value, of_mode.get(task, value))
    return found


def read_scores(path: Path) -> list[Score]:
    """The rows of one released file; a missing score counts 0."""
    scores = []
    for row in _read(path):
        fused = tuple(value for name, value in row.items() if name.startswith("dataset:"))
        candidate = tuple(float(row[name]) for name in ("scaling_factor", "k") if name in row)
        known = {name: _number(value) for name, value in row.items() if not name.startswith("dataset:")}
        values = {name: value for name, value in known.items() if name not in ("scaling_factor", "k")}
        scores.append(Score(fused, candidate, values))
    return scores


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float:
    return float(text) if text and text != "nan" else 0.0
