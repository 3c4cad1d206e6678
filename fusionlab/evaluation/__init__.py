"""Scores, exact on any number of ranks: of one model, of many at once, and of models linear in their update."""

from fusionlab.evaluation.candidates import Candidate, score_candidates
from fusionlab.evaluation.linear import TangentOutputs, linear_tasks, score_linear_sums, tangent_shortcut
from fusionlab.evaluation.scores import evaluate

__all__ = [
    "Candidate",
    "TangentOutputs",
    "evaluate",
    "linear_tasks",
    "score_candidates",
    "score_linear_sums",
    "tangent_shortcut",
]
