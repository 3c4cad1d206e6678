"""How long a sweep will take: some batches are timed, rows of every split counted and priced apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.processes import num_processes
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.contracts import Data, Module
from fusionlab.evaluation.loop import evaluating, to_device
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.rules import AnyRule, is_open
from fusionlab.search import MEAN_LOOKS, Search

SECONDS_OF_TIMING = 20.0
START_SECONDS = 10.0  # of a fit: the process of training begins, prepares tasks, writes
# one training step, in forward passes over its samples: what is trained needs its gradient, or a jvp and its gradient
STEP_FORWARDS = {"full": 3.0, "lora": 2.5, "l_lora": 2.5, "tangent_lora": 4.5, "tangent": 6.0}
TANGENT_FORWARDS = 3.0  # J τ beside f


@dataclass(frozen=True)
class Forecast:
    """What is to be done, and how long that takes.

    Args:
        fits: runs to fit.
        points: models to score, about.
        rows: samples to run through them, by split, about.
        seconds: in all, with ``processes`` that have ``threads`` each.
        processes: of this machine.
        threads: of each.
    """

    fits: int
    points: int
    rows: Mapping[str, float]
    seconds: float
    processes: int
    threads: int

    def told(self, recipe: SweepRecipe, num_runs: int, num_subsets: int, num_tasks: int) -> str:
        """The plan, as ``--dry_run`` prints it."""
        samples = ", ".join(f"{count:,.0f} of {split}" for split, count in self.rows.items())
        budget = recipe.budget_minutes
        within = f"; {budget:g} min are given" if budget is not None else ""
        return (
            f"{num_runs} runs ({self.fits} to fit), {num_subsets} subsets of {num_tasks} tasks, "
            f"{len(recipe.named_rules)} rules\n"
            f"points: about {self.points}; samples to run through models: {samples}\n"
            f"estimated time: {duration(self.seconds)}, {self.processes} x {self.threads} threads{within} (a batch of "
            f"each task was timed; what is in the ledger, and models that are equal, cost nothing)"
        )


def forecast(sweep: Sweep) -> Forecast:
    """Time a batch of every task with pretrained weights, and count what the sweep runs.

    Points that are in the ledger are counted as if they were not.
    """
    processes = num_processes(sweep.recipe, len(sweep.sources), sweep.bench.module.device)
    threads = torch.get_num_threads()
    own = max(1, threads // processes)
    torch.set_num_threads(own)
    try:
        per_sample = _seconds_a_sample(sweep.bench.module, sweep.bench.data)
    finally:
        torch.set_num_threads(threads)
    points, rows, seconds = num_points(sweep), {"validation": 0.0, "test": 0.0}, 0.0
    for is_linear, runs in Counter(source.method in LINEARIZED_METHODS for source in sweep.sources).items():
        for split, by_task in _Rows(sweep, is_linear).by_task.items():
            rows[split] += runs * sum(by_task.values())
            seconds += runs * sum(count * per_sample[task] for task, count in by_task.items())
    missing = [source for source in sweep.sources if not source.is_finished]
    fitting = sum(_seconds_of_fit(sweep, source, per_sample) for source in missing)
    whole = (seconds + fitting) / processes
    return Forecast(len(missing), points, rows, whole, processes, own)


def num_points(sweep: Sweep) -> int:
    """About how many models are scored."""
    return round(len(sweep.sources) * _Rows(sweep, False).points)


class _Rows:
    """Samples that one run's models are run on, by split and task; of sums of tangents, in forward passes.

    Args:
        sweep: the sweep.
        is_linear: whether all of the run's models are scored from one pass for each task vector.
    """

    def __init__(self, sweep: Sweep, is_linear: bool) -> None:
        splits = sweep.bench.data.splits
        self._sizes = {
            split: {task: len(splits[task][split]) for task in sweep.tasks} for split in ("validation", "test")
        }
        self.by_task = {split: dict.fromkeys(sweep.tasks, 0.0) for split in self._sizes}
        self.points = 0.0
        self._add("test", sweep.tasks, 1.0)  # each fine-tuned model on its own task
        for rule in sweep.rules.values():
            for subset in sweep.subsets:
                self._count(sweep, rule, subset)
        if is_linear:
            passes = 1 + TANGENT_FORWARDS * len(sweep.tasks)
            self.by_task = {
                split: {task: passes * size for task, size in of.items()} for split, of in self._sizes.items()
            }

    def _count(self, sweep: Sweep, rule: AnyRule | Search, subset: tuple[str, ...]) -> None:
        grid, protocols = sweep.recipe.grid, sweep.recipe.protocols
        looks = MEAN_LOOKS if grid is None else len(grid)
        if isinstance(rule, Search):
            for task in subset:
                self.by_task["validation"][task] += rule.expected_rows(self._sizes["validation"][task])
            self.points += 1
        elif is_open(rule):
            for protocol in protocols:
                split, tasks = ("validation", subset) if protocol == "strict" else ("test", sweep.tasks)
                self._add(split, tasks, looks)
                self.points += looks
            if "strict" not in protocols:
                return  # what was looked at is what is reported
        self._add("test", sweep.tasks, 1.0)
        self.points += 1

    def _add(self, split: str, tasks: tuple[str, ...], passes: float) -> None:
        for task in tasks:
            self.by_task[split][task] += passes * self._sizes[split][task]


def _seconds_a_sample(module: Module, data: Data) -> dict[str, float]:
    """By task, of a test batch under the pretrained model; tasks that there is no time for cost the others' mean."""
    found: dict[str, float] = {}
    started = time.monotonic()
    with evaluating(module), module.use(None):
        for task in data.tasks:
            if found and time.monotonic() - started > SECONDS_OF_TIMING:
                break
            batch = to_device(next(iter(data.eval_batches(task, "test"))), module.device)
            for _again in range(1 if found else 2):  # the first run of all warms up
                before = time.monotonic()
                module.score(task, batch, module.metrics(task))
                seconds = time.monotonic() - before
            found[task] = seconds / max(1, int(batch["mask"].sum()))
    mean = sum(found.values()) / len(found)
    return {task: found.get(task, mean) for task in data.tasks}


def _seconds_of_fit(sweep: Sweep, source: RunSource, per_sample: Mapping[str, float]) -> float:
    """Training, and the scores of pretrained and fine-tuned models that a run ends with."""
    data, trainer = sweep.bench.data, (source.config or {}).get("trainer") or {}
    steps = int(trainer.get("max_steps") or 0)
    if steps < 1:
        longest = max(len(data.splits[task]["train"]) for task in sweep.tasks)
        steps = int(trainer.get("max_epochs") or 1) * -(-longest // data.batch_size)
    trained = STEP_FORWARDS[source.method] * steps * data.batch_size * sum(per_sample.values())
    scored = 2 * sum(per_sample[task] * len(data.splits[task]["test"]) for task in sweep.tasks)
    return START_SECONDS + trained + scored


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(42), duration(150), duration(9000)
        ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
