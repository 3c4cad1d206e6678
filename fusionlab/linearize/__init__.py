"""Linearization: of each adapted layer (``partial``), and of a whole network in some parameters (``network``)."""

from fusionlab.linearize.dual import refuse_checkpointing, tensors_replaced
from fusionlab.linearize.module import LinearizedModule, select_parameters
from fusionlab.linearize.network import autocast_dtype, jvp_call, linearized_call, primal_call, tangent_outputs, wide
from fusionlab.linearize.partial import centred_term, linearized_term
from fusionlab.linearize.states import LINEARIZED_METHODS, LinearizedState

__all__ = [
    "LINEARIZED_METHODS",
    "LinearizedModule",
    "LinearizedState",
    "autocast_dtype",
    "centred_term",
    "jvp_call",
    "linearized_call",
    "linearized_term",
    "primal_call",
    "refuse_checkpointing",
    "select_parameters",
    "tangent_outputs",
    "tensors_replaced",
    "wide",
]
