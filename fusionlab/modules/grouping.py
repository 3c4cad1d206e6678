"""Several tasks' micro-batches through the network as one batch, in a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fusionlab import adapters
from fusionlab.contracts import Application, Module
from fusionlab.errors import InputError
from fusionlab.modules.stepping import seed_device

AtOnce = int | Literal["auto"]
PIXELS_AT_ONCE = 1 << 17
"""Of ``auto``: 128 images of 32 x 32. Two tasks with more than that gain little, and their activations are held."""
GROUPED_METHODS = ("lora", "l_lora")


@dataclass(frozen=True)
class SideBySide:
    """Micro-batches of several tasks as one batch of constant shape, equally many rows of each task.

    Args:
        call: computes the network's output for all of them, first dimension ``tasks * rows``.
        rows: of each task; one that has fewer samples is filled with zeros.
        sizes: samples of each task.
    """

    call: Callable[[], Tensor]
    rows: int
    sizes: tuple[int, ...]

    def parts(self, output: Tensor) -> list[Tensor]:
        """Each task's share of the output, without what was filled in."""
        every = output.split(self.rows)
        return [part[:size] for part, size in zip(every, self.sizes, strict=True)]


@dataclass(frozen=True)
class Given:
    """An output that was computed before.

    Args:
        output: what the call would give.
    """

    output: Tensor

    def __call__(self, call: Callable[[], Tensor]) -> Tensor:
        """The output, without a call."""
        return self.output


class Grouped(Module, Protocol):
    """A module whose tasks may go through its network together."""

    application: Application
    samples_at_once: AtOnce
    draws: bool
    """Whether its network draws in training; True before it is known. Watching every operation costs time."""

    def side_by_side(self, parts: Sequence[Mapping[str, Any]]) -> SideBySide | None:
        """The tasks' micro-batches as one batch; None where this kind of module takes them one after another."""

    @property
    def samples_by_default(self) -> int:
        """How many samples ``auto`` takes at once."""


def checked(samples_at_once: AtOnce) -> AtOnce:
    """The argument as it is.

    Raises:
        InputError: it is negative.
    """
    if samples_at_once != "auto" and samples_at_once < 0:
        raise InputError(f"samples_at_once must be auto or at least 0, got {samples_at_once}")
    return samples_at_once


def filled(values: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other along the first dimension, the shorter ones filled with zeros.

    Example:
        >>> filled([torch.ones(2), torch.ones(1)])
        tensor([1., 1., 1., 0.])
    """
    rows = max(map(len, values))
    missing = [(*[0, 0] * (value.ndim - 1), 0, rows - len(value)) for value in values]
    return torch.cat([F.pad(value, by) if by[-1] else value for value, by in zip(values, missing, strict=True)])


def num_at_once(module: Grouped) -> int:
    """How many samples of all tasks go through the network at once; 0 where tasks go one after another.

    Raises:
        InputError: a number is asked for that this module cannot do, with the reason.
    """
    given, reason = module.samples_at_once, why_apart(module)
    if reason is None:
        return module.samples_by_default if given == "auto" else given
    if given not in ("auto", 0):
        raise InputError(
            f"samples_at_once {given}: tasks cannot go through the network as one batch, as {reason}; leave it out"
        )
    return 0


def why_apart(module: Grouped) -> str | None:
    """Why a module's tasks go through its network one after another; None where they need not."""
    if module.method not in GROUPED_METHODS:
        return f"method {module.method!r} has no adapters that act layer by layer"
    if module.side_by_side([]) is None:
        return f"the micro-batches of a {type(module).__name__} are padded to several lengths"
    return adapters.why_apart(module.base_model)


def in_groups(sizes: Mapping[str, int], samples_at_once: int) -> list[list[str]]:
    """The tasks in order, evenly in as few groups as ``samples_at_once`` allows; a task's own batch stays whole.

    Example:
        >>> in_groups(dict.fromkeys("abcde", 32), 128)
        [['a', 'b', 'c'], ['d', 'e']]
        >>> in_groups(dict.fromkeys("ab", 32), 32)
        [['a'], ['b']]
    """
    tasks = list(sizes)
    most = max(1, samples_at_once // max(1, *sizes.values()))
    groups = -(-len(tasks) // most)
    small, larger = divmod(len(tasks), groups)
    starts = [number * small + min(number, larger) for number in range(groups + 1)]
    return [tasks[start:end] for start, end in pairwise(starts)]


def losses_of(module: Grouped, parts: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Each task's loss under what is trained for it, of one forward of all their micro-batches.

    Args:
        module: the module; the last task is active afterwards.
        parts: by task, its micro-batch.
        seeds: of what each task draws.
    """
    seed_device(seeds[0], module.device)
    if len(parts) == 1:
        [(task, part)] = parts.items()
        module.activate(task)
        return {task: module.loss(task, part)}
    together = module.side_by_side(list(parts.values()))
    assert together is not None
    sizes = dict(zip(parts, together.sizes, strict=True))
    group = adapters.group_of(sizes, seeds, module.device)
    with adapters.activated(module.base_model, group), group.draws if module.draws else nullcontext():
        outputs = together.parts(together.call())
    module.draws = group.draws.has_drawn
    losses = {}
    for (task, part), output in zip(parts.items(), outputs, strict=True):
        module.activate(task)
        module.application = Given(output)
        losses[task] = module.loss(task, part)
    module.activate(task)
    return losses
