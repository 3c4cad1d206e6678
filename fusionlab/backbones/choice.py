"""Which of several scores is the answer."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest_argmax(scores: Tensor) -> Tensor:
    """The index of the largest score in the last dimension; ties go to the lower index, on every device.

    Where one is NaN there is none: it is -1, which is no label and no token.

    Example:
        >>> lowest_argmax(torch.tensor([[0.0, 1.0, 1.0], [0.0, float("nan"), 1.0]]))
        tensor([ 1, -1])
    """
    positions = torch.arange(scores.shape[-1], device=scores.device)
    is_best = scores == scores.amax(dim=-1, keepdim=True)
    lowest = torch.where(is_best, positions, scores.shape[-1]).amin(dim=-1)
    return lowest.masked_fill(lowest == scores.shape[-1], -1)
