"""The streaming engine: a rule over readers, block by block, into a writer; and ``fuse``, the same over memory."""

from fusionlab.engine.job import DEFAULT_MEMORY_BUDGET, Job, Outcome, Resources, Sink
from fusionlab.engine.memory import FusedState, fuse, keep_masks, masked_infos, try_rule
from fusionlab.engine.passes import coefficients, run
from fusionlab.engine.planning import Plan, make_plan
from fusionlab.tensors.lazy import CastWeights, StateWeights, TaskInput, TensorInfo, Weights

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "CastWeights",
    "FusedState",
    "Job",
    "Outcome",
    "Plan",
    "Resources",
    "Sink",
    "StateWeights",
    "TaskInput",
    "TensorInfo",
    "Weights",
    "coefficients",
    "fuse",
    "keep_masks",
    "make_plan",
    "masked_infos",
    "run",
    "try_rule",
]
