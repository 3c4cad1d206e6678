"""What a rule makes of adapters: an adapter where the rule is linear, else new base weights; and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusionlab.adapters import Adapter, combine
from fusionlab.rules import LinearRule, Rule
from fusionlab.state import State
from fusionlab.streaming import fuse, measure


@dataclass(frozen=True)
class FusedModel:
    """A fused model.

    Args:
        weights: an adapter, or the base weights that change, by name.
        scaling_coefficients: λ by task; by task and parameter where they differ over parameters; empty for rules that
            have none.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of each pair of task vectors.
    """

    weights: Adapter | State
    scaling_coefficients: dict[str, Any]
    norms: dict[str, float]
    cosines: dict[str, dict[str, float]]


def fuse_adapters(rule: Rule, base: State, adapters: Mapping[str, Adapter]) -> FusedModel:
    """Fuse adapters in delta_weight space.

    A linear rule gives an adapter: of the rank of one where all tasks share the current A, else of the summed rank.
    Other rules work on the dense task vectors and give new values for the adapted weights.

    Args:
        rule: a rule with all its coefficients.
        base: the base's state; the weights that the adapters change are read from it.
        adapters: by task, in the order in which they are summed.
    """
    task_vectors = {task: adapter.task_vector() for task, adapter in adapters.items()}
    names = dict.fromkeys(name for task_vector in task_vectors.values() for name in task_vector)
    adapted = {name: base[name] for name in names}
    if isinstance(rule, LinearRule):
        measured = measure(rule, adapted, task_vectors)
        weights: Adapter | State = combine(adapters, measured.coefficients)
        return FusedModel(weights, measured.scaling_coefficients, measured.norms, measured.cosines)
    fused = fuse(rule, adapted, task_vectors)
    return FusedModel(fused.state, fused.scaling_coefficients, fused.norms, fused.cosines)
