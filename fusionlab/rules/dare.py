"""DARE: drop entries of the task vectors at random and rescale the rest, before any rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.task_vectors import TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Rule
from fusionlab.rules.checks import of_task
from fusionlab.rules.dropping import Dropping, check_rates


@dataclass(frozen=True)
class Dare(Dropping):
    """``rule`` on the task vectors with entries dropped with probability p and the rest multiplied by 1/(1−p).

    One SplitMix64 generator per (seed, task, parameter), drawn in flat order, decides; it can be entered anywhere, so
    blocks, threads and devices do not matter. MetaGPT's norms are those before the drop.

    Args:
        rule: what is done with the remaining entries.
        drop_rate: p, one number or one per task.
        seed: of the generators.
        rescale: by 1/(1−p) (``probability``), so that every tensor keeps its L1 norm (``l1``), or ``none``.

    Raises:
        InputError: a drop rate outside 0..1 or of 1, an unknown choice, or a second transform before MetaGPT.

    Source: Language models are super Mario, arXiv 2311.03099.
    """

    rule: Rule
    drop_rate: float | Mapping[str, float] = 0.5
    seed: int = 0
    rescale: Literal["probability", "l1", "none"] = "probability"

    def __post_init__(self) -> None:
        if 1 in check_rates("dare.drop_rate", self.drop_rate):
            raise InputError("dare.drop_rate: 1 drops everything; give a number below 1.")
        self.check("dare")

    def masks(self, name: str, task_vectors: TaskVectors) -> Tensor:
        """1 where an entry remains, else 0."""
        masks = scratch.empty_like(task_vectors.stacked)
        for row, task in zip(masks, task_vectors.tasks, strict=True):
            drop_rate = of_task(self.drop_rate, task, "dare.drop_rate")
            with scratch.frame():
                bits = self.draws(name, task, row, task_vectors.start)
                torch.ge(bits, round(drop_rate * 2.0**64) - (1 << 63), out=row.view(-1))
        return masks

    def unbias_(self, masks: Tensor, task_vectors: TaskVectors) -> None:
        """Times 1/(1−p)."""
        for row, task in zip(masks, task_vectors.tasks, strict=True):
            row.mul_(1.0 / (1.0 - of_task(self.drop_rate, task, "dare.drop_rate")))
