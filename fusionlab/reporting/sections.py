"""The parts of a report: of a run's folder, and, in :mod:`fusionlab.reporting.sweeps`, of a sweep's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionlab.cards.masks import sizes_text
from fusionlab.contracts import Row
from fusionlab.errors import InputError
from fusionlab.evaluation.rows import LM_EVAL, counts_faults, read_rows
from fusionlab.files import nearest
from fusionlab.foreign import read_json
from fusionlab.layout import CONFIG, COSINES, FUSED, FUSION, NORM_SHARES, PLANE, PLOTS, RESULTS, SCORES, SWEEP
from fusionlab.reporting.learning import learning_curves
from fusionlab.reporting.page import Cell, Note, Picture, Section, Table, file_name
from fusionlab.reporting.published import PublishedSummary
from fusionlab.reporting.results import harness_table, limits, masks_of
from fusionlab.reporting.scores import Group, chart, column, groups, means, own_rows
from fusionlab.reporting.similarity import geometry
from fusionlab.reporting.sweeps import of_sweep
from fusionlab.reporting.words import count, method_name, metric_name, model_name, rule_name

PICTURES = {
    NORM_SHARES: "share of each layer in the squared norm of the task vectors",
    f"{PLANE}_disentanglement": "disentanglement error over the coefficients of two task vectors",
    f"{PLANE}_loss": "mean loss of two tasks over the coefficients of their task vectors",
    f"{PLANE}_accuracy": "mean accuracy of two tasks over the coefficients of their task vectors",
}


def sections_of(folder: Path, published: Sequence[PublishedSummary] = (), title: str | None = None) -> list[Section]:
    """The sections of a run or sweep.

    Args:
        folder: of a finished one.
        published: averages to draw beside a sweep's.
        title: what it is called; the folder's name by default.

    Raises:
        InputError: the folder is neither.
    """
    title = title or folder.resolve().name
    if (folder / SWEEP).is_file():
        return of_sweep(folder, published, title)
    if (folder / RESULTS).is_file():
        return _of_run(folder, title)
    raise InputError(f"{str(folder)!r} {_without_results(folder)}")


def _without_results(folder: Path) -> str:
    """Why a folder is nothing to report on, and what to give."""
    wanted = "give the folder of a finished run or sweep"
    if not folder.exists():
        return f"does not exist; {wanted}.{nearest(folder)}"
    if folder.is_file():
        return f"is a file; {wanted}, such as {str(folder.parent)!r}"
    if (folder / CONFIG).is_file():
        return f"has no {RESULTS}: the run is not finished; give its fit again, which goes on where it ended"
    return f"has neither {RESULTS} nor {SWEEP}; {wanted}"


def _of_run(folder: Path, title: str) -> list[Section]:
    rows = read_rows(folder / RESULTS)
    if not rows:
        raise InputError(f"the {RESULTS} in {str(folder)!r} has no rows; finish the run first")
    name = file_name(title)
    told = [row for row in rows if row.get("task_known")]
    blind = [row for row in rows if not row.get("task_known")]
    records = _records(folder)
    first = Section(f"Run {title}", facts=_facts(rows, records))
    first.parts += [*_scores(blind, name, title), *_notes(rows)]
    sections = [first]
    if told:
        section = Section("Models that are told each input's task", level=3)
        section.text.append(
            "These models choose by the task of an input, which must be known. The ones above are one model for "
            "everything. The two are not compared."
        )
        section.text += [f"{rule_name(rule)}: {sizes_text(masks)}." for rule, masks in masks_of(told).items()]
        section.parts += _scores(told, f"{name}-task-known", title)
        sections.append(section)
    harness = harness_table(rows)
    if harness[1]:
        section = Section("Scored by lm-eval", level=3)
        section.parts.append(Table("Scored by lm-eval's own code and prompts", *harness))
        sections.append(section)
    sections.append(Section("Coefficients and similarity", level=3, parts=geometry(rows, records)))
    curves = learning_curves(folder, name)
    if curves:
        text = ["What Lightning's CSV logger wrote while the tasks were trained."]
        sections.append(Section("Learning curves", text, curves, level=3))
    pictures = _pictures(folder, name)
    if pictures:
        sections.append(Section("Diagnostics", parts=pictures, level=3))
    return [section for section in sections if section.parts or section.level == 2]


def _facts(rows: Sequence[Row], records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    base = next((str(record["base"]) for record in records.values() if record.get("base")), None)
    facts = [("base model", base)] if base else []
    shown = [row for row in rows if LM_EVAL not in row]
    precision = ", ".join(dict.fromkeys(str(row["precision"]) for row in shown if row["precision"]))
    tasks = list(dict.fromkeys(row["task"] for row in shown))
    facts += [
        ("fine-tuning method", method_name(rows[0]["method"])),
        (f"{count(len(tasks), 'task')}", ", ".join(tasks)),
        ("scored on", ", ".join(dict.fromkeys(f"{row['split']} split" for row in shown))),
        ("seed", "not known" if rows[0]["seed"] is None else str(rows[0]["seed"])),
    ]
    return [*facts, ("computed in", precision)] if precision else facts


def _scores(rows: Sequence[Row], name: str, title: str) -> list[Any]:
    """A table of each group, then all of them drawn, then shares and what they were measured on."""
    parts: list[Any] = []
    splits = ", ".join(dict.fromkeys(row["split"] for row in own_rows(rows)))
    for group in groups(rows):
        parts.append(_score_table(group, splits))
    if parts:
        caption = (
            f"{title}: scores on {splits} by task. Whiskers are one standard error by samples; another seed of "
            f"training is not in them."
        )
        parts.append(chart(f"{name}-scores", caption, rows))
    parts += [table for denominator in ("own", "full") if (table := _shares(rows, denominator))]
    samples = dict.fromkeys(
        (row["task"], row["split"], metric_name(row["metric"]), f"{row['num_samples']:,}", str(row["data_version"]))
        for row in own_rows(rows)
    )
    if samples:
        header = ["task", "split", "metric", "samples", "data version"]
        parts.append(Table("What the scores are of", header, [list(line) for line in samples], folded=True, left=(4,)))
    return parts


def _score_table(group: Group, splits: str) -> Table:
    columns = list(dict.fromkeys(column(row, group.rows) for row in group.rows))
    lines: dict[str, dict[str, Cell]] = {}
    for row in group.rows:
        error = f"± {row['stderr']:.3f}" if row.get("stderr") else ""
        cell = Cell(f"{row['value']:.3f}", error, row["value"])
        lines.setdefault(model_name(row), {})[column(row, group.rows)] = cell
    averages = means(group)
    several = len(columns) > 1
    body: list[list[Cell | str]] = []
    for name, cells in lines.items():
        mean = averages.get(name)
        error = f"± {mean.error:.3f}" if mean and mean.error else ""
        last: list[Cell | str] = [Cell(f"{mean.value:.3f}", error, mean.value) if mean else "–"] if several else []
        body.append([name, *(cells.get(each, "–") for each in columns), *last])
    caption = f"{group.axis.label[:1].upper()}{group.axis.label[1:]} on {splits}; ± is the standard error by samples"
    return Table(caption, ["model", *columns, *(["mean"] if several else [])], body)


def _shares(rows: Sequence[Row], denominator: str) -> Table | None:
    """Fused models' shares of single-task scores."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] == "fused" and row["denominator"] == denominator and row["normalized"] is not None:
            found.setdefault(model_name(row), {}).setdefault(row["task"], row["normalized"])
    if not found:
        return None
    tasks = list(dict.fromkeys(task for values in found.values() for task in values))
    body: list[list[Cell | str]] = []
    for name, values in found.items():
        cells: list[Cell | str] = [f"{values[task]:.3f}" if task in values else "–" for task in tasks]
        whole = len(values) == len(tasks)
        body.append([name, *cells, f"{sum(values.values()) / len(values):.3f}" if whole else "–"])
    of = "the method's own single-task scores" if denominator == "own" else "full fine-tuning's scores"
    return Table(f"Shares of {of}: 1 is as good as one model a task", ["model", *tasks, "mean"], body, folded=True)


def _notes(rows: Sequence[Row]) -> list[Note]:
    """What is missing, of a part of the samples, or could not be scored."""
    notes = []
    if found := limits(rows):
        notes.append(Note("Scores of a part of the samples", found, warns=True))
    models = dict.fromkeys(model_name(row) for row in own_rows(rows))
    tasks = dict.fromkeys(row["task"] for row in own_rows(rows))
    there = {(model_name(row), row["task"]) for row in own_rows(rows)}
    missing = [f"{model} has no score on {task}." for model in models for task in tasks if (model, task) not in there]
    if missing:
        notes.append(Note("Missing scores", [*missing, "No mean over tasks is given for these models."], warns=True))
    if not any(row["model"] == "fused" for row in rows):
        notes.append(Note("No fused model", ["The results have no row of a fused model."], warns=True))
    faults = [
        f"{model_name(row)}, {row['task']}: {row['value']:,.0f} of {row['num_samples']:,} answers were "
        f"{'too close to decide' if row['metric'] == 'near_ties' else metric_name(row['metric'])}."
        for row in rows
        if counts_faults(row) and row["value"] and row["denominator"] != "full"
    ]
    return [*notes, Note("Answers that count as wrong or could go either way", faults, warns=True)] if faults else notes


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """What the fused models' folders tell of themselves, by rule in words."""
    paths = sorted((folder / FUSED).glob(f"*/{FUSION}"))
    return {rule_name(path.parent.name): read_json(path) for path in paths}


def _pictures(folder: Path, name: str) -> list[Any]:
    drawn = (SCORES, f"{COSINES}.png")  # as charts and tables above
    return [
        Picture(f"{name}-{path.stem}", PICTURES.get(path.stem, path.stem.replace("_", " ")), path.read_bytes())
        for path in sorted((folder / PLOTS).glob("*.png"))
        if path.name not in drawn
    ]
