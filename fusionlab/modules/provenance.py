"""What the trained weights of a checkpoint were trained on: a run is not gone on with on something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer

from fusionlab.contracts import Module, as_data
from fusionlab.errors import InputError, name_list
from fusionlab.keys import key_of, plain


class Trained(Module, Protocol):
    """A module that says what it computes in."""

    @property
    def trainer(self) -> Trainer:
        """The attached one."""

    point: str
    """Hash of all base weights, once anything is trained."""

    @property
    def precision(self) -> str:
        """Of the trainer."""


def trained_on(module: Trained, task: str) -> dict[str, str]:
    """Keys of what a task's training reads: samples, weights of the base, and how the base is run.

    Args:
        module: with what is trained, attached to a trainer.
        task: name of the task.
    """
    samples = as_data(module.trainer.datamodule).splits[task]["train"].reading_version
    how = key_of({"precision": module.precision, "backbone": plain(module.backbone.settings)})
    return {"samples": samples, "weights of the base": module.point, "settings of the base": how}


def check_trained_on(module: Trained, checkpoint: Mapping[str, Any], tasks: Iterable[str], where: str) -> None:
    """Raise if tasks in a checkpoint were trained on something else than what is here now.

    Args:
        module: as in :func:`trained_on`.
        checkpoint: one of an earlier version does not say.
        tasks: to look at.
        where: what the message calls the checkpoint.

    Raises:
        InputError: naming the tasks and what is another.
    """
    differing = []
    for task in tasks:
        before = checkpoint.get("trained_on", {}).get(task)
        what = [] if before is None else [name for name, key in trained_on(module, task).items() if before[name] != key]
        differing += [f"{task} ({name_list(what)})"] if what else []
    if differing:
        raise InputError(
            f"{where} was trained on what is another now, though the configuration is the same: "
            f"{name_list(differing)}. Put back what it was trained on, or give --overwrite to train anew."
        )
