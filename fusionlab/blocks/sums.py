"""Sums that coefficients come from: the same bits on any block size, thread count, company in a block and device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fusionlab.blocks import kernels, scratch
from fusionlab.blocks.kernels import CUT, LANES
from fusionlab.blocks.task_vectors import Statistics, TaskVectors


def squared_norms(task_vectors: TaskVectors) -> dict[str, Tensor]:
    """``"squared_norm/<task>"``: the partial sums of τ² in float64, ``(cuts,)`` each."""
    return _pair_sums(task_vectors, norms=True, products=False)


def squared_norm(task_vector: Tensor) -> tuple[float, ...]:
    """‖τ‖² of one whole tensor as an exact expansion (see :func:`exact_sum`)."""
    (partials,) = squared_norms(TaskVectors(("of",), task_vector[None])).values()
    return exact_sum(partials.tolist())


def inner_products(task_vectors: TaskVectors, *, norms: bool = False) -> dict[str, Tensor]:
    """``"inner_product/<i>/<j>"`` for task numbers i < j: the partial sums of τ_i τ_j in float64, ``(cuts,)`` each.

    With ``norms`` also what :func:`squared_norms` gives, to the same bits and at less cost.
    """
    return _pair_sums(task_vectors, norms=norms, products=True)


def _pair_sums(task_vectors: TaskVectors, *, norms: bool, products: bool) -> dict[str, Tensor]:
    keys = pair_keys(task_vectors.tasks, norms=norms, products=products)
    stacked = task_vectors.stacked.detach().reshape(len(task_vectors), -1)
    if stacked.device.type == "cpu":
        sums = torch.empty(len(keys), num_cuts(stacked.shape[1]), dtype=torch.float64)
        exact = stacked if stacked.dtype == torch.float64 else stacked.float()
        kernels.pair_sums(exact.contiguous().numpy(), norms, products, sums.numpy())
    else:
        wide = stacked.double()
        sums = torch.stack([partial_sums(wide[i] * wide[j]) for i, j in keys.values()])
    return dict(zip(keys, sums, strict=True))


def cosine(product: float, first: float, second: float) -> float:
    """⟨a, b⟩ / (‖a‖‖b‖) from the product and both norms; 0 where one is zero, in -1..1.

    Example:
        >>> cosine(1.0, 2.0, 1.0), cosine(0.0, 0.0, 1.0)
        (0.5, 0.0)
    """
    scale = first * second
    return min(1.0, max(-1.0, product / scale)) if scale else 0.0


def cosines(name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[tuple[int, int], float]:
    """The cosine of every pair of task vectors of one parameter, by their numbers."""
    norms = [math.sqrt(statistics.sum(f"squared_norm/{task}", [name])) for task in tasks]
    pairs = pair_keys(tasks, norms=False, products=True)
    return {(i, j): cosine(statistics.sum(key, [name]), norms[i], norms[j]) for key, (i, j) in pairs.items()}


def pair_keys(tasks: tuple[str, ...], *, norms: bool, products: bool) -> dict[str, tuple[int, int]]:
    """The pairs of task numbers that are summed, in order, by the key of their sums.

    Example:
        >>> pair_keys(("a", "b"), norms=True, products=True)
        {'squared_norm/a': (0, 0), 'inner_product/0/1': (0, 1), 'squared_norm/b': (1, 1)}
    """
    return {
        f"squared_norm/{tasks[i]}" if i == j else f"inner_product/{i}/{j}": (i, j)
        for i in range(len(tasks))
        for j in range(i, len(tasks))
        if (norms if i == j else products)
    }


def partial_sums(values: Tensor) -> Tensor:
    """One float64 sum per cut of the last dimension.

    Args:
        values: float64, ``(elements,)`` or ``(rows, elements)``.

    Returns:
        float64, ``(cuts,)`` or ``(rows, cuts)``.

    Example:
        >>> partial_sums(torch.ones(2, 40_000, dtype=torch.float64))
        tensor([[32768.,  7232.],
                [32768.,  7232.]], dtype=torch.float64)
    """
    if values.device.type != "cpu":
        return lane_sums(values)
    sums = torch.empty(*values.shape[:-1], num_cuts(values.shape[-1]), dtype=torch.float64)
    rows = values.detach().reshape(-1, values.shape[-1]).contiguous()
    kernels.partial_sums(rows.numpy(), sums.view(len(rows), -1).numpy())
    return sums


def lane_sums(values: Tensor) -> Tensor:
    """:func:`partial_sums` by torch, on any device, to the same bits: every addition is one of whole tensors."""
    cuts = num_cuts(values.shape[-1])
    padded = torch.nn.functional.pad(values, (0, cuts * CUT - values.shape[-1]))
    lanes = torch.zeros(*values.shape[:-1], cuts, LANES, dtype=values.dtype, device=values.device)
    for part in padded.view(*values.shape[:-1], cuts, -1, LANES).unbind(-2):
        lanes += part
    while lanes.shape[-1] > 1:
        lower, upper = lanes.chunk(2, dim=-1)
        lanes = lower + upper
    return lanes.squeeze(-1)


def num_cuts(elements: int) -> int:
    """Number of cuts of so many elements, the last one as long as what is left."""
    return -(-elements // CUT)


def widened(stacked: Tensor) -> Tensor:
    """A float64 copy of stacked tensors, each one flat."""
    flat = stacked.reshape(len(stacked), -1)
    return scratch.empty_like(flat, torch.float64).copy_(flat)


def exact_sum(partials: Iterable[float]) -> tuple[float, ...]:
    """The sum of ``partials`` without any rounding, as the few doubles that add up to it, largest first.

    Sums of such expansions by ``math.fsum`` equal the ``math.fsum`` of all partials bit for bit, so one short tuple
    per parameter is all that is kept or stored.

    Example:
        >>> exact_sum([1e16, 1.0, 1e-3])
        (1.0000000000000002e+16, -0.999, -8.673617379884035e-19)
    """
    values, parts = list(partials), []
    while part := math.fsum(values):
        parts.append(part)
        values.append(-part)
    return tuple(parts)
