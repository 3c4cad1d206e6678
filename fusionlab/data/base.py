"""What image and text tasks share: loading by stage, the training loader, exact evaluation batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from fusionlab.contracts import DataDefaults
from fusionlab.data.limits import cut, limit_of
from fusionlab.data.loader import StepLoader
from fusionlab.data.sources import is_absent
from fusionlab.data.splits import SPLITS, SplitName
from fusionlab.data.suites import told_missing
from fusionlab.data.tasks import Samples, Task
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.samplers import Batch, Split, derive_seed, exact_batches

_STAGE_SPLITS: dict[str, tuple[SplitName, ...]] = {
    "fit": SPLITS,
    "validate": ("validation",),
    "test": ("test",),
    "predict": (),
}
_EMBEDDED = "embedded:"


class TaskData(LightningDataModule, DataDefaults, ABC):
    """Tasks and their splits; subclasses load one task at a time and say what its samples are (``gives``).

    Args:
        definitions: the tasks by name, completed.
        batch_size: samples of each task in a training batch of one process.
        eval_batch_size: samples in an evaluation batch at most; those of a set are of one size.
        max_samples: use at most this many samples of each split, a fixed random choice.
        cache_dir: folder for decoded images and tokens; by default ``$FUSIONLAB_CACHE``, else ``~/.cache/fusionlab``.
        seed: seed of the order of training samples.
    """

    gives: ClassVar[Samples]
    suite: str | None = None

    def __init__(
        self,
        definitions: dict[str, Task],
        batch_size: int,
        eval_batch_size: int,
        max_samples: int | None = None,
        cache_dir: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size, max_samples=max_samples)
        self.definitions = definitions
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_samples, self.cache_dir, self.seed = max_samples, cache_dir, seed
        self.tasks: dict[str, Any] = {}
        self.loaded: dict[str, dict[str, Split]] = {name: {} for name in definitions}
        """The splits, whole, by task and name."""

    @property
    def task_names(self) -> list[str]:
        """The tasks in order, known before they are loaded."""
        return list(self.definitions)

    @property
    def splits(self) -> dict[str, dict[str, Split]]:
        """The splits by task and name; those that are scored are cut where the trainer's options bound them."""
        return {
            task: {name: self._cut(name, split) for name, split in loaded.items()}
            for task, loaded in self.loaded.items()
        }

    @abstractmethod
    def load_task(self, task: Task, splits: list[SplitName]) -> None:
        """Add the task to ``tasks`` and the splits to ``loaded``."""

    def prepare_data(self) -> None:
        """Fill the cache in one process of each machine, before the others read it."""
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs; all of them without a stage.

        Raises:
            InputError: the data cannot be read as the tasks say; the message names task, split and what to do.
        """
        for name, task in self.definitions.items():
            missing = [
                split for split in (SPLITS if stage is None else _STAGE_SPLITS[stage]) if split not in self.loaded[name]
            ]
            if missing or name not in self.tasks:
                try:
                    self.load_task(task, missing)
                except InputError as error:
                    self._tell_of_suite(error)
                    raise

    def _tell_of_suite(self, error: InputError) -> None:
        """Raise for all sets of the suite that cannot be had at once, if there is one.

        Raises:
            InputError: with their names, and what was wrong with the first.
        """
        absent = {} if self.suite is None else {n: str(t.path) for n, t in self.definitions.items() if is_absent(t)}
        if self.suite is not None and absent:
            raise InputError(told_missing(self.suite, absent, str(error))) from error

    def train_dataloader(self) -> StepLoader:
        """Micro-batches ``{task: batch}`` for this process, from the first one on that was not trained on yet."""
        splits = {name: self._split(name, "train") for name in self.training_tasks or self.definitions}
        if self.trainer is None:
            return StepLoader(splits, self.batch_size, seed=self.seed, loss_counts=self.loss_counts(splits))
        options: dict[str, Any] = {}
        if isinstance(self.trainer, Trainer):
            repeat = self.trainer.overfit_batches > 0
            options = {"trained": self._batches_trained, "limit": self.trainer.limit_train_batches, "repeat": repeat}
        return StepLoader(
            splits,
            self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            length_multiple=self.trainer.accumulate_grad_batches,
            loss_counts=self.loss_counts(splits),
            **options,
        )

    def loss_counts(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """What each training sample weighs in its task's loss, int64; tasks whose samples weigh alike are left out."""
        return {}

    def _batches_trained(self) -> int:
        """Batches of this run over all epochs and restarts, as the trainer counts them and keeps in its checkpoints."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def val_dataloader(self) -> list[int]:
        """Empty batches, of which the trainer's limit leaves one: the module then scores by :func:`fusionlab.evaluate`.

        That takes :meth:`eval_batches`, which the limit bounds in truth.
        """
        return _one_within(limit_of(self.trainer, "validation"))

    def test_dataloader(self) -> list[int]:
        """As :meth:`val_dataloader`."""
        return _one_within(limit_of(self.trainer, "test"))

    def _cut(self, name: str, split: Split) -> Split:
        return cut(split, self.eval_batch_size, limit_of(self.trainer, name))

    def eval_batches(self, task: str, split: str, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """This rank's evaluation batches of a task, each with a bool ``"mask"`` that is False on padding."""
        return exact_batches(self._split(task, split), self.eval_batch_size, rank=rank, world_size=world_size)

    def num_eval_batches(self, task: str, split: str) -> int:
        """Number of evaluation batches of a task, over all ranks."""
        return -(-len(self._split(task, split)) // self.eval_batch_size)

    def _split(self, task: str, split: str) -> Split:
        if split not in self.loaded[task]:
            loaded = name_list(self.loaded[task]) or "none"
            raise RuntimeError(f"split {split!r} of task {task!r} is not loaded (loaded: {loaded}); call setup first")
        return self._cut(split, self.loaded[task][split])

    def chosen(self, rows: np.ndarray, task: str, split: str) -> np.ndarray:
        """At most ``max_samples`` of the rows, a choice that depends on nothing but task and split."""
        if self.max_samples is None or len(rows) <= self.max_samples:
            return rows
        generator = np.random.default_rng(derive_seed("max_samples", task, split))
        return np.sort(generator.choice(rows, self.max_samples, replace=False))


def _one_within(limit: tuple[str, int | float]) -> list[int]:
    """Empty batches, as many as leave one where a share of them is taken."""
    share = limit[1]
    size = 1 if isinstance(share, int) or not share else math.ceil(1 / share)
    return [0] * (size if isinstance(share, int) or not share or int(size * share) else size + 1)


def embedded(names: Iterable[str]) -> dict[str, Task]:
    """Definitions of embedded tasks."""
    return {name: Task(name=name, path=f"{_EMBEDDED}{name}") for name in names}


def embedded_name(task: Task) -> str | None:
    """Which embedded task this is; None if it is none."""
    path = task.path or ""
    return path.removeprefix(_EMBEDDED) if path.startswith(_EMBEDDED) else None


def check_embedded(task: Task, name: str, known: Iterable[str], usable: Iterable[str]) -> None:
    """Raise unless there is such an embedded task, and the task says nothing that would have no effect on it.

    Raises:
        InputError: no embedded task of that name, or a key that does nothing.
    """
    known = list(known)
    if name not in known:
        raise InputError(f"task {task.name!r}: no embedded task {name!r}; {did_you_mean(name, known)}")
    usable = {"name", "path", *usable}
    unused = [field.name for field in fields(Task) if field.name not in usable]
    refuse_keys(task, unused, "which is embedded")


def refuse_keys(task: Task, keys: Iterable[str], why: str) -> None:
    """Raise if the task says something that has no effect.

    Raises:
        InputError: one of ``keys`` is given.
    """
    for key in keys:
        if getattr(task, key) is not None:
            raise InputError(f"{key} does nothing in task {task.name!r}, {why}; remove it")


def check_positive(**values: int | None) -> None:
    """Raise if a number is less than 1.

    Raises:
        InputError: naming it.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
