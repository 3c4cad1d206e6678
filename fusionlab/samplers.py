"""Which samples a step sees: pure functions of (seed, task, step) in training and of the set's size in evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the SHA-256 of ``parts``; equal parts give equal seeds on every machine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class TrainingOrder:
    """``training_indices`` for many steps of one task: keeps the permutation in use, so that a step costs one slice.

    Args:
        num_samples: size of the training split, at least 1.
        batch_size: samples in one global batch.
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


def training_indices(num_samples: int, batch_size: int, step: int, *, seed: int, task: str) -> Tensor:
    """The global batch of ``task`` at ``step``: the stream of seeded permutations, cut into batches.

    The stream is permutation 0 of the samples, then permutation 1, and so on without a gap, so a short set reshuffles
    and goes on, also inside a batch. Nothing but the arguments decides the result, so any step can be resumed at.

    Args:
        num_samples: size of the training split, at least 1.
        batch_size: samples in one global batch (over all ranks and accumulated micro-batches).
        step: number of batches before this one.
        seed: the run's seed.
        task: the task's name; tasks of one size see different orders.

    Returns:
        int64 indices, shape ``(batch_size,)``.
    """
    return TrainingOrder(num_samples, batch_size, seed=seed, task=task).indices(step)


def evaluation_batches(
    num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole global batches that fall to ``rank``: every sample exactly once over all ranks.

    Batches are formed over the whole set, all of ``batch_size`` (the last one padded with index 0 and masked), and
    dealt to the ranks in turn, so that a sample is always computed in the same company: another batch size would move
    its features by rounding.

    Yields:
        ``(indices, mask)``: int64 and bool, both of shape ``(batch_size,)``; the mask is False on padding.
    """
    for start in range(rank * batch_size, num_samples, world_size * batch_size):
        indices = torch.arange(start, start + batch_size)
        mask = indices < num_samples
        yield torch.where(mask, indices, torch.zeros_like(indices)), mask
