"""Metrics that keep integer sums, so that any number of ranks computes the same number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fusionlab.backbones.choice import lowest_argmax
from fusionlab.evaluation.functional import parse_score, pearson, perplexity, share, spearman

_log = logging.getLogger(__name__)


class Score(Metric):
    """A metric that tells faults beside its score.

    torchmetrics' own would do for the score alone, but they add floats in the order in which ranks and batches come.
    """

    faults: ClassVar[tuple[str, ...]] = ()
    """Which of the values of ``compute`` count faults: they are neither better where higher nor where lower."""
    is_share: ClassVar[bool] = False
    """Whether the score is a share of the samples."""

    def _tell(self, broken: Tensor, total: int, what: str) -> None:
        """Warn where samples have no answer, which count as ``what``."""
        if count := int(broken):
            _log.warning("the model's outputs are NaN for %d of %d samples, which count as %s", count, total, what)


class Accuracy(Score):
    """correct / total over the unmasked samples; both counted in int64.

    A sample without a prediction, as the model's outputs are NaN, is wrong, which is said with their number.

    Example:
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([1, 0, 2]), torch.tensor([1, 1, 2]), torch.tensor([True, True, False]))
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    higher_is_better = True
    is_share = True
    correct: Tensor
    total: Tensor
    broken: Tensor

    def __init__(self) -> None:
        super().__init__()
        for count in ("correct", "total", "broken"):
            self.add_state(count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: int64 labels, shape ``(batch,)``; -1 where there is none.
            targets: int64 labels, shape ``(batch,)``.
            mask: bool, False on padding, shape ``(batch,)``.
        """
        self.correct += ((predictions == targets) & (predictions >= 0) & mask).sum()
        self.broken += ((predictions < 0) & mask).sum()
        self.total += mask.sum()

    def update_texts(self, answers: Sequence[str | None], targets: Sequence[str], mask: Tensor) -> None:
        """Count a batch of answers that are right letter by letter.

        Args:
            answers: one a sample; None where there is none.
            targets: what they should be.
            mask: bool, False on padding, shape ``(batch,)``.
        """
        hits = [-1 if answer is None else answer == target for answer, target in zip(answers, targets, strict=True)]
        self.update(torch.tensor(hits, device=mask.device, dtype=torch.int64), torch.ones_like(mask), mask)

    def compute(self) -> Tensor:
        """The share of correct samples, float64 scalar."""
        self._tell(self.broken, int(self.total), "wrong")
        return torch.tensor(share(int(self.correct), int(self.total)), dtype=torch.float64)


class RankedAccuracy(Accuracy):
    """Accuracy of ranked answers, and how many samples' two best scores lie closer than rounding moves them.

    Args:
        name: what the accuracy is called, which says how answers are ranked.

    Example:
        >>> metric = RankedAccuracy()
        >>> scores = torch.tensor([[-1.0, -2.0], [-3.0, -3.00001]])
        >>> metric.update_scores(scores, torch.tensor([0, 1]), torch.tensor([True, True]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'accuracy': 0.5, 'near_ties': 1.0}
    """

    faults = ("near_ties",)
    near_ties: Tensor
    TIE = 1e-4

    def __init__(self, name: str = "accuracy") -> None:
        super().__init__()
        self.name = name
        self.add_state("near_ties", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update_scores(self, scores: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Count a batch; ties go to the lower index.

        Args:
            scores: shape ``(batch, answers)``, the higher the better.
            targets: int64, shape ``(batch,)``.
            mask: bool, False on padding, shape ``(batch,)``.
        """
        best = scores.topk(2, dim=-1).values
        self.near_ties += ((best[:, 0] - best[:, 1] < self.TIE) & mask).sum()
        self.update(lowest_argmax(scores), targets, mask)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The accuracy by its name, and ``near_ties``, float64 scalars."""
        return {self.name: super().compute(), "near_ties": self.near_ties.double()}


class Perplexity(Score):
    """exp(−Σ log p / Σ tokens) over all learnt tokens of all samples; lower is better.

    A sample's sum is kept with its index, and the sums are added exactly in the order of the samples, so that any
    number of ranks and any order of batches give the same bits.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([2.0, 4.0]), torch.tensor([1, 2]), torch.arange(2), torch.ones(2).bool())
        >>> round(metric.compute().item(), 4)  # exp(6 / 3)
        7.3891
    """

    full_state_update = False
    higher_is_better = False
    losses: list[Tensor]
    counts: list[Tensor]
    indices: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("losses", "counts", "indices"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        """Give every list its dtype, so that a process without a batch can take part in the gather."""
        self.losses.append(torch.empty(0, dtype=torch.float64, device=self.device))
        for values in (self.counts, self.indices):
            values.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._begin()

    def update(self, losses: Tensor, counts: Tensor, indices: Tensor, mask: Tensor) -> None:
        """Keep a batch.

        Args:
            losses: −Σ log p of each sample's learnt tokens, shape ``(batch,)``.
            counts: learnt tokens of each sample, int64, shape ``(batch,)``.
            indices: the samples' int64 index in their set, shape ``(batch,)``.
            mask: bool, False on padding, shape ``(batch,)``.
        """
        self.losses.append(losses.double()[mask])
        self.counts.append(counts[mask])
        self.indices.append(indices[mask])

    def compute(self) -> Tensor:
        """The perplexity, float64 scalar."""
        losses, counts, indices = map(dim_zero_cat, (self.losses, self.counts, self.indices))
        if broken := int((~losses.isfinite()).sum()):
            _log.warning("perplexity: the loss of %d of %d samples is not finite", broken, len(losses))
        return torch.tensor(perplexity(losses[indices.argsort()].tolist(), int(counts.sum())), dtype=torch.float64)


class ScoreCorrelation(Score):
    """Spearman's and Pearson's correlation of predicted with true scores, and the number of unparsable answers.

    Samples are kept with their index and sorted by it, and the sums are exact (integer ranks, ``math.fsum``), so that
    any number of ranks and any order of batches give the same bits. As in the published results, an unparsable answer
    has the score 0, and the correlation of constant scores, which is undefined, counts as 0: never NaN. An answer that
    there is not, as the model's outputs are NaN, is unparsable too, and said with their number.

    Args:
        first: ``spearman`` or ``pearson``: the task's metric, the first of what ``compute`` gives.

    Example:
        >>> metric = ScoreCorrelation()
        >>> scores, targets = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 4.0, 1.0])
        >>> metric.update(scores, targets, torch.arange(3), torch.ones(3).bool(), torch.tensor([False, False, True]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'spearman': 0.5, 'pearson': 0.7924, 'unparsable': 1.0}

    Source: arXiv 2310.04742, its released result files, for the convention.
    """

    full_state_update = False
    higher_is_better = True
    faults = ("unparsable",)
    predictions: list[Tensor]
    targets: list[Tensor]
    indices: list[Tensor]
    unparsable: Tensor
    broken: Tensor

    def __init__(self, first: str = "spearman") -> None:
        super().__init__()
        self.first = first
        for name in ("predictions", "targets", "indices"):
            self.add_state(name, [], dist_reduce_fx="cat")
        for count in ("unparsable", "broken"):
            self.add_state(count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._begin()

    def _begin(self) -> None:
        """Give every list its dtype, so that a process without a batch can take part in the gather."""
        for values in (self.predictions, self.targets):
            values.append(torch.empty(0, dtype=torch.float64, device=self.device))
        self.indices.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._begin()

    def update(self, predictions: Tensor, targets: Tensor, indices: Tensor, mask: Tensor, unparsable: Tensor) -> None:
        """Keep a batch.

        Args:
            predictions: scores, shape ``(batch,)``; not read where ``unparsable``.
            targets: true scores, shape ``(batch,)``.
            indices: the samples' int64 index in their set, shape ``(batch,)``.
            mask: bool, False on padding, shape ``(batch,)``.
            unparsable: bool, True where the answer is not a number, shape ``(batch,)``.
        """
        self.predictions.append(predictions.double().masked_fill(unparsable, 0.0)[mask])
        self.targets.append(targets.double()[mask])
        self.indices.append(indices[mask])
        self.unparsable += (unparsable & mask).sum()

    def update_texts(self, answers: Sequence[str | None], targets: Tensor, indices: Tensor, mask: Tensor) -> None:
        """Keep a batch of answers, each read as a number where it is one; other arguments as :meth:`update`."""
        scores = [None if answer is None else parse_score(answer) for answer in answers]
        self.broken += (torch.tensor([answer is None for answer in answers], device=mask.device) & mask).sum()
        values = [0.0 if score is None else score for score in scores]
        unparsable = torch.tensor([score is None for score in scores], device=mask.device)
        self.update(torch.tensor(values, dtype=torch.float64, device=mask.device), targets, indices, mask, unparsable)

    def compute(self) -> dict[str, Tensor]:
        """``spearman``, ``pearson`` (the task's metric first) and ``unparsable``, float64 scalars.

        Raises:
            RuntimeError: a sample was counted twice.
        """
        predictions, targets, indices = map(dim_zero_cat, (self.predictions, self.targets, self.indices))
        self._tell(self.broken, len(indices), "unparsable")
        order = indices.argsort()
        if (indices[order].diff() == 0).any():
            raise RuntimeError("a sample was counted twice; give each sample of the set once, padding masked")
        scores, truths = predictions[order].tolist(), targets[order].tolist()
        values = {"spearman": spearman(scores, truths), "pearson": pearson(scores, truths)}
        ordered = {self.first: values.pop(self.first), **values, "unparsable": float(self.unparsable)}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in ordered.items()}
