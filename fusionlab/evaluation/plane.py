"""The plane θ₀ + λ₁τ₁ + λ₂τ₂ of two tasks: loss, accuracy, and how far the two disentangle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from fusionlab.adapters.weights import Weights
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.contracts import Batch, Data, Module
from fusionlab.errors import InputError, did_you_mean
from fusionlab.evaluation.linear import sum_of
from fusionlab.evaluation.loop import Acting, count_batches, rank_and_world_size
from fusionlab.fusion.base import Base
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules import TaskArithmetic
from fusionlab.tensors.masked import MaskedVectors

Point = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """What was measured on a grid; all by point ``(λ₁, λ₂)``.

    Args:
        tasks: the two tasks.
        grid: the values of λ₁ and of λ₂.
        disentanglement: weight disentanglement error ξ, 0..2.
        loss: mean cross-entropy, by point and task.
        accuracy: top-1 accuracy, by point and task.
        passes: how often the network ran over the samples of both tasks, in forward passes.
    """

    tasks: tuple[str, str]
    grid: tuple[float, ...]
    disentanglement: dict[Point, float]
    loss: dict[Point, dict[str, float]]
    accuracy: dict[Point, dict[str, float]]
    passes: int


def grid_of(size: int, bound: float = 2.0) -> tuple[float, ...]:
    """``size`` values from −bound to bound; an odd size has 0 among them.

    Example:
        >>> grid_of(5)
        (-2.0, -1.0, 0.0, 1.0, 2.0)
    """
    return tuple(round(bound * (2 * step / (size - 1) - 1), 10) for step in range(size))


def measure_plane(
    module: Module,
    data: Data,
    finetuned: Mapping[str, Weights],
    tasks: Sequence[str],
    grid: Sequence[float],
    split: str = "validation",
    num_batches: int | None = None,
) -> Plane:
    """Loss, accuracy and weight disentanglement error on a grid.

    ξ(λ₁, λ₂) = Σ_t E_{x of task t} [pred(θ₀ + λ_t τ_t) ≠ pred(θ₀ + λ₁τ₁ + λ₂τ₂)], t in {1, 2}. Tangent models are
    linear in what the network gives, so that the whole grid costs one primal and two tangents; others run the network
    once per point. Whole batches are dealt to the ranks; sums are of integers, or exact.

    Args:
        module: a prepared module whose tasks have classes.
        data: a data module that is set up.
        finetuned: by task; the two tasks are taken from it.
        tasks: the two tasks.
        grid: values of λ₁ and of λ₂.
        split: ``validation`` or ``test``.
        num_batches: evaluation batches of each task at most; all by default.

    Raises:
        InputError: not two different known tasks, or an empty grid.

    Source: arXiv 2305.12827, section 4; arXiv 2310.04742, section 5.
    """
    pair = _pair(finetuned, tasks)
    if not grid:
        raise InputError("the grid needs at least one coefficient, got none")
    joint = [(first, second) for first in grid for second in grid]
    points = list(dict.fromkeys([*joint, *((value, 0.0) for value in grid), *((0.0, value) for value in grid)]))
    chosen = {task: finetuned[task] for task in pair}
    batches = {task: list(_batches(data, task, split, num_batches)) for task in pair}
    outcome, passes = (_linear if module.acts_linearly(chosen) else _nonlinear)(module, chosen, batches, points)
    totals = _over_ranks(_partial_sums(outcome, batches, pair, joint))
    samples = {task: totals["samples", task] for task in pair}
    return Plane(
        pair,
        tuple(grid),
        {point: sum(totals["changed", task, point] / samples[task] for task in pair) for point in joint},
        {point: {task: totals["loss", task, point] / samples[task] for task in pair} for point in joint},
        {point: {task: totals["hits", task, point] / samples[task] for task in pair} for point in joint},
        passes,
    )


Found = list[tuple[Tensor, Tensor]]
Outcome = dict[Point, dict[str, Found]]
"""Predictions and whether they are right, int64 ``(2, batch)``, and losses ``(batch,)``, by point, task and batch."""
Batches = Mapping[str, Sequence[Batch]]


def _nonlinear(
    module: Module, finetuned: Mapping[str, Weights], batches: Batches, points: list[Point]
) -> tuple[Outcome, int]:
    """The weights of a point are put in once for all batches."""
    base, outcome = Base.of(module), {}
    for point in points:
        rule = TaskArithmetic(dict(zip(finetuned, point, strict=True)))
        weights = fuse_weights(rule, base, finetuned).weights if any(point) else None
        assert not isinstance(weights, MaskedVectors)
        with module.use(weights):
            outcome[point] = _measure(module, batches, {"": Acting(batches)})[""]
    return outcome, len(points)


def _linear(
    module: Module, finetuned: Mapping[str, Weights], batches: Batches, points: list[Point]
) -> tuple[Outcome, int]:
    """From the value and the two tangents of each batch."""
    outputs = module.linear_outputs(finetuned)
    models = {
        str(point): Acting(batches, partial(sum_of, module, outputs, dict(zip(finetuned, point, strict=True))))
        for point in points
    }
    found = _measure(module, batches, models, outputs.forget)
    return {point: found[str(point)] for point in points}, 3


def _measure(
    module: Module, batches: Batches, models: Mapping[str, Acting], before_batch: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Found]]:
    def measure(task: str, batch: Batch, found: Found) -> None:
        scores, labels = module.scored_classes(task, batch)
        predictions, losses = lowest_argmax(scores), F.cross_entropy(scores.float(), labels, reduction="none")
        found.append((torch.stack([predictions, predictions == labels]).cpu(), losses.cpu()))

    return count_batches(
        module, models, batches.__getitem__, lambda task: [], measure, tasks=batches, before_batch=before_batch
    )


def _partial_sums(
    outcome: Outcome, batches: Batches, pair: tuple[str, str], joint: list[Point]
) -> dict[Any, list[float]]:
    """Sums of each batch by what, task and point."""
    sums: dict[Any, list[float]] = {}
    for position, task in enumerate(pair):
        for number, batch in enumerate(batches[task]):
            mask = batch["mask"].cpu()
            sums.setdefault(("samples", task), []).append(int(mask.sum()))
            for point in joint:
                alone = (point[0], 0.0) if position == 0 else (0.0, point[1])
                (predictions, hits), losses = outcome[point][task][number]
                parts = {
                    "changed": int(((outcome[alone][task][number][0][0] != predictions) & mask).sum()),
                    "hits": int((hits.bool() & mask).sum()),
                    "loss": math.fsum(losses[mask].tolist()),
                }
                for what, value in parts.items():
                    sums.setdefault((what, task, point), []).append(value)
    return sums


def _over_ranks(sums: dict[Any, list[float]]) -> dict[Any, float]:
    everywhere: list[Any] = [sums]
    if rank_and_world_size()[1] > 1:
        everywhere = [{}] * rank_and_world_size()[1]
        distributed.all_gather_object(everywhere, sums)
    keys = dict.fromkeys(key for of_rank in everywhere for key in of_rank)
    return {key: math.fsum(value for of_rank in everywhere for value in of_rank.get(key, ())) for key in keys}


def _batches(data: Data, task: str, split: str, num_batches: int | None) -> Iterator[Batch]:
    rank, world_size = rank_and_world_size()
    for number, batch in enumerate(data.eval_batches(task, split, rank=rank, world_size=world_size)):
        if num_batches is not None and rank + number * world_size >= num_batches:
            return
        yield batch


def _pair(finetuned: Mapping[str, Weights], tasks: Sequence[str]) -> tuple[str, str]:
    for task in tasks:
        if task not in finetuned:
            raise InputError(f"diagnostics of unknown task {task!r}; {did_you_mean(task, finetuned)}")
    if len(set(tasks)) != 2 or len(tasks) != 2:
        raise InputError(f"a plane is spanned by two different tasks, got {', '.join(tasks) or 'none'}")
    return tasks[0], tasks[1]
