"""A fused model and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusionlab.adapters import Adapter
from fusionlab.adapters.routed import FusedWeights, RoutedWeights
from fusionlab.adapters.weights import state_of
from fusionlab.errors import InputError
from fusionlab.rules import AnyRule
from fusionlab.tensors.masked import MaskedVectors
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class FusedModel:
    """A fused model.

    Args:
        rule: the rule with all its coefficients.
        weights: an adapter, or the base weights that change by name, as they are or to act to first order only; with
            routers, those and experts; of a rule that needs the task, masks of one vector, by names on disk.
        scaling_coefficients: λ by task; by task and parameter where they differ over parameters; empty for rules that
            have none; s_t of masks.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of each pair of task vectors.
        remarks: by name on disk, what the user should know of how a tensor was fused.
        rounding: what the dtype of ``weights`` leaves of the update, as ``fusion.json`` has it; empty for an adapter.
        masks: what ``fusion.json`` and rows say of masks; empty for other weights.
        routed: what they say of routers and experts; empty for other weights.
    """

    rule: AnyRule
    weights: FusedWeights | MaskedVectors
    scaling_coefficients: dict[str, Any]
    norms: dict[str, float]
    cosines: dict[str, dict[str, float]]
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rounding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    masks: Mapping[str, Any] = field(default_factory=dict)
    routed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The weights by name.

        Raises:
            InputError: they are an adapter, or each task's or sample's are others.
        """
        if isinstance(self.weights, Adapter):
            raise InputError("the fused model is an adapter: take its weights, or merge it into the base's state")
        if isinstance(self.weights, MaskedVectors):
            raise InputError(
                "each task has weights of its own: take fusionlab.weights_of(fused.weights, task, base), which are "
                "those of one"
            )
        if isinstance(self.weights, RoutedWeights):
            raise InputError("each sample has weights of its own: use fused.weights as they are, by module.use(...)")
        return state_of(self.weights)
