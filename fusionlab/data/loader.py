"""Batches of every task at once: the training loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusionlab.errors import InputError, name_list
from fusionlab.samplers import Batch, Split, TrainingOrder, bounded


class StepLoader:
    """Micro-batches ``{task: batch}`` of all tasks, in an order that is a pure function of (seed, task, step).

    Every task gives a batch at every step; a short task reshuffles and goes on. An epoch is as long as the longest task
    needs. The stream goes on over epochs and restarts: the next batch after a resume is the one that would have come
    without it. Where that is, ``trained`` says, or else ``state_dict``, which Lightning restores inside an epoch only,
    and not where the length of the run was asked for before.

    Args:
        splits: the training split of each task.
        batch_size: samples of each task in one batch of one rank.
        seed: the run's seed.
        rank: this process; it takes the ``rank``-th slice of each global batch.
        world_size: number of processes.
        length_multiple: an epoch's length is rounded up to a multiple of this; with the number of accumulated batches
            no update is made of fewer.
        loss_counts: of tasks whose samples weigh differently in the loss, what each weighs (int64), such as its learnt
            tokens. Their batches say ``loss_tokens``: the mean weight of the batches that make one update, over ranks
            and accumulated steps, so that the mean of their losses is that of the whole update's tokens.
        trained: the number of batches that were trained on before, asked when an epoch begins.
        limit: the trainer's bound on the batches of an epoch, a number or a share.
        repeat: whether every epoch has the batches of the first one (``overfit_batches``).

    Raises:
        InputError: a task has fewer training samples than there are processes.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        length_multiple: int = 1,
        loss_counts: Mapping[str, Tensor] | None = None,
        trained: Callable[[], int] | None = None,
        limit: int | float = 1.0,
        repeat: bool = False,
    ) -> None:
        short = [f"{task} ({len(split)})" for task, split in splits.items() if len(split) < world_size]
        if short:
            raise InputError(
                f"fewer training samples than the {world_size} processes: {name_list(short)}; start fewer processes "
                f"(--trainer.devices), or leave these tasks out"
            )
        self.splits = dict(splits)
        self.batch_size = batch_size
        self.rank = rank
        self.step = 0
        self._trained = trained
        global_batch_size = batch_size * world_size
        self._orders = {
            task: TrainingOrder(len(split), global_batch_size, seed=seed, task=task)
            for task, split in self.splits.items()
        }
        longest = max(-(-len(split) // global_batch_size) for split in self.splits.values())
        self._length = -(-longest // length_multiple) * length_multiple
        self._num_accumulated, self._world_size = length_multiple, world_size
        self._loss_counts = dict(loss_counts or {})
        self._of_epoch, self._repeat = max(1, bounded(self._length, limit)), repeat

    def __len__(self) -> int:
        """Number of batches in an epoch: ceil(longest task / global batch), rounded up to ``length_multiple``."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        """One epoch from the current step on; nothing moves before the first batch is asked for."""
        if self._trained is not None:
            self.step = self._trained()
        for _ in range(len(self)):
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def batch(self, step: int) -> dict[str, Batch]:
        """The batch of this rank at ``step``."""
        start = self.rank * self.batch_size
        step = step % self._of_epoch if self._repeat else step
        return {
            task: split.batch(self._orders[task].indices(step)[start : start + self.batch_size])
            | self._loss_tokens(task, step)
            for task, split in self.splits.items()
        }

    def _loss_tokens(self, task: str, step: int) -> Batch:
        counts = self._loss_counts.get(task)
        if counts is None:
            return {}
        of_epoch = step % self._of_epoch  # an epoch's last update is made of the batches that are left
        first = of_epoch - of_epoch % self._num_accumulated
        last = min(first + self._num_accumulated, self._of_epoch)
        of_update = (self._orders[task].indices(step - of_epoch + i) for i in range(first, last))
        total = sum(int(counts[indices].sum()) for indices in of_update)
        return {"loss_tokens": torch.tensor(total / (self._num_accumulated * self._world_size))}

    def state_dict(self) -> dict[str, Any]:
        """Number of batches handed out so far."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that the saved loader had handed out."""
        self.step = state_dict["step"]
