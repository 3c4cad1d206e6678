"""Many fused models of the same fine-tuned ones: made quickly, and scored in one pass over the data."""

from fusionlab.candidates.finetuned import Finetuned, Fused
from fusionlab.candidates.scoring import Candidate, score_candidates
from fusionlab.candidates.tangents import (
    TangentOutputs,
    linear_tasks,
    score_linear_sums,
    tangent_shortcut,
)

__all__ = [
    "Candidate",
    "Finetuned",
    "Fused",
    "TangentOutputs",
    "linear_tasks",
    "score_candidates",
    "score_linear_sums",
    "tangent_shortcut",
]
