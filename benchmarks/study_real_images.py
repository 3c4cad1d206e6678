"""Fine-tuning methods on real image sets, fused in delta_weight and in factor space; a Markdown table over seeds.

python benchmarks/study_real_images.py --data ../shared/data --output benchmarks/results/NAME.md [--methods lora l_lora]
    [--learning_rates '{"full": 0.001}'] [--seeds 1 2 3] [--max_steps 200] [--max_samples 600] [--backbone tiny-clip]
    [--runs FOLDER]

Each (method, seed) is one `fit`; a finished run folder is taken as it is. Coefficients are chosen on validation, all
numbers are on test. Rows named `factor` fuse A and B apart, as published LoRA results did. A score is normalised by
that of the single-task model of the same method (own), and, with the method `full` among them, by that of full
fine-tuning with the same seed (full).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fusionlab
from fusionlab import adapters, search

TASKS = ("mnist", "fashion_mnist", "cifar10", "gtsrb", "dtd")
Scored = dict[str, dict[str, float]]


def tasks_of(options: argparse.Namespace) -> list[dict[str, str]]:
    """The chosen sets, as ``data.tasks`` has them."""
    return [{"name": name, "path": str(Path(options.data) / name)} for name in options.tasks]


def fit(root: Path, options: argparse.Namespace, own: Mapping[str, Any]) -> None:
    """One `fit` with its own arguments in a process of its own, unless its folder is finished."""
    if (root / "results.json").exists():
        return
    arguments = {
        "model.backbone": options.backbone,
        "data.tasks": json.dumps(tasks_of(options)),
        "trainer.default_root_dir": root,
        **own,
    }
    if options.max_samples:
        arguments["data.max_samples"] = options.max_samples
    flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "fusionlab", "fit", *flags], check=True)


def factor_space(root: Path, method: str, seed: int, options: argparse.Namespace) -> Scored:
    """Test scores by task of average and of task arithmetic (chosen on validation) in factor space."""
    module = fusionlab.ClipModule(options.backbone, method=method, seed=seed)
    data = fusionlab.ImageTasks(
        tasks_of(options), image_size=module.backbone.image_size, max_samples=options.max_samples or None, seed=seed
    )
    data.setup()
    module.prepare_tasks(data.tasks)
    of_task = {task: adapters.load_adapter(root / "adapters" / task) for task in data.tasks}

    def scored(value: float, split: str) -> dict[str, float]:
        fused = adapters.combine_factors(of_task, {"*": dict.fromkeys(of_task, value)})
        with module.use(fused):
            return {row["task"]: row["value"] for row in fusionlab.evaluate(module, data, split=split)}

    def mean_validation(values: Sequence[float]) -> list[float]:
        return [statistics.mean(scored(value, "validation").values()) for value in values]

    chosen = search.best(search.look(mean_validation, search.ToTheTop(search.START)))
    return {
        "average (factor)": scored(1 / len(of_task), "test"),
        f"task_arithmetic (factor), λ {chosen:.2f}": scored(chosen, "test"),
    }


def collect(root: Path) -> Scored:
    """Test scores by model and task from a run's results."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in json.loads((root / "results.json").read_text())["rows"]:
        if row["denominator"] == "own" and row["finetuned_on"] in (None, row["task"]):
            found[row["rule"] or row["model"]][row["task"]] = row["value"]
    return dict(found)


def table(method: str, runs: list[Scored], full: list[Scored], tasks: list[str]) -> list[str]:
    """Markdown lines: means over seeds, the standard deviation of the mean over tasks, and normalised means."""
    header = [*tasks, "mean ± s.d.", "own-normalised", *(["full-normalised"] if full else [])]
    lines = [f"## {method}", "", f"| model | {' | '.join(header)} |", "|" + "---|" * (len(header) + 1)]
    for name in dict.fromkeys(name.split(", λ")[0] for run in runs for name in run):
        values = [next(of for key, of in run.items() if key.split(", λ")[0] == name) for run in runs]
        cells = [f"{statistics.mean(of[task] for of in values):.3f}" for task in tasks]
        means = [statistics.mean(of[task] for task in tasks) for of in values]
        cells.append(f"{statistics.mean(means):.3f} ± {statistics.stdev(means) if len(means) > 1 else 0.0:.3f}")
        for denominators in (runs, full) if full else (runs,):
            shares = [of[t] / by["finetuned"][t] for of, by in zip(values, denominators, strict=True) for t in tasks]
            cells.append(f"{statistics.mean(shares):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chosen = [key.split("λ ")[1] for run in runs for key in run if "λ" in key]
    note = [f"Coefficients of task arithmetic in factor space, by seed: {', '.join(chosen)}.", ""] if chosen else []
    return [*lines, "", *note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/real_images"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["lora", "l_lora"])
    parser.add_argument("--learning_rates", type=json.loads, default={}, help='by method, as {"lora": 0.003}')
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--max_samples", type=int, default=600)
    parser.add_argument("--backbone", default="tiny-clip")
    options = parser.parse_args()
    runs: dict[str, list[Scored]] = {}
    for method in options.methods:
        for seed in options.seeds:
            root = options.runs / f"{method}-{seed}"
            own = {"model.method": method, "trainer.max_steps": options.max_steps, "seed_everything": seed}
            if method in options.learning_rates:
                own["model.learning_rate"] = options.learning_rates[method]
            fit(root, options, own)
            cache = root / "factor_space.json"
            if not cache.exists() and method in ("lora", "l_lora"):
                cache.write_text(json.dumps(factor_space(root, method, seed, options)))
            factored = json.loads(cache.read_text()) if cache.exists() else {}
            runs.setdefault(method, []).append(collect(root) | factored)
    lines: list[str] = []
    for method, of_method in runs.items():
        lines += table(method, of_method, runs.get("full", []), options.tasks)
    counts = json.loads((options.runs / f"{options.methods[0]}-{options.seeds[0]}" / "results.json").read_text())[
        "rows"
    ]
    samples = dict.fromkeys(f"{row['task']} {row['num_samples']}" for row in counts)
    head = [
        "# Real image sets: fused in delta_weight and in factor space",
        "",
        "Command: `python " + shlex.join(["benchmarks/study_real_images.py", *sys.argv[1:]]) + "`",
        "",
        f"{options.backbone}, {options.max_steps} steps of 32 images a task, accuracy on test ({', '.join(samples)} "
        f"samples), seeds {', '.join(map(str, options.seeds))}; coefficients chosen on validation. torch "
        f"{torch.__version__}, Python {platform.python_version()}.",
        "",
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(head + lines))
    print(options.output.read_text())


if __name__ == "__main__":
    main()
