"""The one loop that scores: every batch of a task once, over all ranks, under each of several models.

Scores of one model, of many, of sums that act linearly, the plane of two tasks and a search's losses are its callers;
they say how a model acts, and what is counted of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from fusionlab.contracts import Batch, Data, Module

Counts = TypeVar("Counts")


@dataclass(frozen=True)
class Acting:
    """A model to score.

    Args:
        tasks: the tasks to score it on.
        acts: lets its weights act within a block, asked for each batch; by default those act that do already.
    """

    tasks: Collection[str]
    acts: Callable[[], AbstractContextManager[object]] = nullcontext


def count_batches(
    module: Module,
    models: Mapping[str, Acting],
    batches: Callable[[str], Iterable[Batch]],
    begin: Callable[[str], Counts],
    count: Callable[[str, Batch, Counts], None],
    *,
    tasks: Iterable[str],
    before_batch: Callable[[], None] = lambda: None,
    on_batch: Callable[[int], None] = lambda models: None,
) -> dict[str, dict[str, Counts]]:
    """Count every batch under every model that is scored on its task.

    No gradient, evaluation mode and the module's precision; all is put back at the end.

    Args:
        module: whose tasks are prepared.
        models: by name.
        batches: of a task, on any device.
        begin: what a task's counts begin with.
        count: adds a batch on the module's device to the counts, under the model that acts.
        tasks: in the order in which they are scored.
        before_batch: called before each batch.
        on_batch: called after each batch with the number of models scored on it.

    Returns:
        By model and task what was counted.
    """
    found: dict[str, dict[str, Counts]] = {name: {} for name in models}
    with evaluating(module):
        for task in tasks:
            counts = {name: begin(task) for name, model in models.items() if task in model.tasks}
            for batch in batches(task) if counts else ():
                before_batch()
                batch = to_device(batch, module.device)
                for name, counted in counts.items():
                    with models[name].acts():
                        count(task, batch, counted)
                on_batch(len(counts))
            for name, counted in counts.items():
                found[name][task] = counted
    return found


def dealt(data: Data, split: str) -> Callable[[str], Iterator[Batch]]:
    """A task's evaluation batches for this rank: whole batches of constant shape, each sample once over all ranks."""
    rank, world_size = rank_and_world_size()
    return lambda task: data.eval_batches(task, split, rank=rank, world_size=world_size)


@contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """No gradient, evaluation mode and the module's precision; every part's mode is put back at the end."""
    with torch.no_grad(), in_evaluation_mode(module):
        yield


@contextmanager
def in_evaluation_mode(module: Module) -> Iterator[None]:
    """Evaluation mode and the module's precision, gradients as they are; every part's mode is put back at the end."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with module.evaluation_context():
            yield
    finally:
        for part, was_training in flags:
            part.training = was_training


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }
