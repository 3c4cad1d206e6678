"""What the cards of a run's models tell of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from fusionlab.cards import DataSet, Origin
from fusionlab.contracts import Data, Module
from fusionlab.data.base import TaskData
from fusionlab.data.tasks import Task
from fusionlab.evaluation.rows import Row
from fusionlab.tensors.hub import is_hub_id

# constructor arguments that decide what is trained, of the module and of the trainer, as far as they have them
_OF_MODULE = ("method", "dropout", "learning_rate", "weight_decay", "num_warmup_steps", "lr_schedule", "seed")
_OF_TRAINER = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "world_size")


def origin_of(trainer: Trainer, module: Module, data: Data, rows: Sequence[Row] = ()) -> Origin:
    """What the folders of a run's weights do not say of themselves.

    Args:
        trainer: attached to the others.
        module: whose weights are written.
        data: that they were trained on.
        rows: the run's result rows, where it has scored already.
    """
    told: dict[str, Any] = {name: getattr(module, name, None) for name in _OF_MODULE}
    told |= {"batch_size": data.batch_size, "precision": module.precision}
    told |= {name: getattr(trainer, name) for name in _OF_TRAINER}
    recipe = {name: value for name, value in told.items() if isinstance(value, str | int | float) and value != -1}
    defined = data.definitions if isinstance(data, TaskData) else {}  # of another package's nothing is known
    datasets = {task: found for task, of in defined.items() if (found := _on_hub(of)) is not None}
    return Origin(module.backbone.name, datasets=datasets, recipe=recipe, rows=rows)


def _on_hub(task: Task) -> DataSet | None:
    """Where a task's samples are on the hub; None for files here, and for what is drawn or written here."""
    path = task.path
    if path is None or not is_hub_id(path) or Path(path).expanduser().exists():
        return None
    return DataSet(path, task.config, task.revision)
