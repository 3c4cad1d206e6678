"""What the trained weights of a checkpoint were trained on: a run is not gone on with on something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusionlab.errors import InputError, name_list
from fusionlab.keys import key_of, plain


def trained_on(module: Any, task: str) -> dict[str, str]:
    """Keys of what a task's training reads: samples, weights of the base, and how the base is run.

    Args:
        module: a :class:`~fusionlab.modules.FusionModule` with what is trained, attached to a trainer.
        task: name of the task.
    """
    samples = module.trainer.datamodule.splits[task]["train"].reading_version
    how = key_of({"precision": module.precision, "backbone": plain(module.backbone.settings)})
    return {"samples": samples, "weights of the base": module.point, "settings of the base": how}


def check_trained_on(module: Any, checkpoint: Mapping[str, Any], tasks: Iterable[str], where: str) -> None:
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
