"""What is checked and said of a fusion before anything is read but headers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from fusionlab import engine, rules
from fusionlab.blocks.task_vectors import Statistics
from fusionlab.commands.fuse.opened import Opened
from fusionlab.engine import Job, Resources
from fusionlab.engine.job import inner_linear_rule
from fusionlab.errors import InputError, name_list
from fusionlab.rules import StreamedRule
from fusionlab.rules.by_tensor import ByTensor
from fusionlab.rules.config import check_tasks, scale_of_base
from fusionlab.rules.weighted_by_fisher import WeightedByFisher
from fusionlab.rules.weighted_by_grams import WeightedByGrams
from fusionlab.tensors.identity import equal_matrices


def check_memory(rule: StreamedRule, peak: tuple[int, str], resources: Resources) -> None:
    """Raise if the rule needs more memory than the budget.

    Args:
        rule: the rule.
        peak: the bytes that it needs, and for what.
        resources: with the budget.

    Raises:
        InputError: with both numbers.
    """
    needed, what = peak
    if needed > resources.memory_budget:
        raise InputError(
            f"memory_budget: {rules.rule_name(rule)} on {what} needs {needed:,} bytes, the budget is "
            f"{resources.memory_budget:,}; give a larger --memory_budget or another rule."
        )


def check_disk(output: Path, needed: int) -> None:
    """Raise if the disk of ``output`` has less room than the bytes ``needed``.

    Raises:
        InputError: with both numbers.
    """
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"the disk of {str(output)!r} is too small: {needed:,} bytes are needed, {free:,} are free.")


def try_rule(job: Job) -> None:
    """Let the rule meet these tasks and names on tiny tensors, so that what does not fit is known at once."""
    check_tasks(job.rule, tuple(job.inputs))
    if any(item.is_task_vector or item.is_part for item in job.inputs.values()):
        _check_scale(job)
    if isinstance(job.rule, WeightedByGrams | WeightedByFisher):
        job.rule.check(tuple(job.inputs), job.plan.fused)
        return
    if isinstance(job.rule, ByTensor):
        job.rule.table(job.statistics({}))
    linear = inner_linear_rule(job.rule)
    if linear is not None and not linear.passes:
        statistics = job.statistics({})
        for name in job.plan.fused:
            linear.coefficients(name, statistics.tasks, statistics)
        return
    engine.try_rule(job.rule, job.inputs, job.plan.fused[:2])


def _check_scale(job: Job) -> None:
    """Raise if the rule would multiply tensors of the base that no input holds.

    Raises:
        InputError: with the first of them.
    """
    statistics = job.statistics({})
    untouched = (name for name in job.plan.copied if name not in job.plan.aliases)
    scaled = {name: scale for name in untouched if (scale := _scale_at(job.rule, name, statistics)) != 1.0}
    if scaled:
        first = next(iter(scaled))
        raise InputError(
            f"passthrough.scale {scaled[first]} scales the whole model, and the inputs leave {len(scaled)} of the "
            f"tensors that it is for to the base, such as {first}; give full models, or leave scale out."
        )


def _scale_at(rule: StreamedRule, name: str, statistics: Statistics) -> float:
    """What the rule would multiply a tensor of the base by; 1 where it says nothing of it."""
    try:
        return float(scale_of_base(rule.at(name, statistics) if isinstance(rule, ByTensor) else rule))
    except InputError:  # it has no value there
        return 1.0


def tie_notes(base: Opened, untied: Mapping[str, str]) -> list[str]:
    """What was taken for two tensors though the base ties them, or though they are equal."""
    notes = [
        f"{name} changes apart from {own}, to which the base ties it: they are two tensors here"
        for name, own in untied.items()
    ]
    if base.architecture.source is None and (equal := equal_matrices(base.weights)):
        pairs = name_list(f"{first} and {name}" for first, name in equal)
        notes.append(f"equal tensors, taken for different ones, as config.json names no known architecture: {pairs}")
    return notes
