"""Weights that act to first order only. Torch only."""

from __future__ import annotations

from dataclasses import dataclass

from fusionlab.tensors.state import State

LINEARIZED_METHODS = ("tangent_lora", "tangent")  # what is trained so acts under the linearized forward only


@dataclass(frozen=True)
class LinearizedState:
    """Values by parameter name that act to first order about the base: f(x; θ₀) + J(θ₀)·(θ − θ₀).

    Args:
        state: θ, for all or some names of the base; what is absent is the base's.
    """

    state: State
