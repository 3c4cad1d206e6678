"""What is trained for a task, and what a rule makes of it: an adapter, weights, or weights that act to first order."""

from __future__ import annotations

from typing import TypeAlias

from fusionlab.adapters import Adapter
from fusionlab.linearize import LINEARIZED_METHODS, LinearizedState
from fusionlab.tensors.state import State

Weights: TypeAlias = Adapter | State | LinearizedState


def is_linearized(weights: object) -> bool:
    """Whether they act to first order about the base only."""
    return isinstance(weights, LinearizedState) or (
        isinstance(weights, Adapter) and weights.method in LINEARIZED_METHODS
    )


def state_of(weights: State | LinearizedState) -> State:
    """The values by name, however they act."""
    return weights.state if isinstance(weights, LinearizedState) else weights
