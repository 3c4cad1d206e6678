"""Linearization: of each adapted layer (``partial``), and of a whole network in some parameters (``network``)."""

from fusionlab.linearize.dual import refuse_checkpointing, tensors_replaced
from fusionlab.linearize.network import autocast_dtype, linearized_call, tangent_outputs, wide
from fusionlab.linearize.partial import centred_term, linearized_term
from fusionlab.linearize.states import LINEARIZED_METHODS, LinearizedState

__all__ = [
    "LINEARIZED_METHODS",
    "LinearizedState",
    "autocast_dtype",
    "centred_term",
    "linearized_call",
    "linearized_term",
    "refuse_checkpointing",
    "tangent_outputs",
    "tensors_replaced",
    "wide",
]
