"""Tasks of lm-eval beside the data's own: in ``test`` by a callback of their own, in ``fit`` by the fusion callback."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fusionlab.adapters.routed import RoutedWeights
from fusionlab.adapters.weights import is_linearized
from fusionlab.errors import InputError
from fusionlab.evaluation.rows import Row
from fusionlab.harness import HarnessTasks
from fusionlab.modules import CausalModule
from fusionlab.tensors.masked import MaskedVectors

_log = logging.getLogger(__name__)


class HarnessScores(Callback):
    """Adds lm-eval's rows of the weights that ``test`` scores.

    Args:
        tasks: lm-eval's.
    """

    def __init__(self, tasks: HarnessTasks) -> None:
        self.tasks = tasks

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be scored.

        Raises:
            InputError: tasks that generate, and weights that are linearized over the whole network; weights by task.
        """
        loaded = causal(pl_module).loaded
        if loaded is not None and isinstance(loaded.weights, MaskedVectors):
            raise InputError(
                "harness: lm-eval's tasks have no mask of weights that need to know the task; leave it out"
            )
        if loaded is not None and isinstance(loaded.weights, RoutedWeights):
            raise InputError(
                "harness: these weights are weighed by each sample's prompt, which lm-eval does not tell; leave it out"
            )
        self.tasks.check([], linearized=loaded is not None and is_linearized(loaded.weights))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score by lm-eval."""
        module = causal(pl_module)
        loaded = module.loaded
        labels = {"model": "pretrained"} if loaded is None else loaded.labels
        weights = None if loaded is None else loaded.weights
        module.rows += harness_rows(self.tasks, trainer, module, [(weights, {"seed": module.seed, **labels})])


def harness_rows(
    tasks: HarnessTasks, trainer: Trainer, module: CausalModule, models: Iterable[tuple[Any, dict[str, Any]]]
) -> list[Row]:
    """lm-eval's rows of several weights, on the first process alone; the others wait, and have none.

    Args:
        tasks: lm-eval's.
        trainer: the trainer, with the data.
        module: the module.
        models: weights, as ``module.use`` takes them, and the fields of their rows.
    """
    rows: list[Row] = []
    if trainer.world_size > 1 and trainer.is_global_zero:
        _log.warning("lm-eval's tasks are scored by the first of %d processes; the others wait", trainer.world_size)
    for weights, labels in models:
        if trainer.is_global_zero:
            with module.use(weights):
                rows += tasks.rows(module, trainer.datamodule.eval_batch_size, **labels)
        trainer.strategy.barrier("scored by lm-eval")
    return rows


def causal(module: LightningModule) -> CausalModule:
    """``module``, which was found to have a language model when lm-eval's tasks were given."""
    assert isinstance(module, CausalModule), type(module)
    return module
