"""Question: what do many tasks in one fit cost, beside as many fits, and beside PEFT by hand?

LoRA on tiny-clip and the embedded drawn tasks, written to disk first. Above seven tasks there are copies: the same
images under other names, by which the order of samples is seeded anew, so that nothing is shared. For each number of
tasks, in turn, in whole processes: one fit (``together``), one fit a task, summed (``apart``), and one loop that calls
PEFT's ``set_adapter`` for each task (``by_hand``). Told are seconds of whole processes, steps a second after the first
ones, and the peak memory of a process, whole and what training added (of ``apart`` the largest). Nothing is fused or
scored. Prints one JSON record.

    python benchmarks/bench_many_tasks.py --num_tasks 1 2 4 7 14 20 --steps 30
    python benchmarks/bench_many_tasks.py --num_tasks 1 2 --steps 3 --num_images 64
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_fit_step import BareLoop, prepare_process, where_measured, write_tasks
from lightning.pytorch import Callback, Trainer

import fusionlab
from fusionlab.backbones import load_backbone
from fusionlab.data.drawing import DRAWN_TASKS

WARMUP, RANK = 2, 16
SIDES = ("together", "apart", "by_hand")


class Timed(Callback):
    """Reads the clock after every step."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.before = 0

    def on_train_start(self, *_: Any) -> None:
        self.before = psutil.Process().memory_info().rss

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.append(time.perf_counter())


class ByHand(Timed):
    """Trains by PEFT in place of the fit, which is left before its first step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start()
        settings = {"precision": "32", "method": "lora", "rank": RANK, "batch_size": self.arguments.batch_size}
        start = load_backbone("tiny-clip")
        bare = BareLoop(start, pl_module, trainer.datamodule, argparse.Namespace(**settings))
        for _ in range(WARMUP + self.arguments.steps):
            bare.step()
            self.clock.append(time.perf_counter())
        raise LeftError


class LeftError(Exception):
    """All steps were taken by hand."""


def fit(tasks: list[dict[str, str]], timed: Timed, arguments: argparse.Namespace) -> list[float]:
    """When each step ended."""
    module = fusionlab.ClipModule(
        "tiny-clip", rank=RANK, lora_alpha=2 * RANK, samples_at_once=arguments.samples_at_once
    )
    data = fusionlab.ImageTasks(tasks, batch_size=arguments.batch_size, cache_dir=arguments.cache)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=WARMUP + arguments.steps, max_epochs=-1, limit_val_batches=0,
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=arguments.cache, callbacks=[timed],
    )  # fmt: skip
    with contextlib.suppress(LeftError):
        trainer.fit(module, data)
    return timed.clock


def peak_bytes() -> int:
    """Peak memory of this process; what ``getrusage`` says begins with that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def run_child(arguments: argparse.Namespace) -> None:
    """Train in this process, and print its figures."""
    prepare_process(arguments.threads)
    timed = ByHand(arguments) if arguments.child == "by_hand" else Timed()
    clock = fit(json.loads(arguments.tasks), timed, arguments)
    seconds = [after - before for before, after in zip(clock[WARMUP - 1 :], clock[WARMUP:], strict=False)]
    peak = peak_bytes()
    speed = 1 / statistics.median(seconds)
    print(json.dumps({"steps_per_second": speed, "peak_bytes": peak, "training_bytes": peak - timed.before}))


def measured(side: str, tasks: list[dict[str, str]], cache: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures of one whole process."""
    command = [sys.executable, __file__, "--child", side, "--tasks", json.dumps(tasks), "--cache", str(cache)]
    for name in ("steps", "batch_size", "threads", "samples_at_once"):
        command += [f"--{name}", str(getattr(arguments, name))]
    started = time.perf_counter()
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"seconds": time.perf_counter() - started, **json.loads(told.splitlines()[-1])}


def figures(tasks: list[dict[str, str]], cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of one number of tasks, by side."""
    found: dict[str, Any] = {}
    for side in arguments.sides:
        if side != "apart":
            found[side] = measured(side, tasks, cache, arguments)
            continue
        parts = [measured("together", [task], cache, arguments) for task in tasks]
        found[side] = {
            "seconds": sum(part["seconds"] for part in parts),
            "steps_per_second": 1 / sum(1 / part["steps_per_second"] for part in parts),  # of all tasks, one by one
            **{name: max(part[name] for part in parts) for name in ("peak_bytes", "training_bytes")},
        }
    for side in set(found) - {"together"} if "together" in found else ():
        found[f"seconds_over_{side}"] = found["together"]["seconds"] / found[side]["seconds"]
        found[f"step_over_{side}"] = found[side]["steps_per_second"] / found["together"]["steps_per_second"]
    return found


def copies(tasks: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """So many tasks: the seven, then the same again under other names."""
    rounds = range(-(-number // len(tasks)))
    every = [{**task, "name": task["name"] + (f"-{turn + 1}" if turn else "")} for turn in rounds for task in tasks]
    return every[:number]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_tasks", type=int, nargs="+", default=[1, 2, 4, 7, 14, 20])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--steps", type=int, default=30, help=f"steps that are timed, after {WARMUP}")
    parser.add_argument("--batch_size", type=int, default=32, help="images of each task in a step")
    parser.add_argument(
        "--samples_at_once", type=lambda value: value if value == "auto" else int(value), default="auto"
    )
    parser.add_argument("--num_images", type=int, default=1000, help="training images of each task, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name in ("child", "tasks", "cache"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        run_child(arguments)
        return
    prepare_process(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        names = list(DRAWN_TASKS)[:7]
        tasks = [task for task in write_tasks(Path(folder), names, arguments.num_images) if isinstance(task, dict)]
        by_number = {
            number: figures(copies(tasks, number), Path(folder) / "cache", arguments) for number in arguments.num_tasks
        }
    record = {
        "benchmark": "many_tasks",
        "config": {name: value for name, value in vars(arguments).items() if name not in ("child", "tasks", "cache")},
        "by_number_of_tasks": by_number,
        "copies": {number: max(0, number - 7) for number in arguments.num_tasks},
        "target": {"seconds_over_apart": 0.6, "peak of 14 over 1": 1.3},
    } | where_measured("cpu")
    if {1, 14} <= by_number.keys() and "together" in arguments.sides:
        for name in ("peak_bytes", "training_bytes"):
            many, one = (by_number[number]["together"][name] for number in (14, 1))
            record[f"{name}_of_14_over_1"] = many / one
    print(json.dumps(record))


if __name__ == "__main__":
    main()
