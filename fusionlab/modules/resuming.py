"""Whether a checkpoint is of what a module trains, so that training can go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fusionlab.contracts import Module
from fusionlab.errors import InputError, name_list


class Resumed(Module, Protocol):
    """A module whose training can go on from a checkpoint."""

    learning_rate: float
    weight_decay: float

    @property
    def trained_as(self) -> dict[str, Any]:
        """What decides what is trained, beside parameters and their start."""


def check_same_training(module: Resumed, checkpoint: Mapping[str, Any]) -> None:
    """Raise unless the checkpoint holds just what ``module`` trains: Lightning would take what fits, by position.

    Args:
        module: with what it trains made.
        checkpoint: of Lightning, as :class:`~fusionlab.modules.FusionModule` saves it.

    Raises:
        InputError: tasks, method, size, start or optimizer settings differ; the message names them.
    """
    if not module.task_parameters:
        return  # nothing is trained: the weights are to be looked at only
    problems = [*_of_training(module, checkpoint), *_of_tasks(module, checkpoint), *_of_parameters(module, checkpoint)]
    if problems:
        raise InputError(
            f"the checkpoint is not of what is trained here: {name_list(problems)}. Give the configuration that it was "
            f"saved with, or leave --ckpt_path out"
        )


def _of_training(module: Resumed, checkpoint: Mapping[str, Any]) -> list[str]:
    before = dict(checkpoint.get("trained_as", {}))
    now = {name: value for name, value in module.trained_as.items() if name in before}
    if module.injection is not None and "a0_hash" in checkpoint:
        before["A₀"], now["A₀"] = checkpoint["a0_hash"], module.injection.a0_hash
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    before |= {"learning_rate": group["initial_lr"], "weight_decay": group["weight_decay"]}
    now |= {"learning_rate": module.learning_rate, "weight_decay": module.weight_decay}
    return [f"{name} ({before[name]} there, {now[name]} here)" for name in before if before[name] != now[name]]


def _of_tasks(module: Resumed, checkpoint: Mapping[str, Any]) -> list[str]:
    there = [group["name"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    here = list(module.task_parameters)
    return [] if there == here else [f"tasks ({', '.join(there)} there, {', '.join(here)} here)"]


def _of_parameters(module: Resumed, checkpoint: Mapping[str, Any]) -> list[str]:
    trained = {id(parameter) for parameters in module.task_parameters.values() for parameter in parameters}
    here = {name: tuple(value.shape) for name, value in module.named_parameters() if id(value) in trained}
    there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    return [
        f"{name} ({there.get(name, 'none')} there, {shape} here)"
        for name, shape in here.items()
        if there.get(name) != shape
    ]
