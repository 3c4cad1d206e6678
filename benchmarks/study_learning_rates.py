"""How learning rate and steps, chosen on single tasks, change what fusion gives; a Markdown table.

python benchmarks/study_learning_rates.py --data ../shared/data --output benchmarks/results/NAME.md
    [--learning_rates '{"lora": [0.001, 0.01]}'] [--steps 40 120 360] [--seed 1] [--backbone tiny-clip] [--runs FOLDER]

Each (method, learning rate) is one `fit` of the middle number of steps; with the learning rate that does best on the
single tasks' validation splits also the other numbers of steps are tried. A finished run folder is taken as it is. Task
arithmetic's coefficient is chosen on validation; all other numbers are on test.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from study_real_images import fit, tasks_of

import fusionlab
from fusionlab.runs.loading import load_weights

RATES = {"full": [3e-4, 1e-3, 3e-3], "lora": [1e-3, 3e-3, 1e-2], "l_lora": [1e-3, 3e-3, 1e-2]}
RULES = ("average", "task_arithmetic", "metagpt")


def validated(root: Path, module: Any, data: Any) -> float:
    """Mean accuracy on validation of each single-task model on its own task."""
    values = []
    for task in data.tasks:
        kind = "adapters" if (root / "adapters").is_dir() else "finetuned"
        with module.use(load_weights(root / kind / task, module.base_model).weights):
            values.append(fusionlab.evaluate(module, data, [task], "validation")[0]["value"])
    return statistics.mean(values)


def line(root: Path, method: str, rate: float, steps: int, validation: float) -> str:
    """One row of the table."""
    results = json.loads((root / "results.json").read_text())["rows"]
    rows = [row for row in results if row["denominator"] == "own"]
    mean = {
        name: statistics.mean(row["value"] for row in rows if (row["rule"] or row["model"]) == name)
        for name in ("pretrained", "finetuned", *RULES)
    }
    chosen = next(row["scaling_coefficients"] for row in rows if row["rule"] == "task_arithmetic")
    cells = [f"{rate:g}", str(steps), f"{validation:.3f}", f"{mean['finetuned']:.3f}"]
    for name in RULES:
        cells.append(f"{mean[name]:.3f} ({mean[name] / mean['finetuned']:.2f})")
    return f"| {method} | {' | '.join(cells)} | {next(iter(chosen.values())):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_rates"))
    parser.add_argument("--tasks", nargs="+", default=["mnist", "cifar10", "gtsrb"])
    parser.add_argument("--learning_rates", type=json.loads, default=RATES, help='by method, as {"lora": [0.003]}')
    parser.add_argument("--steps", nargs=3, type=int, default=[40, 120, 360], help="few, middle, many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_samples", type=int, default=600)
    parser.add_argument("--backbone", default="tiny-clip")
    options = parser.parse_args()
    module = fusionlab.ClipModule(options.backbone)
    data = fusionlab.ImageTasks(tasks_of(options), image_size=module.backbone.image_size,
                                max_samples=options.max_samples, seed=options.seed)  # fmt: skip
    data.setup()
    module.prepare_tasks(data.tasks)
    pretrained = fusionlab.evaluate(module, data, split="test")
    few, middle, many = options.steps
    lines = []
    for method, rates in options.learning_rates.items():
        found = {}
        for rate, steps in [(rate, middle) for rate in rates] + [(None, few), (None, many)]:
            rate = max(found, key=lambda key: found[key]) if rate is None else rate
            root = options.runs / f"{method}-{rate:g}-{steps}"
            own = {"model.method": method, "model.learning_rate": rate, "trainer.max_steps": steps}
            fit(root, options, own | {"fusion.rules": json.dumps(RULES), "seed_everything": options.seed})
            validation = validated(root, module, data)
            if steps == middle:
                found[rate] = validation
            lines.append(line(root, method, rate, steps, validation))
    samples = ", ".join(f"{row['task']} {row['num_samples']}" for row in pretrained)
    head = [
        "# Learning rate and steps: what they do to single tasks and to fusion",
        "",
        "Command: `python " + shlex.join(["benchmarks/study_learning_rates.py", *sys.argv[1:]]) + "`",
        "",
        f"{options.backbone}, steps of 32 images a task, accuracy (test: {samples} samples), seed {options.seed}; "
        f"pretrained {statistics.mean(row['value'] for row in pretrained):.3f}. In brackets the share of the mean "
        f"single-task accuracy. torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        f"| method | learning rate | steps | single, validation | single, test | {' | '.join(RULES)} | λ |",
        "|" + "---|" * (len(RULES) + 6),
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join([*head, *lines]) + "\n")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
