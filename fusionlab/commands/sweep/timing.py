"""What a sample costs in the bare network, by one process or by several that work at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fusionlab.contracts import Data, Module
from fusionlab.evaluation.loop import evaluating, to_device
from fusionlab.modules.images import ImageClassifier

BATCH, TIMED = 100, 3
SECONDS_OF_TIMING = 10.0


def bare_seconds(module: Module, data: Data, at_once: int = 1, until: float = SECONDS_OF_TIMING) -> dict[str, float]:
    """By task, of one test sample in a batch of 100 through the pretrained network alone, by one thread.

    Images go through the image tower, once for all tasks, as they are of one shape; texts through all that is run of a
    task's inputs.

    Args:
        module: of any kind.
        data: whose batches are taken.
        at_once: so many threads do the same at once, as processes of a sweep do: cores that are all at work share the
            memory's speed and the clock's, and each is slower than one alone.
        until: seconds after which no other task is timed; those that are not cost the others' mean.
    """
    threads, started = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    try:
        with evaluating(module), module.use(None), ThreadPoolExecutor(at_once) as pool:
            if isinstance(module, ImageClassifier):
                images = _batch(data, data.task_names[0], module)["images"]
                seconds = _seconds(pool, at_once, module, lambda: module.backbone.image_features(images))
                return dict.fromkeys(data.tasks, seconds / BATCH)
            found: dict[str, float] = {}
            for task in data.tasks:
                if found and time.monotonic() - started > until:
                    break
                batch = to_device(next(iter(data.eval_batches(task, "test"))), module.device)
                seconds = _seconds(pool, at_once, module, lambda task=task, batch=batch: module.run_inputs(task, batch))
                found[task] = seconds / len(batch["mask"])
            mean = statistics.fmean(found.values())
            return {task: found.get(task, mean) for task in data.tasks}
    finally:
        torch.set_num_threads(threads)


def slowdown(module: Module, data: Data, at_once: int) -> float:
    """How many times longer a sample takes while so many threads work at once; at least 1."""
    if at_once == 1:
        return 1.0
    alone, together = (sum(bare_seconds(module, data, count, until=0.0).values()) for count in (1, at_once))
    return max(1.0, together / alone)


def _batch(data: Data, task: str, module: Module) -> dict[str, Any]:
    split = data.splits[task]["test"]
    return to_device(split.batch(torch.arange(BATCH) % len(split)), module.device)


def _seconds(pool: ThreadPoolExecutor, at_once: int, module: Module, run: Callable[[], object]) -> float:
    """Median of a few runs of every thread, after one that warms up."""

    def timed(_number: int) -> list[float]:
        taken = []
        with torch.no_grad(), module.evaluation_context():  # both are a thread's own
            for _ in range(1 + TIMED):
                started = time.monotonic()
                run()
                taken.append(time.monotonic() - started)
        return taken[1:]

    return statistics.median(seconds for found in pool.map(timed, range(at_once)) for seconds in found)
