"""How task vectors lie to one another, and where in the network they are: one Gram matrix, never a dense ΔW."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fusionlab.adapters import Adapter, inner_product
from fusionlab.adapters.weights import Weights, state_of
from fusionlab.blocks.sums import cosine, partial_sums
from fusionlab.errors import InputError, name_list
from fusionlab.rules.metagpt import layer_of
from fusionlab.tensors.state import State

Gram: TypeAlias = dict[str, dict[str, float]]


def check_several(tasks: Collection[str]) -> None:
    """Raise unless there are two tasks or more.

    Raises:
        InputError: diagnostics compare task vectors.
    """
    if len(tasks) < 2:
        raise InputError(
            f"diagnostics compare task vectors and need two tasks or more, got {name_list(tasks) or 'none'}"
        )


def gram_matrix(base: State, finetuned: Mapping[str, Weights]) -> Gram:
    """⟨τ_a, τ_b⟩ of every pair, in float64; of adapters from r×r matrices.

    Args:
        base: the base's state; not read for adapters.
        finetuned: by task, all adapters or all weights of the same names.

    Raises:
        InputError: adapters and weights.

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> gram_matrix(base, {"a": {"w": torch.tensor([3.0, 4.0])}, "b": {"w": torch.tensor([1.0, 0.0])}})
        {'a': {'a': 25.0, 'b': 3.0}, 'b': {'a': 3.0, 'b': 1.0}}
    """
    gram: Gram = {task: {} for task in finetuned}
    for first, second in itertools.combinations_with_replacement(finetuned, 2):
        value = _inner(base, finetuned[first], finetuned[second])
        gram[first][second] = gram[second][first] = value
    return {first: {second: gram[first][second] for second in finetuned} for first in finetuned}


def cosines(gram: Gram) -> Gram:
    """Cosine similarity of every pair; 0 where a task vector is zero.

    Example:
        >>> cosines({"a": {"a": 4.0, "b": 1.0}, "b": {"a": 1.0, "b": 1.0}})
        {'a': {'a': 1.0, 'b': 0.5}, 'b': {'a': 0.5, 'b': 1.0}}
    """
    lengths = norms(gram)
    return {
        first: {second: cosine(value, lengths[first], lengths[second]) for second, value in row.items()}
        for first, row in gram.items()
    }


def norms(gram: Gram) -> dict[str, float]:
    """‖τ‖ by task."""
    return {task: math.sqrt(row[task]) for task, row in gram.items()}


def norm_shares(base: State, finetuned: Mapping[str, Weights]) -> Gram:
    """The share of ‖τ‖² that lies in each layer, by task and layer; the shares of a task add up to 1 (0 for a zero τ).

    A layer is a parameter's name up to its first number; what is in no numbered layer comes under its first part.

    Raises:
        InputError: fewer than two tasks.
    """
    check_several(finetuned)
    shares: Gram = {}
    for task, weights in finetuned.items():
        squares: dict[str, list[float]] = {}
        for name, square in _squares(base, weights).items():
            squares.setdefault(layer_of(name) or name.partition(".")[0], []).append(square)
        total = math.fsum(itertools.chain.from_iterable(squares.values()))
        shares[task] = {layer: math.fsum(values) / total if total else 0.0 for layer, values in squares.items()}
    return shares


def _squares(base: State, weights: Weights) -> dict[str, float]:
    if not isinstance(weights, Adapter):
        state = state_of(weights)
        return {name: _dot(vector, vector) for name in state for vector in [_vector(base, state, name)]}
    squares = {}
    for module, factors in weights.factors.items():
        left, right = weights.terms(module, torch.float64)
        squares[f"{module}.weight"] = factors.scaling**2 * ((left.T @ left) * (right @ right.T)).sum().item()
    return squares


def _inner(base: State, first: Weights, second: Weights) -> float:
    if isinstance(first, Adapter) and isinstance(second, Adapter):
        return inner_product(first, second)
    if isinstance(first, Adapter) or isinstance(second, Adapter):
        raise InputError("diagnostics compare adapters with adapters, or weights with weights, not one with the other")
    ours, theirs = state_of(first), state_of(second)
    return math.fsum(_dot(_vector(base, ours, name), _vector(base, theirs, name)) for name in ours if name in theirs)


def _vector(base: State, state: State, name: str) -> Tensor:
    """τ of one parameter, float64."""
    return state[name].detach().cpu().double() - base[name].detach().cpu().double()


def _dot(first: Tensor, second: Tensor) -> float:
    return math.fsum(partial_sums((first * second).flatten()).tolist())
