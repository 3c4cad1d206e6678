"""Linearization: of each adapted layer (``partial``), and of a whole network in some parameters (``network``)."""

from fusionlab.linearize.network import (
    LinearizedModule,
    jvp_call,
    linearized_call,
    primal_call,
    select_parameters,
    tangent_outputs,
)
from fusionlab.linearize.partial import centred_term, linearized_term

__all__ = [
    "LinearizedModule",
    "centred_term",
    "jvp_call",
    "linearized_call",
    "linearized_term",
    "primal_call",
    "select_parameters",
    "tangent_outputs",
]
