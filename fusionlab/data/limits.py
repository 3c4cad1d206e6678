"""The samples that a trainer's options leave of a split in evaluation, for data of this package and of any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningDataModule, Trainer

from fusionlab.contracts import Data, DataDefaults
from fusionlab.errors import InputError
from fusionlab.samplers import FirstSamples, Split, bounded


def limit_of(trainer: object, split: str) -> tuple[str, int | float]:
    """The option of a trainer that bounds the batches of a split in evaluation, and its value; 1.0 for none.

    Without validation in ``fit`` (0 batches) coefficients are chosen on the whole split.
    """
    if not isinstance(trainer, Trainer) or split == "train":
        return "", 1.0
    if split == "test":
        return "fast_dev_run" if trainer.fast_dev_run else "limit_test_batches", trainer.limit_test_batches
    if trainer.sanity_checking:
        steps = trainer.num_sanity_val_steps
        return "num_sanity_val_steps", 1.0 if steps == float("inf") else int(steps)
    if trainer.overfit_batches:
        return "overfit_batches", trainer.limit_val_batches
    name = "fast_dev_run" if trainer.fast_dev_run else "limit_val_batches"
    return name, trainer.limit_val_batches or 1.0


def cut(split: Split, eval_batch_size: int, limit: tuple[str, int | float]) -> Split:
    """What an option leaves of a split; one that is cut already stays as it is."""
    option, value = limit
    kept = max(1, bounded(-(-len(split) // eval_batch_size), value)) * eval_batch_size
    whole = kept >= len(split) or isinstance(split, FirstSamples)
    return split if whole else FirstSamples(split, kept, f"{option} {value}")


def limited(data: Data) -> Data:
    """The data, with the splits and evaluation batches that the options of the trainer leave it is attached to.

    Raises:
        InputError: an option leaves a part of data that make their evaluation batches themselves.
    """
    trainer = data.trainer if isinstance(data, LightningDataModule) else None
    if not isinstance(trainer, Trainer):
        return data
    limits = {name: limit_of(trainer, name) for of in data.splits.values() for name in of}
    found = {
        task: {name: cut(split, data.eval_batch_size, limits[name]) for name, split in of.items()}
        for task, of in data.splits.items()
    }
    fewer = [
        name for task, of in data.splits.items() for name, split in of.items() if len(found[task][name]) < len(split)
    ]
    if not fewer:
        return data
    if type(data).eval_batches is DataDefaults.eval_batches:
        return _Limited(data, found)
    if trainer.fast_dev_run or trainer.sanity_checking:
        return data
    option, value = limits[fewer[0]]
    name = type(data).__name__
    raise InputError(
        f"trainer.{option} {value}: {name} makes its evaluation batches itself, so that it is not known which samples "
        f"a part of them would be; leave the option out, or let {name} have eval_batches and num_eval_batches of "
        f"fusionlab.contracts.DataDefaults"
    )


class _Limited(DataDefaults):
    """Data of another package, with the first samples of some splits.

    Args:
        data: the whole.
        splits: by task and name.
    """

    def __init__(self, data: Data, splits: Mapping[str, Mapping[str, Split]]) -> None:
        self._data, self.splits, self.tasks = data, splits, data.tasks
        self.batch_size, self.eval_batch_size = data.batch_size, data.eval_batch_size
        self.training_tasks = data.training_tasks

    @property
    def task_names(self) -> Sequence[str]:
        return self._data.task_names

    def shown_samples(self, task: str) -> list[str]:
        return self._data.shown_samples(task)
