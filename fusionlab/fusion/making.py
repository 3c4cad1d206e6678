"""What a rule makes of adapters or fine-tuned weights in memory.

From adapters a linear rule makes an adapter, another rule new base weights; from weights every rule makes weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusionlab.adapters import Adapter, combine, fuse_in_core_space
from fusionlab.linearize import LinearizedState
from fusionlab.rules import LinearRule, Rule
from fusionlab.rules.matrices import has_core
from fusionlab.state import State
from fusionlab.streaming import fuse, measure
from fusionlab.weights import Weights, is_linearized


@dataclass(frozen=True)
class FusedModel:
    """A fused model.

    Args:
        rule: the rule with all its coefficients.
        weights: an adapter, or the base weights that change by name, as they are or to act to first order only.
        scaling_coefficients: λ by task; by task and parameter where they differ over parameters; empty for rules that
            have none.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of each pair of task vectors.
        remarks: by name, what the user should know of how a tensor was fused.
    """

    rule: Rule
    weights: Weights
    scaling_coefficients: dict[str, Any]
    norms: dict[str, float]
    cosines: dict[str, dict[str, float]]
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)


def fuse_weights(rule: Rule, base: State, finetuned: Mapping[str, Weights]) -> FusedModel:
    """Fuse what one method trained for each task; what acts to first order only is fused to act so.

    Args:
        rule: a rule with all its coefficients.
        base: the base's state; the weights that change are read from it.
        finetuned: by task, in the order in which they are summed: adapters, or weights of the same names.
    """
    adapters = {task: weights for task, weights in finetuned.items() if isinstance(weights, Adapter)}
    if len(adapters) == len(finetuned):
        return fuse_adapters(rule, base, adapters)
    linearized = any(is_linearized(weights) for weights in finetuned.values())
    states = {task: getattr(weights, "state", weights) for task, weights in finetuned.items()}
    names = dict.fromkeys(name for state in states.values() for name in state)
    fused = fuse(rule, {name: base[name].cpu() for name in names}, finetuned=states, model=base)
    weights = LinearizedState(fused.state) if linearized else fused.state
    return FusedModel(rule, weights, fused.scaling_coefficients, fused.norms, fused.cosines, fused.remarks)


def fuse_adapters(rule: Rule, base: State, adapters: Mapping[str, Adapter]) -> FusedModel:
    """Fuse adapters in delta_weight space.

    A linear rule, and a rule on matrices that turns with their bases, give an adapter: of the rank of one where all
    tasks share the current A, else of the summed rank. Other rules work on the dense task vectors and give new values
    for the adapted weights.

    Args:
        rule: a rule with all its coefficients.
        base: the base's state; the weights that the adapters change are read from it.
        adapters: by task, in the order in which they are summed.
    """
    task_vectors = {task: adapter.task_vector() for task, adapter in adapters.items()}
    names = dict.fromkeys(name for task_vector in task_vectors.values() for name in task_vector)
    adapted = {name: base[name] for name in names}
    if isinstance(rule, LinearRule):
        measured = measure(rule, adapted, task_vectors, model=base)
        weights: Adapter | State = combine(adapters, measured.coefficients)
        return FusedModel(
            rule, weights, measured.scaling_coefficients, measured.norms, measured.cosines, measured.remarks
        )
    if has_core(rule):
        adapter, found = fuse_in_core_space(rule, adapters)
        return FusedModel(rule, adapter, {}, found.norms, found.cosines, found.remarks)
    fused = fuse(rule, adapted, task_vectors, model=base)
    linearized = any(is_linearized(adapter) for adapter in adapters.values())
    state = LinearizedState(fused.state) if linearized else fused.state
    return FusedModel(rule, state, fused.scaling_coefficients, fused.norms, fused.cosines, fused.remarks)
