"""What a rule on whole matrices is told, and says, of a recipe before any work: ranks that do not fit, and the time."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from fusionlab.fusing.inputs import Opened
from fusionlab.rules.matrices import MatrixRule
from fusionlab.streaming import Job

_TIMED_FLOPS = 2e9


def inner_matrix_rule(rule: object) -> MatrixRule | None:
    """The rule on matrices itself or inside transforms; None if there is none."""
    while not isinstance(rule, MatrixRule) and hasattr(rule, "rule"):
        rule = rule.rule
    return rule if isinstance(rule, MatrixRule) else None


def check_ranks(job: Job, inputs: Mapping[str, Opened]) -> None:
    """Let the rule refuse ranks that it cannot work on, as far as headers tell them.

    Raises:
        InputError: what the rule refuses.
    """
    rule = inner_matrix_rule(job.rule)
    for name in job.plan.fused if rule is not None else ():
        shape = job.base.tensors[name].shape
        if len(shape) == 2:
            ranks = [rank for opened in inputs.values() if (rank := _rank(opened, name, shape))]
            rule.check_ranks(name, (shape[0], shape[1]), ranks, min(shape[1], sum(ranks)))  # type: ignore[union-attr]


def _rank(opened: Opened, name: str, shape: tuple[int, ...]) -> int:
    """The most that the rank of a task matrix can be: an adapter's, which is 0 where it does not adapt the weight."""
    if opened.adapter is None:
        return min(shape)
    on_disk = {own: opened.names.get(own, own) for own in (f"{module}.weight" for module in opened.adapter.factors)}
    modules = [own.removesuffix(".weight") for own, stored in on_disk.items() if stored == name]
    if not modules:
        return min(shape) if name in opened.weights.tensors else 0  # several parts of one stored matrix
    factors = opened.adapter.factors[modules[0]]
    return min(*shape, factors.rank * (1 if factors.lora_b0 is None else 2))


def forecast(job: Job, threads: int) -> str | None:
    """How long the rule's steps will take, from one layer's product timed now; None where it takes few operations."""
    rule = inner_matrix_rule(job.rule)
    shapes = [job.base.tensors[name].shape for name in job.plan.fused]
    flops = {(shape[0], shape[1]): rule.flops((shape[0], shape[1])) for shape in shapes if rule and len(shape) == 2}
    total = sum(flops[shape[0], shape[1]] for shape in shapes if len(shape) == 2 and flops)
    if not total:
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
