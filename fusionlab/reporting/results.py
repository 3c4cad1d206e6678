"""What a person looks at: the results file, its tables and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusionlab.cards.masks import sizes_text
from fusionlab.contracts import Row
from fusionlab.evaluation.rows import (
    LM_EVAL,
    SCHEMA,
    counts_faults,
    higher_is_better,
    is_score,
    primary_rows,
    shown_rows,
)
from fusionlab.files import write_text
from fusionlab.reporting.page import markdown_table

TASK_KNOWN = "Told the task of each input, and not comparable with one model for all tasks"


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write ``{"schema": 2, "rows": [...]}`` whole or not at all."""
    write_text(path, json.dumps({"schema": SCHEMA, "rows": list(rows)}, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: one line per model, one column per task and metric, the mean over tasks last.

    Counts of faults and rows of lm-eval have no column; the mean is of each task's first metric, where that is better
    where higher. Models that need to know the task are in :func:`task_known_table`.

    Fine-tuned models share one line, each scored on its own task; one that is alone has all its rows. Rows that only
    repeat a value under another denominator are left out.
    """
    return _table([row for row in rows if not row.get("task_known")])


def task_known_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The same of the models that were told the task of each input, which are not compared with the others."""
    return _table([row for row in rows if row.get("task_known")])


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rows = [row for row in shown_rows(rows) if is_score(row)]
    averaged = {(row["task"], row["metric"]) for row in primary_rows(rows) if higher_is_better(row)}
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    lines: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        lines.setdefault(line_name(row), {})[row["task"], row["metric"]] = row["value"]
    metrics = {metric for _, metric in columns}
    header = ["model", *(task if len(metrics) == 1 else f"{task} {metric}" for task, metric in columns), "mean"]
    body = []
    for name, values in lines.items():
        cells = [f"{values[column]:.3f}" if column in values else "-" for column in columns]
        of_tasks = [value for column, value in values.items() if column in averaged]
        body.append([name, *cells, f"{sum(of_tasks) / len(of_tasks):.3f}" if of_tasks else "-"])
    return header, body


def harness_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the rows that lm-eval scored: a line a model, task and metric, with its standard error."""
    header = ["model", "task", "metric", "value", "samples", "few-shots", "limit", "version", "other border tokens"]
    body = []
    for row in rows:
        if (own := row.get(LM_EVAL)) is None:
            continue
        name = row["model"] if row["model"] != "finetuned" else f"finetuned on {row['finetuned_on']}"
        metric = row["metric"] if own["filter"] == "none" else f"{row['metric']}, {own['filter']}"
        value = f"{row['value']:.4f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")
        last = (own["num_fewshot"], own["limit"], own["version"], own["other_border_tokens"])
        name = line_name(row) if row["model"] == "fused" else name
        body.append([name, row["task"], metric, value, str(row["num_samples"]), *map(_or_dash, last)])
    return header, body


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def line_name(row: Row) -> str:
    """What a row's model is called in tables and plots."""
    return f"fused: {row['rule']}" if row["model"] == "fused" else row["model"]


def markdown(rows: Sequence[Row], title: str) -> str:
    """The results as Markdown: scores, coefficients, and what every number was measured on."""
    header, body = table(rows)
    lines = [f"# {title}", "", markdown_table(header, body), ""]
    by_task = task_known_table(rows)
    if by_task[1]:
        lines += [f"{TASK_KNOWN}:", "", markdown_table(*by_task), ""]
        lines += [f"- `{rule}`: {sizes_text(masks)}" for rule, masks in masks_of(rows).items()]
        lines.append("")
    harness = harness_table(rows)
    if harness[1]:
        lines += ["Scored by lm-eval:", "", markdown_table(*harness), ""]
    coefficients = {row["rule"]: row["scaling_coefficients"] for row in rows if row["scaling_coefficients"]}
    if coefficients:
        lines += ["Scaling coefficients:", ""]
        lines += [f"- `{rule}`: {_coefficients(values)}" for rule, values in coefficients.items()]
        lines.append("")
    rounded = {row["rule"]: row["rounding"] for row in rows if row.get("rounding")}
    if rounded:
        lines += ["Share of the changed weights whose update rounding keeps, changes and loses:", ""]
        lines += [f"- `{rule}`: {_shares(values)}" for rule, values in rounded.items()]
        lines.append("")
    if found := limits(rows):
        lines += ["Scores of a part of the samples:", "", *(f"- {each}" for each in found), ""]
    faults = [row for row in rows if counts_faults(row) and row["value"] and row["denominator"] != "full"]
    lines += [
        f"- {row['task']}, {line_name(row)}: {row['value']:.0f} of {row['num_samples']} answers {row['metric']}"
        for row in faults
    ]
    lines += [""] if faults else []
    counts = dict.fromkeys((row["task"], row["split"], row["num_samples"], row["data_version"]) for row in rows)
    lines += ["| task | split | samples | data version |", "|---|---|---|---|"]
    lines += [f"| {task} | {split} | {count} | `{version}` |" for task, split, count, version in counts]
    lines += ["", f"Seed {rows[0]['seed']}, method `{rows[0]['method']}`." if rows else ""]
    return "\n".join(lines) + "\n"


def masks_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What rows say of masks, by rule."""
    return {row["rule"]: row["masks"] for row in rows if row.get("masks")}


def limits(rows: Sequence[Row]) -> list[str]:
    """What bounded the samples that were scored, by task and split, or a coefficient was chosen on; empty for nothing.

    Example:
        >>> limits([{"task": "digits", "split": "test", "limited": "limit_test_batches 1: the first 8 of 40 samples"}])
        ['digits, test: limit_test_batches 1: the first 8 of 40 samples']
    """
    found = (f"{row['task']}, {row['split']}: {row['limited']}" for row in rows if row.get("limited"))
    return list(dict.fromkeys(found))


def _coefficients(values: dict[str, Any]) -> str:
    if all(isinstance(value, float) for value in values.values()):
        return ", ".join(f"{task} {value:.4f}" for task, value in values.items())
    return "per parameter, see fusion.json"


def _shares(values: dict[str, Any]) -> str:
    return ", ".join(f"{what} {values[what]:.1%}" for what in ("kept", "changed", "lost")) + f" ({values['dtype']})"


def best_cells(rows: Sequence[Row]) -> dict[str, str]:
    """The best cell of the fused models in each column of :func:`table`, by the column's name: the lowest error.

    Where it is not known which is better there is none.
    """
    header, body = table(rows)
    fused = [line for line in body if line[0].startswith("fused")]
    better = {name: higher_is_better(row) for row in rows if is_score(row) for name in (row["task"], _column(row))}
    best = {}
    for place, name in list(enumerate(header))[1:]:
        cells = [line[place] for line in fused if line[place] != "-"]
        if cells and (higher := better.get(name, True)) is not None:
            best[name] = (max if higher else min)(cells, key=float)
    return best


def _column(row: Row) -> str:
    return f"{row['task']} {row['metric']}"


def print_table(rows: Sequence[Row], title: str) -> None:
    """Draw the scores in the terminal, the best fused model of each column in bold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    header, body = table(rows)
    drawn = Table(title=escape(title))
    for position, name in enumerate(header):
        drawn.add_column(escape(name), justify="left" if position == 0 else "right", overflow="fold")
    best = best_cells(rows)
    for line in body:
        leads = (
            line[0].startswith("fused") and best.get(name) == cell for name, cell in zip(header, line, strict=True)
        )
        drawn.add_row(
            *(f"[bold]{escape(cell)}[/]" if lead else escape(cell) for cell, lead in zip(line, leads, strict=True))
        )
    console = Console()
    if console.width < 100 and not console.is_terminal:
        console = Console(width=160)
    if body:
        console.print(drawn)
    by_task = task_known_table(rows)
    if by_task[1]:
        told = Table(*map(escape, by_task[0]), title=TASK_KNOWN if body else escape(f"{title}. {TASK_KNOWN}"))
        for line in by_task[1]:
            told.add_row(*map(escape, line))
        console.print(told)
    harness = harness_table(rows)
    if harness[1]:
        drawn = Table(*map(escape, harness[0]), title="scored by lm-eval")
        for line in harness[1]:
            drawn.add_row(*map(escape, line))
        console.print(drawn)
    for limit in limits(rows):
        console.print(f"of a part of the samples: {limit}", soft_wrap=True, highlight=False)
