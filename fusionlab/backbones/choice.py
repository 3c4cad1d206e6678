"""Which of several scores is the answer."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest_argmax(scores: Tensor) -> Tensor:
    """The index of the largest score in the last dimension; ties go to the lower index, on every device.

    Example:
        >>> lowest_argmax(torch.tensor([[0.0, 1.0, 1.0]]))
        tensor([1])
    """
    positions = torch.arange(scores.shape[-1], device=scores.device)
    is_best = scores == scores.amax(dim=-1, keepdim=True)
    return torch.where(is_best, positions, scores.shape[-1]).amin(dim=-1)
