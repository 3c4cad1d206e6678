"""Question: how long is a training step of a whole fit with the tasks' samples together, beside one task after another?

The eight embedded tasks on tiny-clip, fits of a few steps by turns for each number of samples at once, 0 being one task
after another; the first two steps of a fit are left out. Unlike ``bench_fit_step.py --grouped``, which pauses one fit
for two steps of the other, each fit runs undisturbed. Prints one JSON record: the median step and its ratio to 0's.

    python benchmarks/bench_grouped_fit.py --method lora --threads 2
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

import fusionlab


class Clock(Callback):
    """Seconds of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def steps_of(samples_at_once: int, steps: int, method: Any, batch_size: int) -> list[float]:
    """Seconds of the steps of one fit, but for the first two."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps, callbacks=[clock], default_root_dir=folder, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        module = fusionlab.ClipModule("tiny-clip", method=method, samples_at_once=samples_at_once)
        trainer.fit(module, fusionlab.ImageTasks(batch_size=batch_size))
    return clock.seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora", choices=["lora", "l_lora"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples_at_once", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    seconds: dict[int, list[float]] = {number: [] for number in (0, *args.samples_at_once)}
    for _ in range(args.rounds):
        for number, taken in seconds.items():
            taken += steps_of(number, args.steps, args.method, args.batch_size)
    medians = {number: statistics.median(taken) for number, taken in seconds.items()}
    found = {n: {"median_seconds": round(m, 4), "over_apart": round(m / medians[0], 3)} for n, m in medians.items()}
    print(json.dumps({"benchmark": "grouped_fit", "config": vars(args), "samples_at_once": found}))


if __name__ == "__main__":
    main()
