"""Begin the run folder once the data is known to be good, hold its tasks, take over what other jobs trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fusionlab.callbacks.attached import attached
from fusionlab.callbacks.origin import origin_of
from fusionlab.contracts import Module
from fusionlab.distributed.ranks import raise_together, same_on_all_ranks
from fusionlab.errors import InputError, name_list
from fusionlab.fusion.folders import export_finetuned
from fusionlab.layout import LEASES
from fusionlab.runs.checkpoints import read_checkpoint
from fusionlab.runs.folder import RunFolder, RunState
from fusionlab.runs.leases import Leases

# how Lightning's messages about options begin, where they have no type of their own
_OF_OPTIONS = ("Early stopping conditioned on metric", "`val_check_interval`")


class RunFolderCallback(Callback):
    """Begins the run folder, and holds the right to train its tasks until the run ends.

    Args:
        folder: the run folder, or the part of one that this job trains.
        config: the resolved configuration.
        state: what was found in the folder.
        taken: the tasks that other jobs have trained, each with the checkpoint that holds it.
        leases: folder for the leases, shared by all jobs of a run.
        overwrite: start anew in a folder that is in use.
        begins: whether the run begins; a dry run does not.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: dict[str, Any],
        *,
        state: RunState,
        taken: Mapping[str, Path],
        leases: Path | None = None,
        overwrite: bool = False,
        begins: bool = True,
    ) -> None:
        self.folder, self.config, self.state, self.overwrite = folder, config, state, overwrite
        self.taken, self.begins = dict(taken), begins
        self._leases_folder = leases or folder.path / LEASES
        self._leases: Leases | None = None
        self._put_aside = False  # a former run, which is not forgotten yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make what is trained, and fill in what other jobs have trained; only the rest is trained."""
        if stage != "fit":
            return
        module, data = attached(trainer, pl_module)  # refused before the module is set up for them
        if not self.taken:
            return
        module.add_adapters(list(data.tasks))
        for path in dict.fromkeys(self.taken.values()):
            fill_in(module, [task for task, of in self.taken.items() if of == path], path)
        rest = [task for task in data.tasks if task not in self.taken]
        if rest:
            module.task_parameters = {task: module.task_parameters[task] for task in rest}
            data.training_tasks = rest
        else:
            trainer.fit_loop.epoch_loop.max_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml; the first thing that the run writes."""
        seen = {
            "state": self.state,
            "taken over": sorted(self.taken),
            "checkpoint": self.folder.last_checkpoint is None,
        }
        module, data = attached(trainer, pl_module)
        same_on_all_ranks(trainer.strategy, f"the run folder {str(self.folder.path)!r}", seen)
        problem = None
        if trainer.is_global_zero and self.begins:
            try:
                self._begin(list(data.tasks))
            except InputError as error:
                problem = error
        raise_together(trainer.strategy, problem)
        report = module.injection
        if trainer.is_global_zero and report is not None:
            what = f"{report.num_adapted_layers} adapted layers, {report.num_trainable:,} trained values"
            print(f"{what}, {len(data.tasks)} tasks")

    def _begin(self, tasks: list[str]) -> None:
        leases = Leases(self._leases_folder)
        leases.take_tasks(task for task in tasks if task not in self.taken)
        self._leases = leases
        self.folder.remove_leftovers()
        if self.folder.check(self.config, overwrite=self.overwrite) != self.state:
            raise InputError(f"another job has written to {str(self.folder.path)!r} meanwhile; give the command again")
        self.folder.begin(self.config, self.state, self.taken, overwrite=self.overwrite)
        self._put_aside = self.overwrite

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Let the run go that this one takes the place of, once a checkpoint is kept."""
        if self._put_aside and self.folder.last_checkpoint is not None:
            self.folder.forget_overwritten()
            self._put_aside = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same at the end of a run that keeps no checkpoint."""
        if trainer.is_global_zero and self.begins:
            self.folder.forget_overwritten()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the tasks back."""
        if self._leases is not None:
            self._leases.close()
            self._leases = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the tasks back; a run that began here and kept nothing, or was refused, is as if it had never begun."""
        begun = self._leases is not None and self.state == "new" and isinstance(exception, Exception)
        if begun and (self.folder.last_checkpoint is None or is_of_options(exception)):
            self.folder.take_back()
        self.teardown(trainer, pl_module, "fit")


def is_of_options(error: BaseException) -> bool:
    """Whether Lightning refuses an option, which it may do when the option is first used, such as in an epoch's end."""
    told = " ".join(str(error).split())
    return isinstance(error, MisconfigurationException) or (
        isinstance(error, RuntimeError | ValueError) and told.startswith(_OF_OPTIONS)
    )


class TrainOnly(Callback):
    """Ends a job that trains some tasks of a run: writes what was trained and marks the part; a later fit fuses.

    Args:
        root: the run folder.
        part: this job's part of it.
    """

    def __init__(self, root: Path, part: RunFolder) -> None:
        self.root, self.part = root, part

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapters, or weights, then the mark."""
        module, data = attached(trainer, pl_module)
        tasks = list(data.tasks)
        export_finetuned(module, self.root, tasks, origin_of(trainer, module, data))
        if trainer.is_global_zero:
            self.part.finish_part(tasks)
            print(f"trained {name_list(tasks)}: {self.root}")
        trainer.strategy.barrier("part written")


@torch.no_grad()
def fill_in(module: Module, tasks: list[str], path: Path) -> None:
    """Copy what a checkpoint holds for ``tasks`` into ``module``.

    Raises:
        InputError: the checkpoint cannot be read, started from another A₀, was trained on other samples or another
            base, or lacks a parameter.
    """
    checkpoint = read_checkpoint(path, f"the checkpoint of {name_list(tasks)}", "give --overwrite to train all anew")
    before, now = checkpoint.get("a0_hash"), None if module.injection is None else module.injection.a0_hash
    if before != now:
        raise InputError(
            f"{name_list(tasks)} in {str(path)!r} started from another A₀ (hash {before}, here {now}): another seed, "
            f"base or rank. Give the same, or --overwrite to train all tasks anew."
        )
    module.check_trained_on(checkpoint, tasks, repr(str(path)))
    own = {id(parameter) for task in tasks for parameter in module.task_parameters[task]}
    for name, parameter in module.named_parameters():
        if id(parameter) in own:
            if name not in checkpoint["state_dict"]:
                raise InputError(f"{str(path)!r} has no {name}; train {name_list(tasks)} again with --overwrite")
            parameter.copy_(checkpoint["state_dict"][name])
