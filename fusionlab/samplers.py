"""Which samples a step sees: pure functions of (seed, task, step) in training and of the set's size in evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Split(Protocol):
    """One split of one task, held in memory or memory-mapped."""

    data_version: str
    """Short SHA-256 over what a model sees of the split, and its labels."""

    reading_version: str
    """Short SHA-256 over all that a model reads of the split, and what its outputs are compared with."""

    evaluation_order: Tensor | None
    """The order in which evaluation cuts its batches (int64, a permutation), or None for the order of the samples."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, indices: Tensor) -> Batch:
        """The samples at ``indices``, with the key ``"index"`` holding ``indices`` itself."""


class FirstSamples:
    """A split cut to the first samples of its data, which the rows of its scores say.

    They are evaluated in the order in which they are when the whole split is.

    Args:
        split: the whole split.
        num_samples: how many are kept.
        why: the option that bounds it, with its value.
    """

    def __init__(self, split: Split, num_samples: int, why: str) -> None:
        self._split, self._num_samples = split, num_samples
        order = split.evaluation_order
        self.evaluation_order: Tensor | None = None if order is None else order[order < num_samples]
        which = f"{num_samples}" if order is None else f"first {num_samples}"  # of ordered ones others were scored
        self.data_version = f"{split.data_version}:{which}"
        self.reading_version = f"{split.reading_version}:{which}"
        self.limited = f"{why}: the first {num_samples} of {len(split)} samples"

    def __len__(self) -> int:
        """Number of samples that are kept."""
        return self._num_samples

    def batch(self, indices: Tensor) -> Batch:
        """Those of the samples that are kept, of the whole split's ``index``."""
        return self._split.batch(indices)


def bounded(num_batches: int, limit: int | float) -> int:
    """How many of ``num_batches`` a trainer's limit leaves: so many where it is whole, else that share of them.

    Example:
        >>> bounded(7, 3), bounded(7, 9), bounded(7, 0.5), bounded(7, 1.0)
        (3, 7, 3, 7)
    """
    return min(limit, num_batches) if isinstance(limit, int) else int(num_batches * limit)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the SHA-256 of ``parts``; equal parts give equal seeds on every machine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class TrainingOrder:
    """The global batches of one task by step: the stream of seeded permutations, cut into batches.

    The stream is permutation 0 of the samples, then permutation 1, and so on without a gap, so a short set reshuffles
    and goes on, also inside a batch. Nothing but the arguments decides a batch, so any step can be resumed at; the
    permutation in use is kept, so that a step costs one slice.

    Args:
        num_samples: size of the training split, at least 1.
        batch_size: samples in one global batch (over all ranks and accumulated micro-batches).
        seed: the run's seed.
        task: the task's name; tasks of one size see different orders.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, task: str) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.task = task
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """The global batch at ``step``: int64 indices, shape ``(batch_size,)``; steps may come in any order."""
        position, parts, missing = step * self.batch_size, [], self.batch_size
        while missing > 0:
            epoch, offset = divmod(position, self.num_samples)
            part = self._permuted(epoch)[offset : offset + missing]
            parts.append(part)
            position += len(part)
            missing -= len(part)
        return torch.cat(parts)

    def _permuted(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.task, epoch))
            self._permutation, self._epoch = torch.randperm(self.num_samples, generator=generator), epoch
        return self._permutation


def evaluation_batches(
    num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole global batches that fall to ``rank``: every sample exactly once over all ranks.

    Batches are formed over the whole set, all of one size, and dealt to the ranks in turn, so that a sample is always
    computed in the same company: another size would move its features by rounding. The size is the least that needs no
    more batches than ``batch_size``, so padding (index 0, masked) is less than one sample a batch: in two batches of
    128, a third of the work on 160 samples would be on padding.

    Yields:
        ``(indices, mask)``: int64 and bool, both of shape ``(size,)``; the mask is False on padding.

    Example:
        >>> [indices.tolist() for indices, mask in evaluation_batches(5, 4)]
        [[0, 1, 2], [3, 4, 0]]
    """
    size = -(-num_samples // max(1, -(-num_samples // batch_size)))
    for start in range(rank * size, num_samples, max(1, world_size * size)):
        indices = torch.arange(start, start + size)
        mask = indices < num_samples
        yield torch.where(mask, indices, torch.zeros_like(indices)), mask


def exact_batches(split: Split, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The evaluation batches of ``rank``, each with a bool ``"mask"``, False on padding."""
    for positions, mask in evaluation_batches(len(split), batch_size, rank=rank, world_size=world_size):
        indices = positions if split.evaluation_order is None else split.evaluation_order[positions]
        yield {**split.batch(indices), "mask": mask}
