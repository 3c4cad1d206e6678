"""A commit beside this one, in turn: a fit by lora, one by l_lora, `fuse` of checkpoints, a sweep of tangents.

    python benchmarks/bench_commits.py --before COMMIT --folder runs/pair [--pairs 9] [--kinds fit_lora fuse ...]

Every measurement is a process of its own that has imported torch, Lightning, transformers and PEFT before its clock
starts: seconds of the command itself, our own imports among them. A pair is both commits, one after the other, in turn
the older or the newer one first; what counts is the ratio within a pair. One uncounted pair comes first, as a commit's
compiled kernels are made then. The older commit is checked out beside the inputs, and makes the run that the sweep
reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TASKS = "[digits, signs, textures, colours]"
STEPS = 40
RULES = {"ties": {"class_path": "ties", "init_args": {"density": 0.2, "scope": "tensor"}}, "metagpt": "metagpt"}


def command_of(kind: str, folder: Path, output: Path) -> list[str]:
    """What a measurement runs; both commits know these flags."""
    if kind.startswith("fit_"):
        own = ["--model.method", kind.removeprefix("fit_"), "--data.tasks", TASKS, "--trainer.max_steps", str(STEPS)]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(output)]
        return ["fit", *own, *quiet, "--train_only"]
    if kind.startswith("fuse_"):
        recipe = output.with_suffix(".yaml")
        models = {f"model{k}": str(folder / f"llama-4-model{k}") for k in range(3)}
        own = {"base": str(folder / "llama-4-base"), "finetuned": models, "rule": RULES[kind.removeprefix("fuse_")]}
        recipe.write_text(json.dumps(own | {"output": str(output)}))
        for path in folder.glob("llama-4-*/fusion_stats.json"):
            path.unlink()
        return ["fuse", "--config", str(recipe)]
    grid = ["--scaling_coefficients", "[0.2, 0.4, 0.6, 0.8, 1.0]", "--sizes", "[2, 4]"]
    return ["sweep", "--runs", f"[{folder / 'tangents'}]", "--rules", "[average, task_arithmetic, metagpt]", *grid,
            "--output", str(output)]  # fmt: skip


def measure(command: list[str]) -> None:
    """Print the seconds of a command, in a process that has imported its libraries."""
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from fusionlab.__main__ import main as command_line

    start = time.perf_counter()
    code = command_line(command)
    print(f"seconds {time.perf_counter() - start} {code}")


def seconds(tree: Path, kind: str, folder: Path) -> float:
    """Of one command by the commit that is checked out in ``tree``."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = command_of(kind, folder, output)
    own = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(command)], env=os.environ | own, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if not told or told[0][2] != "0":
        raise RuntimeError(f"{kind} in {tree}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    return float(told[0][1])


def make_inputs(folder: Path, older: Path) -> None:
    """Checkpoints of 0.3 billion parameters, and a run of four tangent models, by ``older``: both commits read it."""
    from bench_fuse import make_checkpoints

    make_checkpoints(folder, 4, ["base", "model0", "model1", "model2"])
    if not (folder / "tangents" / "results.json").exists():
        own = ["--model.method", "tangent_lora", "--data.tasks", TASKS, "--trainer.max_steps", "20"]
        subprocess.run(
            [sys.executable, "-m", "fusionlab", "fit", *own, "--trainer.default_root_dir", str(folder / "tangents")],
            env=os.environ | {"PYTHONPATH": str(older)}, cwd=folder, check=True,
        )  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95 %, by 2,000 resamplings with a seed."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="the older commit")
    parser.add_argument("--folder", type=Path, help="of inputs, outputs and the older commit's files")
    parser.add_argument("--pairs", type=int, default=9)
    kinds = ["fit_lora", "fit_l_lora", "fuse_ties", "fuse_metagpt", "sweep_tangents"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    older = folder / "before"
    if not older.exists():
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", older, options.before], check=True)
    make_inputs(folder, older)
    trees = {"before": older, "after": ROOT}
    print("| kind | before, s | after, s | after / before | 95 % of the median |\n|---|---|---|---|---|")
    for kind in options.kinds:
        found: dict[str, list[float]] = {"before": [], "after": []}
        for pair in range(options.pairs + 1):
            for name in ("before", "after") if pair % 2 else ("after", "before"):
                found[name].append(seconds(trees[name], kind, folder))
        before, after = (values[1:] for values in found.values())
        ratios = [new / old for old, new in zip(before, after, strict=True)]
        low, high = interval(ratios)
        middle = [f"{statistics.median(values):.2f}" for values in (before, after, ratios)]
        print(f"| {kind} | {' | '.join(middle)} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
