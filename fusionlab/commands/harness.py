"""``--harness``: lm-eval's tasks, scored beside ours in ``fit`` and ``test``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from fusionlab.callbacks import FusionCallback, HarnessScores
from fusionlab.contracts import Data
from fusionlab.errors import InputError
from fusionlab.harness import HarnessTasks
from fusionlab.linearize import LINEARIZED_METHODS
from fusionlab.modules import CausalModule


def score_by_harness(config: Any, command: str, trainer: Trainer, module: LightningModule, data: Data) -> None:
    """Read lm-eval's tasks, and let the trainer's callbacks score them; nothing where none are given.

    Args:
        config: the command's configuration.
        command: its name.
        trainer: whose callbacks score.
        module: the model.
        data: whose tasks' names theirs must differ from.

    Raises:
        InputError: they cannot be read or scored, or would not be.
    """
    if config.harness is None:
        if config.harness_limit is not None or config.harness_num_fewshot is not None:
            raise InputError("harness_limit and harness_num_fewshot do nothing without --harness; give tasks there")
        return
    if command not in ("fit", "test") or (command == "fit" and config.train_only):
        doing = "train_only" if command == "fit" else command
        raise InputError(f"harness: {doing} scores nothing by lm-eval; give it to test, or to the fit that fuses")
    if not isinstance(module, CausalModule):
        raise InputError(
            f"harness: lm-eval scores causal language models, and {type(module).__name__} has none; use CausalModule"
        )
    entries = [entry if isinstance(entry, str) else dict(entry) for entry in config.harness]
    tasks = HarnessTasks.load(entries, config.harness_limit, config.harness_num_fewshot)
    linearized = command == "fit" or module.weights is not None
    tasks.check(data.task_names, linearized=linearized and module.method in LINEARIZED_METHODS)
    if command == "test":
        trainer.callbacks.append(HarnessScores(tasks))
        return
    for part in trainer.callbacks:
        if isinstance(part, FusionCallback):
            part.harness = tasks
