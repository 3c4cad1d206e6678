"""Modules and data of another package that differ from ``own_regressor`` in one way each."""

from __future__ import annotations

from copy import deepcopy

import own_regressor
import torch
from own_regressor import DIM, Planes, Regressor
from torch import Tensor, nn


class InSetup(Planes):
    """Whose tasks and splits are made in ``setup``, as Lightning shows it."""

    def __init__(self, batch_size: int = 8, eval_batch_size: int = 16) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.kept = self.tasks, self.splits
        del self.tasks, self.splits

    def setup(self, stage: str) -> None:
        self.tasks, self.splits = self.kept


class Named(Planes):
    """Whose first task is called otherwise.

    Args:
        name: what it is called.
    """

    def __init__(self, name: str, batch_size: int = 8, eval_batch_size: int = 16) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.tasks, self.splits = (
            {name if task == "plane 0" else task: value for task, value in of.items()}
            for of in (self.tasks, self.splits)
        )


class OfTrainer(Regressor):
    """Whose precision is the trainer's, which is attached later."""

    @property
    def precision(self) -> str:
        return str(self.trainer.precision)


class Unused(Regressor):
    """With a parameter that no loss uses, and a frozen one."""

    def add_adapters(self, tasks: list[str]) -> None:
        super().add_adapters(tasks)
        for task in tasks:
            spare, frozen = (nn.Parameter(torch.ones(2), requires_grad=grad) for grad in (True, False))
            self.copies[task].register_parameter("spare", spare)
            self.copies[task].register_parameter("frozen", frozen)
            self.task_parameters[task] += [spare, frozen]

    def finetuned(self, task: str) -> dict[str, Tensor]:
        return {name: value for name, value in super().finetuned(task).items() if name not in ("spare", "frozen")}


class Tied(Regressor):
    """With a layer that is there twice; its fine-tuned weights are the whole ``state_dict``."""

    def __init__(self, learning_rate: float = 0.02) -> None:
        super().__init__(8, learning_rate)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            twice = nn.Linear(8, 8)
            self.network = nn.Sequential(nn.Linear(DIM, 8), twice, nn.Tanh(), twice, nn.Linear(8, 1))
        self.network.requires_grad_(False)
        self.backbone = own_regressor.Network("tied", self.network)

    def add_adapters(self, tasks: list[str]) -> None:
        for task in tasks:
            self.copies[task] = deepcopy(self.network).requires_grad_(True)
            self.task_parameters[task] = list(self.copies[task].parameters())

    def finetuned(self, task: str) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.copies[task].state_dict().items()}
