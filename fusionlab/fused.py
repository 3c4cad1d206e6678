"""What a rule makes of adapters: an adapter where the rule is linear, else new base weights; and its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from fusionlab.adapters import Adapter, base_state, combine, save_adapter, split_names, stored_state
from fusionlab.checkpoints import save_state, write_folder
from fusionlab.loading import base_hash
from fusionlab.rules import LinearRule, Rule
from fusionlab.rules.config import to_config
from fusionlab.state import State
from fusionlab.streaming import fuse, measure


@dataclass(frozen=True)
class FusedModel:
    """A fused model.

    Args:
        rule: the rule with all its coefficients.
        weights: an adapter, or the base weights that change, by name.
        scaling_coefficients: λ by task; by task and parameter where they differ over parameters; empty for rules that
            have none.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of each pair of task vectors.
    """

    rule: Rule
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
        return FusedModel(rule, weights, measured.scaling_coefficients, measured.norms, measured.cosines)
    fused = fuse(rule, adapted, task_vectors)
    return FusedModel(rule, fused.state, fused.scaling_coefficients, fused.norms, fused.cosines)


def save_finetuned(folder: Path, adapter: Adapter, base_model: nn.Module, row: dict[str, Any]) -> None:
    """Write a task's adapter, whole or not at all, with the base it belongs to and its fields of a result row."""
    with write_folder(folder, overwrite=True) as unfinished:
        save_adapter(unfinished, adapter)
        path = unfinished / "fusionlab.json"
        own = json.loads(path.read_text()) | {"base_hash": base_hash(base_model, adapter), "row": row}
        path.write_text(json.dumps(own, indent=2, sort_keys=True) + "\n")


def save_fused(folder: Path, fused: FusedModel, backbone: Any, row: dict[str, Any]) -> None:
    """Write a fused model, whole or not at all: an adapter, or a full model in the base's own layout.

    Args:
        folder: where to; what is there is replaced.
        fused: the fused model.
        backbone: the base, whose configuration and tokenizer files are written beside full weights.
        row: its fields of a result row.
    """
    record = {
        "schema": 1,
        "rule": to_config(fused.rule),
        "base": backbone.name,
        "scaling_coefficients": fused.scaling_coefficients,
        "norms": fused.norms,
        "cosines": fused.cosines,
        "row": row,
        "versions": {name: version(name) for name in ("fusionlab", "torch", "transformers", "peft")},
    }
    with write_folder(folder, overwrite=True) as unfinished:
        if isinstance(fused.weights, Adapter):
            save_adapter(unfinished, fused.weights)
            record["base_hash"] = base_hash(backbone.model, fused.weights)
        else:
            backbone.save_files(unfinished)
            state = base_state(backbone.model) | dict(fused.weights)
            save_state(unfinished, stored_state(state, split_names(backbone.model)))
        (unfinished / "fusion.json").write_text(json.dumps(record, indent=2) + "\n")
