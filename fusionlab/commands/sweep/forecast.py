"""How long a sweep will take: some batches are timed, rows of every split counted and priced apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusionlab.adapters import Adapter, Factors, laid_out, match_targets
from fusionlab.adapters.targets import base_layer, layer_shape
from fusionlab.commands.fit import TRAINER_DEFAULTS
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.processes import num_processes
from fusionlab.commands.sweep.recipe import SweepRecipe, is_sum
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.commands.sweep.steps import seconds_of_step
from fusionlab.commands.sweep.timing import slowdown
from fusionlab.contracts import Data, as_data
from fusionlab.evaluation.loop import evaluating, to_device
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.modules import FusionModule
from fusionlab.rules import AnyRule, is_open
from fusionlab.samplers import bounded
from fusionlab.search import MEAN_LOOKS, Search
from fusionlab.search.looks import NUM_STEPS
from fusionlab.search.workbench import data_of

SECONDS_OF_TIMING = 20.0
START_SECONDS = 10.0  # of a fit: the process of training begins, prepares tasks, writes
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
        steps: seconds of a training step, by method that is to be fitted, while all processes work.
    """

    fits: int
    points: int
    rows: Mapping[str, float]
    seconds: float
    processes: int
    threads: int
    steps: Mapping[str, float]

    def told(self, recipe: SweepRecipe, num_runs: int, num_subsets: int, num_tasks: int) -> str:
        """The plan, as ``--dry_run`` prints it."""
        samples = ", ".join(f"{count:,.0f} of {split}" for split, count in self.rows.items())
        budget = recipe.budget_minutes
        within = f"; {budget:g} min are given" if budget is not None else ""
        return (
            f"{num_runs} runs ({self.fits} to fit), {num_subsets} subsets of {num_tasks} tasks, "
            f"{len(recipe.named_rules)} rules\n"
            f"points: about {self.points}; samples to run through models: {samples}\n"
            f"estimated time: {duration(self.seconds)}, {self.processes} x {self.threads} threads{within} (a batch "
            f"of each task was timed, and steps of what is to be fitted; what is in the ledger, and models that are "
            f"equal, cost nothing)"
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
        methods = Counter(source.method for source in sweep.sources)
        until = SECONDS_OF_TIMING / len(methods)
        per_sample = {method: _seconds_a_sample(sweep, as_fused(sweep, method), until) for method in methods}
        times = slowdown(sweep.bench.module, sweep.bench.data, processes)
        steps = {method: times * seconds for method, seconds in steps_of(sweep).items()}
        per_sample = {
            method: {task: times * seconds for task, seconds in of.items()} for method, of in per_sample.items()
        }
    finally:
        torch.set_num_threads(threads)
    points, rows, seconds = num_points(sweep), {"validation": 0.0, "test": 0.0}, 0.0
    for method, runs in methods.items():
        for split, by_task in _Rows(sweep, method in LINEARIZED_METHODS).by_task.items():
            rows[split] += runs * sum(by_task.values())
            seconds += runs * sum(count * per_sample[method][task] for task, count in by_task.items())
    missing = [source for source in sweep.sources if not source.is_finished]
    fitting = sum(seconds_of_fit(sweep, source, steps, per_sample[source.method]) for source in missing)
    whole = (seconds + fitting) / processes
    return Forecast(len(missing), points, rows, whole, processes, own, steps)


def num_points(sweep: Sweep) -> int:
    """About how many points and searches the ledger will have."""
    return round(sum(_Rows(sweep, source.method in LINEARIZED_METHODS).points for source in sweep.sources))


class _Rows:
    """Samples that one run's models are run on, by split and task; of sums of tangents, in forward passes.

    Args:
        sweep: the sweep.
        is_linear: whether the run's weighted sums are scored from one pass for each task vector.
    """

    def __init__(self, sweep: Sweep, is_linear: bool) -> None:
        splits = sweep.bench.data.splits
        self._sizes = {
            split: {task: len(splits[task][split]) for task in sweep.tasks} for split in ("validation", "test")
        }
        self.by_task = {split: dict.fromkeys(sweep.tasks, 0.0) for split in self._sizes}
        self.points, self._is_linear = 0.0, is_linear
        if not is_linear:
            self._add("test", sweep.tasks, 1.0)  # each fine-tuned model on its own task
        for rule in sweep.rules.values():
            for subset in sweep.subsets:
                self._count(sweep, rule, subset)
        if is_linear:  # of one pass for each task vector the fine-tuned models are scored too
            looks = any(map(is_sum, sweep.rules.values()))
            for split in self._sizes if looks else ("test",):
                self._add(split, sweep.tasks, 1 + TANGENT_FORWARDS * len(sweep.tasks))

    def _count(self, sweep: Sweep, rule: AnyRule | Search, subset: tuple[str, ...]) -> None:
        grid, protocols = sweep.recipe.grid, sweep.recipe.protocols
        together = self._is_linear and is_sum(rule)  # of these the rows are counted once for all
        times = 0.0 if together else TANGENT_FORWARDS if self._is_linear else 1.0
        looks = len(grid) if grid is not None else NUM_STEPS if together else MEAN_LOOKS
        if isinstance(rule, Search):
            for task in subset:
                size = self._sizes["validation"][task]
                self.by_task["validation"][task] += times * rule.expected_rows(size)
            self.points += 1 + rule.expected_points(together)
        elif is_open(rule):
            for protocol in protocols:
                split, tasks = ("validation", subset) if protocol == "strict" else ("test", sweep.tasks)
                self._add(split, tasks, times * looks)
                self.points += looks
            if "strict" not in protocols:
                return  # what was looked at is what is reported
        self._add("test", sweep.scored(subset), times)
        self.points += 1

    def _add(self, split: str, tasks: tuple[str, ...], passes: float) -> None:
        for task in tasks:
            self.by_task[split][task] += passes * self._sizes[split][task]


def as_fused(sweep: Sweep, method: str) -> Adapter | None:
    """An adapter of zeros, as large as fused ones of the method are on average; None where they are no adapters."""
    module = sweep.bench.module
    if method not in ("lora", "l_lora") or not isinstance(module, FusionModule):
        return None
    model, backbone = module.base_model, module.backbone
    rank = module.rank  # fused l_lora adapters have that of one
    if method == "lora":
        rank = round(rank * sum(map(len, sweep.subsets)) / len(sweep.subsets))
    factors = {}
    for name in match_targets(
        model, module.adaptation.target_modules or backbone.default_target_modules, backbone.scope
    ):
        rows, columns = layer_shape(base_layer(model.get_submodule(name)))
        factors[name] = Factors(torch.zeros(rank, columns), torch.zeros(rows, rank), float(rank))
    return laid_out(model, Adapter(factors, method, backbone.name, None, 0))


def _seconds_a_sample(sweep: Sweep, weights: Adapter | None, seconds_at_most: float) -> dict[str, float]:
    """By task, of a test batch under weights; tasks that there is no time for cost the others' mean."""
    module, data = sweep.bench.module, sweep.bench.data
    found: dict[str, float] = {}
    started = time.monotonic()
    with evaluating(module), module.use(weights):
        for task in data.tasks:
            if found and time.monotonic() - started > seconds_at_most:
                break
            batch = to_device(next(iter(data.eval_batches(task, "test"))), module.device)
            for _again in range(1 if found else 2):  # the first run of all warms up
                before = time.monotonic()
                module.score(task, batch, module.metrics(task))
                seconds = time.monotonic() - before
            found[task] = seconds / max(1, int(batch["mask"].sum()))
    mean = sum(found.values()) / len(found)
    return {task: found.get(task, mean) for task in data.tasks}


def steps_of(sweep: Sweep) -> dict[str, float]:
    """Seconds of a training step with this process's threads, by method that is to be fitted."""
    each = {source.method: source for source in sweep.sources if not source.is_finished}
    return {method: seconds_of_step(of.config or {}, _trained_on(sweep, of)) for method, of in each.items()}


def _trained_on(sweep: Sweep, source: RunSource) -> Data:
    """The data that a run is fitted with, such as in batches of another size than those that models are scored with."""
    config = source.config or {}
    same = (config.get("data") or {}) == (sweep.config.get("data") or {})
    return sweep.bench.data if same else as_data(data_of(config), is_set_up=False)


def seconds_of_fit(
    sweep: Sweep, source: RunSource, steps: Mapping[str, float], per_sample: Mapping[str, float]
) -> float:
    """Training, and the scores of pretrained and fine-tuned models that a run ends with."""
    data = sweep.bench.data
    longest = max(len(data.splits[task]["train"]) for task in sweep.tasks)
    batches = -(-longest // _trained_on(sweep, source).batch_size)
    count = num_batches((source.config or {}).get("trainer") or {}, batches)
    scored = 2 * sum(per_sample[task] * len(data.splits[task]["test"]) for task in sweep.tasks)
    return START_SECONDS + count * steps[source.method] + scored


def num_batches(trainer: Mapping[str, Any], of_epoch: int) -> int:
    """Micro-batches that a fit trains on: by steps or epochs, whichever end it first, as ``fit`` has them by default.

    Example:
        >>> num_batches({}, 32), num_batches({"max_steps": -1, "max_epochs": 2}, 32)
        (80, 64)
        >>> num_batches({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5}, 32)
        10
    """
    given = TRAINER_DEFAULTS | {name: value for name, value in trainer.items() if value is not None}
    of_epoch = bounded(of_epoch, given.get("overfit_batches") or given.get("limit_train_batches", 1.0))
    steps, epochs = int(given["max_steps"]), int(given["max_epochs"])
    ends = [steps * int(given.get("accumulate_grad_batches", 1))] if steps > 0 else []
    return min([*ends, *([epochs * of_epoch] if epochs > 0 else [])], default=of_epoch)


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(42), duration(150), duration(9000)
        ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
