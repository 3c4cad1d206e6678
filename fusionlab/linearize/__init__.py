"""Linearization of a whole network in some of its parameters.

Partial linearization, of each adapted layer in its own (A, B), needs no code: W x + s·B A x, expanded about (A₀, 0), is
W x + s·B A₀ x, and the gradient of A is exactly zero. That is the ordinary adapter with A frozen at A₀.

Source: arXiv 2310.04742, equation 4, as its code applies it layer by layer.
"""

from fusionlab.linearize.dual import refuse_checkpointing, tensors_replaced
from fusionlab.linearize.network import autocast_dtype, linearized_call, tangent_outputs, wide
from fusionlab.linearize.states import LINEARIZED_METHODS, LinearizedState

__all__ = [
    "LINEARIZED_METHODS",
    "LinearizedState",
    "autocast_dtype",
    "linearized_call",
    "refuse_checkpointing",
    "tangent_outputs",
    "tensors_replaced",
    "wide",
]
