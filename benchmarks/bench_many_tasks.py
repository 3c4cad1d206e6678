"""Seven embedded tasks in one fit, against seven separate fits: wall clock of whole processes, in turn in one run.

python benchmarks/bench_many_tasks.py [--repeats 1] [--max_steps 100]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning
import torch

from fusionlab.data.images import EMBEDDED_TASKS


def seconds_of_fit(tasks: list[str], folder: Path, extra: list[str]) -> float:
    """Wall-clock seconds of one whole ``fit`` process."""
    command = [sys.executable, "-m", "fusionlab", "fit", "--data.tasks", json.dumps(tasks)]
    start = time.perf_counter()
    subprocess.run([*command, "--trainer.default_root_dir", str(folder), *extra], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=None, help="training steps; the default of fit if absent")
    parser.add_argument("--num_tasks", type=int, default=7)
    options = parser.parse_args()
    tasks = EMBEDDED_TASKS[: options.num_tasks]
    extra = [] if options.max_steps is None else ["--trainer.max_steps", str(options.max_steps)]
    together, apart = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            root = Path(scratch) / str(repeat)
            together.append(seconds_of_fit(tasks, root / "together", extra))
            apart.append(sum(seconds_of_fit([task], root / task, extra) for task in tasks))
    ratios = [one / many for one, many in zip(together, apart, strict=True)]
    record = {
        "benchmark": "many_tasks",
        "tasks": tasks,
        "one_fit_seconds": together,
        "separate_fits_seconds": apart,
        "ratio": statistics.median(ratios),
        "target": 0.6,
        "cpus": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
