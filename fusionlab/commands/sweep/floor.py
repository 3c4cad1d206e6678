"""The least that a sweep takes: its distinct models' rows at the cost of a bare forward, one process a core, and fits.

Counted apart from the forecast, which says what the sweep will take; their ratio tells what is lost between.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.forecast import Forecast, duration, seconds_of_fit, steps_of
from fusionlab.commands.sweep.recipe import is_sum
from fusionlab.commands.sweep.timing import bare_seconds, slowdown
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.rules import AnyRule, Average, TaskArithmetic, is_open
from fusionlab.search import Search

LOOKS = 5.5  # at validation, by a rule whose coefficient is searched


@dataclass(frozen=True)
class Floor:
    """The least that a sweep takes.

    Args:
        test_rows: distinct models times the test samples that each is scored on.
        looked_at: validation samples times looks.
        milliseconds: of a bare forward while all cores work, a sample, on average.
        fit_seconds: of all fits.
        cores: which each run one process.
        seconds: in all.
    """

    test_rows: float
    looked_at: float
    milliseconds: float
    fit_seconds: float
    cores: int
    seconds: float

    def told(self) -> str:
        """As ``--dry_run`` prints it."""
        return (
            f"floor: {duration(self.seconds)} = ({self.test_rows:,.0f} samples under distinct models and "
            f"{self.looked_at:,.0f} looked at x {self.milliseconds:.2f} ms of a bare forward + "
            f"{duration(self.fit_seconds)} of fits) / {self.cores} cores"
        )


def floor(sweep: Sweep, expected: Forecast) -> Floor:
    """Count distinct models and looks, and time bare forwards, one thread a core at once; writes nothing.

    Args:
        sweep: the sweep.
        expected: its forecast, whose training steps are not timed again where they were of one thread.
    """
    test, looked = distinct_rows(sweep)
    cores = torch.get_num_threads() if sweep.bench.module.device.type == "cpu" else 1
    bare = bare_seconds(sweep.bench.module, sweep.bench.data, cores)
    running = sum((test[task] + looked[task]) * bare[task] for task in sweep.tasks)
    steps = expected.steps if expected.threads == 1 else _steps_of_one_thread(sweep, cores)
    fits = sum(seconds_of_fit(sweep, source, steps, bare) for source in sweep.sources if not source.is_finished)
    rows = sum(test.values()) + sum(looked.values())
    seconds = (running + fits) / cores
    return Floor(sum(test.values()), sum(looked.values()), 1e3 * running / rows, fits, cores, seconds)


def _steps_of_one_thread(sweep: Sweep, cores: int) -> dict[str, float]:
    """Seconds of a training step of each method, while all cores work."""
    threads, times = torch.get_num_threads(), slowdown(sweep.bench.module, sweep.bench.data, cores)
    torch.set_num_threads(1)
    try:
        return {method: times * seconds for method, seconds in steps_of(sweep).items()}
    finally:
        torch.set_num_threads(threads)


def distinct_rows(sweep: Sweep) -> tuple[dict[str, float], dict[str, float]]:
    """By task, test samples times distinct models, and samples times looks (of the published protocol at test).

    Weighted sums of linearized models cost one pass for the base and one for each task vector, whatever is summed.
    """
    sizes = {split: {task: len(sweep.bench.data.splits[task][split]) for task in sweep.tasks}
             for split in ("validation", "test")}  # fmt: skip
    test, looked = (dict.fromkeys(sweep.tasks, 0.0) for _ in range(2))
    for source in sweep.sources:
        is_linear = source.method in LINEARIZED_METHODS
        apart = {name: rule for name, rule in sweep.rules.items() if not (is_linear and is_sum(rule))}
        sums = [rule for name, rule in sweep.rules.items() if name not in apart]
        models = {
            _model(name, rule, subset): sweep.scored(subset) for name, rule in apart.items() for subset in sweep.subsets
        }
        together = 1 + len(sweep.tasks)
        for task in sweep.tasks:
            passes = sum(task in scored for scored in models.values()) + (together if sums else 0)
            test[task] += sizes["test"][task] * (passes + 1)  # and the model fine-tuned on it
            if any(is_open(rule) or isinstance(rule, Search) for rule in sums):
                looked[task] += together * sizes["validation"][task]
        for rule in apart.values():
            for subset in sweep.subsets:
                _look(sweep, rule, subset, sizes, looked)
    return test, looked


def _look(
    sweep: Sweep, rule: AnyRule | Search, subset: tuple[str, ...], sizes: Mapping[str, Any], looked: dict[str, float]
) -> None:
    looks = LOOKS if sweep.recipe.grid is None else len(sweep.recipe.grid)
    if isinstance(rule, Search):
        for task in subset:
            looked[task] += rule.expected_rows(sizes["validation"][task])
    elif is_open(rule):
        for protocol in sweep.recipe.protocols:
            split, tasks = ("validation", subset) if protocol == "strict" else ("test", sweep.tasks)
            for task in tasks:
                looked[task] += looks * sizes[split][task]


def _model(name: str, rule: AnyRule | Search, subset: tuple[str, ...]) -> Hashable:
    """Equal for rules that give one model of a subset by construction."""
    given = rule.scaling_coefficient if isinstance(rule, TaskArithmetic) else None
    value = 1 / len(subset) if isinstance(rule, Average) and rule.weights is None else given
    if isinstance(value, int | float):
        return ("sum", value, subset) if value else ("sum",)
    if isinstance(rule, Search) or is_open(rule):
        return name, subset
    return repr(rule), subset
