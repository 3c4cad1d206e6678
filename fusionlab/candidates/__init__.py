"""Many models of the same base scored in one pass over the data."""

from fusionlab.candidates.scoring import Candidate, score_candidates
from fusionlab.candidates.tangents import (
    TangentOutputs,
    linear_tasks,
    score_linear_sums,
    tangent_shortcut,
)

__all__ = [
    "Candidate",
    "TangentOutputs",
    "linear_tasks",
    "score_candidates",
    "score_linear_sums",
    "tangent_shortcut",
]
