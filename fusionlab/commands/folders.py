"""Where a command writes: the next free run folder, this job's part of one, or a folder that is gone afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fusionlab.contracts import ModuleDefaults
from fusionlab.distributed.ranks import RUN_FOLDER_VARIABLE, started_world_size
from fusionlab.errors import InputError, name_list
from fusionlab.files import check_folder, named
from fusionlab.modules import FusionModule
from fusionlab.runs.folder import RunFolder, names_of_tasks
from fusionlab.search.workbench import class_given


def folder_of(config: Any) -> RunFolder:
    """The run folder, or this job's part of it."""
    root = RunFolder(Path(config.trainer.default_root_dir))
    if not config.train_only:
        return root
    tasks = names_of_tasks(config.data.init_args.get("tasks"))
    if not tasks:
        raise InputError("train_only: name the tasks to train in --data.tasks; the job's folder is called after them")
    return root.part(tasks)


def check_untrained(root: RunFolder, part: RunFolder, tasks: Sequence[str]) -> None:
    """Raise if a job was to train tasks anew that the run, or another job of it, has trained.

    Raises:
        InputError: which, and where.
    """
    held = {task: path for task, path in root.holders().items() if path != part.path}
    if taken := [task for task in tasks if task in held]:
        raise InputError(
            f"{name_list(taken)}: trained already in {str(held[taken[0]])!r}; leave out what is trained, give another "
            f"--trainer.default_root_dir, or --overwrite to train anew"
        )


def taken_before(folder: RunFolder, trained: Collection[str]) -> list[str]:
    """The tasks that an unfinished run took over from parts when it began.

    Raises:
        InputError: one is not trained there any more.
    """
    taken = folder.taken()
    if gone := [task for task in taken if task not in trained]:
        raise InputError(
            f"the run in {str(folder.path)!r} took {name_list(gone)} over from its parts/, which hold them no longer; "
            f"give --overwrite to train all tasks anew"
        )
    return taken


def folder_for_a_trial(cleanup: ExitStack) -> str:
    """A folder that is gone once ``cleanup`` closes, so that ``fast_dev_run`` leaves every run as it is."""
    if (folder := _chosen_by_first()) is not None:
        return folder
    folder = tempfile.mkdtemp(prefix="fusionlab-")
    cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run_folder(command: str, config: Any) -> str:
    """The folder that the trainer writes into: the given one, ``~`` expanded, else the next free one.

    Raises:
        InputError: an empty name, or nothing can be written there; or see :func:`next_run_folder`.
    """
    given = config.trainer.default_root_dir
    path = next_run_folder(command, config).path if given is None else given
    if given is None and config.get("output") is not None:  # which all is written to
        return str(path)
    with named("trainer.default_root_dir", "give a folder that can be written to"):
        return str(check_folder(path))


def check_places(trainer: Trainer) -> None:
    """Raise unless loggers, checkpoints and profiles that are asked for can be written where they are to be.

    Raises:
        InputError: which one, and why.
    """
    places: list[tuple[Any, Any]] = [(each, each.save_dir) for each in trainer.loggers]
    places.append((trainer.profiler, trainer.profiler.dirpath))
    places += [(each, each.dirpath) for each in trainer.callbacks if isinstance(each, ModelCheckpoint)]
    for writer, folder in places:
        if folder is not None and "://" not in str(folder):
            with named(f"trainer: {type(writer).__name__}", "give a folder that can be written to"):
                check_folder(folder or ".")


def next_run_folder(command: str, config: Any) -> RunFolder:
    """``runs/BACKBONE-KIND-K``, the next free one.

    Raises:
        InputError: several processes, nodes or jobs would each choose one.
    """
    if (folder := _chosen_by_first()) is not None:
        return RunFolder(Path(folder))
    processes = max(started_world_size(), config.trainer.num_nodes)
    if processes > 1 or (command == "fit" and config.train_only):
        what = f"{processes} processes or nodes" if processes > 1 else "jobs that train one run's tasks"
        raise InputError(
            f"{what} were started: give --trainer.default_root_dir, a folder that all of them see, so that they "
            f"agree on it"
        )
    own, arguments = class_given("model", config.model), config.model.init_args
    default = own.default_backbone if issubclass(own, FusionModule) else own.__name__
    backbone = _text(arguments.get("backbone"), default)
    method = _text(arguments.get("method"), own.method if issubclass(own, ModuleDefaults) else None)
    kind = (method or ModuleDefaults.method) if command == "fit" else command
    return RunFolder.next_free(f"{Path(backbone).name}-{kind}")


def _text(value: Any, default: Any) -> str:
    # of a class of another package it may be anything
    return next((each for each in (value, default) if isinstance(each, str) and each), "")


def _chosen_by_first() -> str | None:
    """The folder that the process which started this one has chosen."""
    return os.environ.get(RUN_FOLDER_VARIABLE) if os.environ.get("LOCAL_RANK", "0") != "0" else None
