"""Every rule and search on the embedded image tasks and on six real image sets: scores, what was looked at, seconds.

    python benchmarks/study_methods.py --output runs/methods [--stage backbone sweep report] [--suites embedded images]
        [--methods full lora l_lora] [--seeds 1 2 3] [--data ../shared/data]
        [--record benchmarks/results/methods_2cpu_202612]

The rules are those of configs/sweep/methods.yaml; coefficients are chosen on validation, numbers are on test. The
embedded suite is that configuration as it is. The six sets start from small-clip (stage ``backbone``): tiny-clip after
full fine-tuning on cifar100, as tiny-clip itself is near chance on them; 200 steps of 32 images and at most 1,000
samples a split. WEMoE is for `full` alone: it routes MLPs, which adapters of q and v projections leave as they are.

Each suite and method is a sweep with a ledger of its own, which goes on where it was stopped. ``report`` writes what
the output folder has to the record, one file a suite and method, and README.md from all that the record has.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parents[1] / "configs" / "sweep" / "methods.yaml"
IMAGES = ("mnist", "fashion_mnist", "cifar10", "cifar100", "gtsrb", "dtd")
RATES = {"full": 1e-3, "lora": 1e-2, "l_lora": 1e-2}
"""On the six sets; the best of three tried on validation of single tasks, learning_rates_2cpu_202611.md."""
COLUMNS = ("rule", "mean ± s.d.", "share of single tasks", "over average ± s.e.", "inputs", "labels", "passes", "s")

LEGEND = (
    "`benchmarks/study_methods.py`. All tasks are fused, and scored on test; coefficients are chosen on validation.",
    "Means over tasks, then over seeds; s.d. and s.e. are over seeds, differences paired by seed. `inputs`, `labels`,",
    "`passes`: what the rule or search looked at (training inputs for RegMean, Fisher and WEMoE, validation for the",
    "others), a seed; `s`: seconds a seed of finding, fusing and scoring, on a core that other work may share.",
)

# runs


def run(*arguments: object) -> None:
    """One command of the package, in a process of its own."""
    subprocess.run([sys.executable, "-m", "fusionlab", *map(str, arguments)], check=True)


def small_clip(options: argparse.Namespace) -> Path:
    """tiny-clip after full fine-tuning on cifar100; made once."""
    root = options.output / "small-clip"
    if not (root / "results.json").exists():
        tasks = json.dumps([{"name": "cifar100", "path": str(options.data / "cifar100")}])
        run("fit", "--model.method", "full", "--model.learning_rate", 1e-3, "--data.batch_size", 64,
            "--trainer.max_steps", 1500, "--seed_everything", 0, "--data.tasks", tasks, "--fusion.rules", "{}",
            "--trainer.default_root_dir", root)  # fmt: skip
    [folder] = (root / "finetuned").iterdir()
    return folder


def fit_of(options: argparse.Namespace, suite: str, method: str) -> dict[str, Any]:
    """What `fit` is given; the embedded default as it is."""
    if suite == "embedded":
        return {}
    tasks = [{"name": name, "path": str(options.data / name)} for name in IMAGES]
    model = {"backbone": str(small_clip(options)), "learning_rate": RATES[method]}
    return {
        "model": {"class_path": "ClipModule", "init_args": model},
        "data": {"class_path": "ImageTasks", "init_args": {"tasks": tasks, "max_samples": 1000}},
        "trainer": {"max_steps": 200},
    }


def sweep(options: argparse.Namespace) -> None:
    """One sweep a suite and method."""
    for suite in options.suites:
        for method in options.methods:
            folder = options.output / f"{suite}-{method}"
            content = yaml.safe_load(RULES.read_text())
            rules = content["rules"] | ({"wemoe": "wemoe"} if method == "full" else {})
            config = content | {
                "output": str(folder), "methods": [method], "seeds": options.seeds, "rules": rules,
                "fit": fit_of(options, suite, method), "sizes": [8 if suite == "embedded" else len(IMAGES)],
            }  # fmt: skip
            path = options.output / f"{suite}-{method}.yaml"
            path.write_text(yaml.safe_dump(config))
            run("sweep", "--config", path)


# report


def slices(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the tables need of each finished sweep."""
    for suite in options.suites:
        for method in options.methods:
            folder = options.output / f"{suite}-{method}"
            if not (folder / "sweep.json").exists():
                continue
            content, rows = (json.loads((folder / name).read_text()) for name in ("sweep.json", "results.json"))
            yield (
                f"{suite}_{method}",
                {
                    "suite": suite,
                    "method": method,
                    "seeds": sorted(each["seed"] for each in content["single_task"].values()),
                    "single_task": content["single_task"],
                    "samples": {row["task"]: row["num_samples"] for row in rows["rows"]},
                    "rules": of_rules(rows["rows"], content["costs"]),
                    "missing": content["missing"],
                },
            )


def of_rules(rows: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By rule: the mean test score over all tasks, and its share of the single-task scores, seed by seed; its cost."""
    found: dict[str, dict[str, Any]] = {}
    values: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["denominator"] == "own":
            values[row["rule"], row["seed"]].append((row["value"], row["normalized"]))
            looked = row["search"] or {"num_samples": 0, "num_labels": 0, "passes": 0}
            found.setdefault(row["rule"], {"task_known": row["task_known"], "looked_at": looked})
    for (rule, seed), scores in sorted(values.items()):
        for name, place in (("mean", 0), ("share", 1)):
            found[rule].setdefault(name, {})[seed] = statistics.fmean(each[place] for each in scores)
    for cost in costs:
        found[cost["rule"]]["seconds"] = cost["seconds"] / len(found[cost["rule"]]["mean"])
    return found


def report(record: Path) -> str:
    """Markdown from the slices of a record: a table for each suite and method; what knows the task stands apart."""
    lines = ["# Every rule and search, one table", "", *LEGEND, ""]
    for path in sorted(record.glob("*.json")):
        each = json.loads(path.read_text())
        singles = [statistics.fmean(one["values"].values()) for one in each["single_task"].values()]
        samples = ", ".join(f"{task} {count}" for task, count in each["samples"].items())
        lines += [f"## {each['suite']}, {each['method']}", ""]
        lines += [f"Seeds {', '.join(map(str, each['seeds']))}; test samples: {samples}. Single-task models: "
                  f"{statistics.fmean(singles):.3f} on average.", ""]  # fmt: skip
        for is_known in (False, True):
            rules = {name: rule for name, rule in each["rules"].items() if rule["task_known"] is is_known}
            heads = COLUMNS if not is_known else ("told the task", *COLUMNS[1:])
            lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
            ordered = sorted(rules, key=lambda name: -statistics.fmean(rules[name]["mean"].values()))
            lines += [f"| {' | '.join(cells(name, each['rules']))} |" for name in ordered]
            lines.append("")
        if each["missing"]:
            absent = sorted({f"{line['rule']} of seed {line['seed']}" for line in each["missing"]})
            lines += [f"Not there: {', '.join(absent)}.", ""]
    return "\n".join(lines)


def cells(name: str, rules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line of a table; differences from the average are paired by seed."""
    rule, average = rules[name], rules["average"]["mean"]
    looked, means = rule["looked_at"], list(rule["mean"].values())
    gains = [value - average[seed] for seed, value in rule["mean"].items()]
    return [
        name,
        f"{statistics.fmean(means):.3f}" + (f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""),
        f"{statistics.fmean(rule['share'].values()):.3f}",
        "-" if name == "average" else _spread(gains),
        *(f"{round(looked[field]):,}" if looked[field] else "-" for field in ("num_samples", "num_labels")),
        f"{looked['passes']:.1f}" if looked["passes"] else "-",
        f"{rule['seconds']:.0f}",
    ]


def _spread(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{error}"


def write_record(options: argparse.Namespace) -> None:
    """Write the slices that the output has, and README.md of all that the record has."""
    record = options.record or options.output / "record"
    record.mkdir(parents=True, exist_ok=True)
    for name, content in slices(options):
        (record / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (record / "README.md").write_text(report(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=["backbone", "sweep", "report"], nargs="+", default=["sweep", "report"])
    parser.add_argument("--suites", choices=["embedded", "images"], nargs="+", default=["embedded", "images"])
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "l_lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--record", type=Path, help="the folder of slices and README.md; record/ of the output")
    options = parser.parse_args()
    options.output, options.data = options.output.resolve(), options.data.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    stages = {"backbone": small_clip, "sweep": sweep, "report": write_record}
    for stage in options.stage:
        stages[stage](options)


if __name__ == "__main__":
    main()
