"""Metrics that keep integer sums, so that any number of ranks computes the same number."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Accuracy(Metric):
    """correct / total over the unmasked samples; both counted in int64.

    Example:
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([1, 0, 2]), torch.tensor([1, 1, 2]), torch.tensor([True, True, False]))
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: int64 labels, shape ``(batch,)``.
            targets: int64 labels, shape ``(batch,)``.
            mask: bool, False on padding, shape ``(batch,)``.
        """
        self.correct += ((predictions == targets) & mask).sum()
        self.total += mask.sum()

    def compute(self) -> Tensor:
        """The share of correct samples, float64 scalar."""
        return self.correct.double() / self.total.double()


def lowest_argmax(scores: Tensor) -> Tensor:
    """The index of the largest score in the last dimension; ties go to the lower index, on every device.

    Example:
        >>> lowest_argmax(torch.tensor([[0.0, 1.0, 1.0]]))
        tensor([1])
    """
    positions = torch.arange(scores.shape[-1], device=scores.device)
    is_best = scores == scores.amax(dim=-1, keepdim=True)
    return torch.where(is_best, positions, scores.shape[-1]).amin(dim=-1)
