"""Rules on whole matrices in a recipe: over adapters in core space, ranks that do not fit, and the time they take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fusionlab.commands.fuse.opened import Opened
from fusionlab.engine import Job, Outcome, Plan, Resources
from fusionlab.rules.by_tensor import ByTensor
from fusionlab.rules.matrix_rule import MatrixRule
from fusionlab.rules.weighted_by_grams import makes_adapters

_TIMED_FLOPS = 2e9


def in_core_space(rule: object, inputs: Mapping[str, Opened]) -> bool:
    """Whether the rule works on the cores, or the A, of the inputs, which are all adapters then."""
    return makes_adapters(rule) and all(opened.adapter is not None for opened in inputs.values())


def fuse_cores(job: Job, inputs: Mapping[str, Opened], resources: Resources) -> tuple[Any, Outcome]:
    """The adapter that the job's rule makes of the inputs in core space, and what was found out.

    Raises:
        InputError: NaN or Inf in an input, or what the rule refuses.
    """
    from fusionlab.adapters import fuse_in_core_space

    names = names_on_disk(inputs)
    adapters = {task: opened.adapter for task, opened in inputs.items()}

    def advance(module: str) -> None:
        if resources.on_bytes is not None:
            present = [adapter.factors[module] for adapter in adapters.values() if module in adapter.factors]
            resources.on_bytes(sum(factors.lora_a.nbytes + factors.lora_b.nbytes for factors in present))

    threads = max(1, min(resources.threads, resources.memory_budget // core_bytes(inputs)))
    fused, outcome = fuse_in_core_space(job.rule, adapters, names=names, threads=threads, on_module=advance)  # type: ignore[arg-type]
    remarks = {names.get(name, name): text for name, text in outcome.remarks.items()}
    sums = outcome.sums if job.cosines else {key: of for key, of in outcome.sums.items() if "inner" not in key}
    return fused, replace(outcome, remarks=remarks, sums=sums)


def names_on_disk(inputs: Mapping[str, Opened]) -> dict[str, str]:
    """Name in memory -> name in the base's files, where some input's differ."""
    return {name: on_disk for opened in inputs.values() for name, on_disk in opened.names.items()}


def core_bytes(inputs: Mapping[str, Opened]) -> int:
    """Peak bytes of one module in core space: the factors in float64, their bases and products, and the cores."""
    modules = {module for opened in inputs.values() for module in opened.adapter.factors}
    most = 0
    for module in modules:
        present = [opened.adapter.factors[module] for opened in inputs.values() if module in opened.adapter.factors]
        rank = sum(factors.rank for factors in present)
        sides, tasks = sum(present[0].shape), len(inputs)
        most = max(most, 8 * rank * (4 * sides + (tasks + 6) * min(rank, *present[0].shape)))
    return most


def inner_matrix_rule(rule: object) -> MatrixRule | None:
    """The rule on matrices itself or inside transforms; None if there is none."""
    while not isinstance(rule, MatrixRule):
        if isinstance(rule, ByTensor):
            rule = rule.sample
        elif hasattr(rule, "rule"):
            rule = rule.rule
        else:
            return None
    return rule


def transposed(rule: object, base: Opened, plan: Plan) -> frozenset[str]:
    """For a rule on matrices, the weights of linear layers that the base stores ``(in, out)``; nothing for others."""
    if inner_matrix_rule(rule) is None:
        return frozenset()
    matrices = (name for name in plan.fused if name.endswith(".weight") and len(base.shapes.get(name, ())) == 2)
    return frozenset(name for name in matrices if base.architecture.is_transposed(name.removesuffix(".weight")))


def _sides(job: Job, name: str) -> tuple[int, int] | None:
    """``(out, in)`` of a weight; None where it is no matrix."""
    shape = job.base.tensors[name].shape
    if len(shape) != 2:
        return None
    return (shape[1], shape[0]) if name in job.transposed else (shape[0], shape[1])


def check_ranks(job: Job, inputs: Mapping[str, Opened]) -> None:
    """Let the rule refuse ranks that it cannot work on, as far as headers tell them.

    Raises:
        InputError: what the rule refuses.
    """
    rule = inner_matrix_rule(job.rule)
    for name in job.plan.fused if rule is not None else ():
        if (shape := _sides(job, name)) is not None:
            found = {task: rows for task, opened in inputs.items() if (rows := _rows(opened, name, shape)) is not None}
            ranks = [rank for rank, _ in found.values()]
            distinct: list[torch.Tensor | None] = []
            joint = 0
            for rank, lora_a in found.values():
                known = lora_a is not None and any(each is not None and torch.equal(each, lora_a) for each in distinct)
                joint += 0 if known else rank
                distinct.append(lora_a)
            rule.check_ranks(name, shape, ranks, min(shape[1], joint))  # type: ignore[union-attr]


def _rows(opened: Opened, name: str, shape: tuple[int, ...]) -> tuple[int, torch.Tensor | None] | None:
    """The most that the rank of a task matrix can be, and the A that spans its rows; None where it is zero."""
    if opened.adapter is None:
        return min(shape), None
    modules = [
        module for module in opened.adapter.factors if opened.names.get(f"{module}.weight", f"{module}.weight") == name
    ]
    if not modules:
        return None
    factors = opened.adapter.factors[modules[0]]
    return min(*shape, factors.rank), factors.lora_a


def forecast(job: Job, inputs: Mapping[str, Opened], threads: int) -> str | None:
    """How long the rule's steps will take, from one layer's product timed now; None where it takes few operations."""
    rule = inner_matrix_rule(job.rule)
    shapes = [shape for name in job.plan.fused if (shape := _sides(job, name)) is not None]
    flops = {} if rule is None else {shape: rule.flops(shape) for shape in shapes}
    total = sum(flops.get(shape, 0.0) for shape in shapes)
    if not total or in_core_space(job.rule, inputs):
        return None
    rows, width = max(flops, key=lambda shape: flops[shape])
    rows = max(1, min(rows, int(_TIMED_FLOPS / (2 * width**2))))
    left, right = torch.ones(rows, width), torch.ones(width, width)
    left @ right  # warm
    started = time.perf_counter()
    left @ right
    seconds = time.perf_counter() - started
    rate = 2 * rows * width**2 / seconds / torch.get_num_threads()
    return (
        f"about {_duration(total / (rate * threads))} for {total:.2g} operations, by a product of {rows} x {width} and "
        f"{width} x {width} timed now, on {threads} threads"
    )


def _duration(seconds: float) -> str:
    """Two digits of the unit that fits.

    Example:
        >>> _duration(0.2), _duration(45.2), _duration(700), _duration(9100)
        ('0.2 s', '45 s', '12 min', '2.5 h')
    """
    for limit, unit, text in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {text}"
    return f"{seconds / 3600:.2g} h"
