"""``fusionlab.fuse``: the maker of fused models as Python calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from fusionlab.adapters import Adapter, check_fits, laid_out
from fusionlab.adapters.routed import RoutedWeights
from fusionlab.adapters.weights import Weights
from fusionlab.backbones import load_backbone
from fusionlab.contracts import Backbone, is_backbone, is_source
from fusionlab.engine import DEFAULT_MEMORY_BUDGET, Resources
from fusionlab.engine import fuse as fuse_states
from fusionlab.engine.planning import MismatchedTensors
from fusionlab.errors import InputError
from fusionlab.fusion.base import Base
from fusionlab.fusion.by_task import weights_of
from fusionlab.fusion.fused import FusedModel
from fusionlab.fusion.making import fuse_weights
from fusionlab.linearize import LinearizedState
from fusionlab.memory import parse_size
from fusionlab.rules import AnyRule, Rule, from_config
from fusionlab.runs.loading import LoadedWeights, load_weights
from fusionlab.tensors.dtypes import dtype_of
from fusionlab.tensors.masked import MaskedVectors
from fusionlab.tensors.state import State

Given: TypeAlias = Weights | MaskedVectors | LoadedWeights | nn.Module | Backbone | str | Path
"""What may be fused: what a folder holds, the folder, or a model."""


def fuse(
    rule: AnyRule | type | str | Mapping[str, Any],
    base: State | nn.Module | Base | str | Path,
    task_vectors: Mapping[str, State] | None = None,
    *,
    finetuned: Mapping[str, Given] | None = None,
    dtype: torch.dtype | str | None = None,
    mismatched_tensors: MismatchedTensors = "error",
    allow_other_base: bool = False,
    threads: int | None = None,
    memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
) -> FusedModel:
    """Fuse what was fine-tuned for several tasks: the model that the run, the command and a sweep make of it.

    Args:
        rule: a rule with all its coefficients, or its name, class or configuration.
        base: a backbone, a module or a model; a name or folder that :func:`fusionlab.load_backbone` takes; or a state,
            whose names are taken for those on disk.
        task_vectors: τ by task, by the names of a state; a name that is absent means zero.
        finetuned: by task, in the order in which they are summed: adapters, states, what :func:`fusionlab.load` gives
            for a folder, the folder itself, or a model; of masks, those of the task.
        dtype: round the whole model to this dtype, or the one of this name; by default updates of a backbone's weights
            are kept in float32, and a state's tensors have their own dtypes.
        mismatched_tensors: of states: what to do with tensors that do not fit: an ``error``, or take the ``base``'s.
        allow_other_base: take adapters from folders though they were made for another base; a warning says so.
        threads: worker threads; torch's own number by default.
        memory_budget: bytes for blocks and whole tensors in flight, beside the weights themselves, or a size as 1GB.

    Returns:
        the fused model: of states all of the base's names; else what changes, by the base's names in memory, an
        adapter where a linear rule fuses adapters, or masks of one vector where the rule needs the task.

    Raises:
        InputError: names or shapes that do not fit, weights that cannot be fused with one another, NaN or Inf, or what
            the rule refuses.

    Example:
        >>> base = {"w": torch.tensor([1.0, 2.0])}
        >>> fuse("average", base, finetuned={"a": base, "b": {"w": torch.tensor([3.0, 2.0])}}).state
        {'w': tensor([2., 2.])}
    """
    chosen, dtype, budget = from_config(rule), dtype_of(dtype, "dtype"), parse_size(memory_budget, "memory_budget")
    _check_by_task(finetuned=finetuned, task_vectors=task_vectors)
    base = load_backbone(base) if isinstance(base, str | Path) else base
    own = Base.of(base)
    weights = {task: _weights(task, each, own, allow_other_base) for task, each in (finetuned or {}).items()}
    resources = Resources(threads or torch.get_num_threads(), budget)
    by_units = dtype is not None or not all(map(_is_state, weights.values()))
    if isinstance(base, Base | nn.Module) or not isinstance(chosen, Rule) or by_units:
        if task_vectors or mismatched_tensors != "error":
            raise InputError(
                "task_vectors and mismatched_tensors are for states that keep their dtypes; give adapters, models over "
                "a backbone and what is to be rounded as finetuned"
            )
        return fuse_weights(chosen, base, weights, dtype=dtype, resources=resources)
    ordered = {name: base[name] for name in sorted(base)}  # as units are, for rules that go by order
    given: dict[str, Any] = {"finetuned": weights, "mismatched_tensors": mismatched_tensors}
    fused = fuse_states(chosen, ordered, task_vectors, **given, threads=threads, memory_budget=budget)
    state = {name: fused.state[name] for name in base}
    return FusedModel(chosen, state, fused.scaling_coefficients, fused.norms, fused.cosines, fused.remarks)


def _is_state(weights: Weights) -> bool:
    return not isinstance(weights, Adapter | LinearizedState)


def _check_by_task(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{name}: expected a mapping from tasks to weights, got a {type(value).__name__}.")


def _of_model(task: str, given: nn.Module | Backbone, base: Base) -> State:
    """The weights of a model, by the names that the base goes by.

    Raises:
        InputError: it has adapters, or is a module that trains several tasks.
    """
    if is_source(given):
        raise InputError(
            f"{task!r} is a {type(given).__name__}, which has a base and weights of tasks; give its finetuned(TASK)."
        )
    model = Base.of(given)
    if model.model is not None and any(".lora_" in name for name, _ in model.model.named_parameters()):
        raise InputError(f"{task!r} is a model with adapters in it; merge them into its weights, or give the adapter.")
    return model.stored if base.model is None else model.state


def _weights(task: str, given: Given, base: Base, allow_other_base: bool) -> Weights:
    """What ``given`` holds, checked against the base."""
    if isinstance(given, nn.Module) or is_backbone(given):
        return _of_model(task, given, base)
    if isinstance(given, str | Path):
        source = base.stored if base.model is None else base.model
        given = load_weights(Path(given), source, base_name=base.name, allow_other_base=allow_other_base)
    weights = given.weights if isinstance(given, LoadedWeights) else given
    if isinstance(weights, RoutedWeights):
        raise InputError(f"{task!r} has weights of its own for every sample, which are no task vector; leave it out.")
    if isinstance(weights, MaskedVectors):
        return weights_of(weights, task, base)
    if isinstance(weights, Adapter) and base.model is not None:
        check_fits(base.model, weights)
        return laid_out(base.model, weights)
    if not isinstance(weights, Adapter | LinearizedState | Mapping):
        raise InputError(f"{task!r}: expected weights, a folder or a model, got a {type(weights).__name__}.")
    return weights
