"""Folders of small runs and sweeps to report on, written by hand: no model is needed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusionlab.evaluation.rows import ROW_FIELDS


def row(**fields: Any) -> dict[str, Any]:
    known = {
        "metric": "accuracy",
        "split": "test",
        "num_samples": 100,
        "data_version": "v",
        "seed": 1,
        "method": "lora",
    }
    known |= {"denominator": "own", "higher_is_better": True, "stderr": 0.03, "task_known": False}
    return dict.fromkeys(ROW_FIELDS) | known | fields


def rows_of_run() -> list[dict[str, Any]]:
    """Two tasks with accuracies, one with a perplexity; fused twice, once told the task."""
    found = []
    for model, rule, told in (("pretrained", None, False), ("fused", "metagpt", False), ("fused", "switch", True)):
        known = {"model": model, "rule": rule, "task_known": told}
        found += [row(task=task, value=0.5, **known) for task in ("a", "b")]
        lower = {"metric": "perplexity", "higher_is_better": False, "stderr": None}
        found.append(row(task="c", value=9.0, **lower, **known))
    return found


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"schema": 2, "rows": list(rows)}))
    return folder


def line(rule: str, num_tasks: int, protocol: str, subsets: int) -> dict[str, Any]:
    criteria = ("abs_sub", "abs_all", "own_sub", "own_all")
    spreads = {"std_over_subsets": dict.fromkeys(criteria, 0.04), "std_over_seeds": dict.fromkeys(criteria, 0.01)}
    counts = {"num_tasks": num_tasks, "num_subsets": subsets, "num_seeds": 2}
    mean = dict.fromkeys(criteria, 0.5 + 0.01 * num_tasks)
    return {"method": "l_lora", "rule": rule, "protocol": protocol, "mean": mean, **spreads, **counts}


def written_sweep(folder: Path) -> Path:
    """Three tasks, two seeds; of one rule the point with all tasks is missing, and one task has no share."""
    lines = [
        line(rule, size, protocol, 3 if size == 2 else 1)
        for protocol in ("strict", "published")
        for rule in ("average", "task_arithmetic")
        for size in ((2, 3) if rule == "average" else (2,))
    ]
    single = {
        f"l_lora-seed{s}": {"method": "l_lora", "seed": s, "values": {"a": 0.8, "b": 0.9, "c": 0}} for s in (1, 2)
    }
    content = {"tasks": ["a", "b", "c"], "backbone": "tiny-clip", "single_task": single, "summary": lines}
    empty: dict[str, Any] = {
        "coefficient_curves": [],
        "equal_models": [],
        "costs": [],
        "fits": [],
        "searches": [],
        "cosines": {},
    }
    known = {"model": "fused", "rule": "average", "method": "l_lora", "fused_tasks": ["a", "b", "c"]}
    rows = [row(task=task, value=0.5 + 0.1 * seed, seed=seed, **known) for task in "abc" for seed in (1, 2)]
    written(folder, [{**each, "protocol": name} for each in rows for name in ("strict", "published")])
    (folder / "sweep.json").write_text(json.dumps(content | empty))
    return folder
