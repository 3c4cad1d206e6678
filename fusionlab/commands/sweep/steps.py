"""Seconds of a training step of a method, one micro-batch a task: a few are run, and nothing is kept of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer

from fusionlab.commands.trainer import trainer_built
from fusionlab.contracts import Data
from fusionlab.search.workbench import module_of, trainer_of

STEPS = 3  # the first one warms up
SECONDS_OF_STEPS = 3.0  # after which no other step of the method begins


class _Timed(Callback):
    """Seconds of every step, from one batch's end to the next one's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = time.monotonic()

    def on_train_batch_end(self, *arguments: object) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._before)
        self._before = now


def seconds_of_step(config: Mapping[str, Any], data: Data) -> float:
    """The median of a few steps, the first one left out where there are others.

    Args:
        config: what the run would be fitted with.
        data: whose batches are trained on; it is left attached to the trainer that it had.
    """
    given = dict(config.get("trainer") or {})
    kept = ("gradient_clip_val", "gradient_clip_algorithm")
    timed = _Timed()
    with trainer_built(Namespace(devices=1, accelerator=given.get("accelerator"))):
        trainer = trainer_of(
            config,
            max_steps=STEPS,
            min_epochs=0,
            max_time=timedelta(seconds=SECONDS_OF_STEPS),
            callbacks=[timed],
            limit_val_batches=0,
            **{name: given[name] for name in kept if given.get(name) is not None},
        )
    before, state = data.trainer, torch.random.get_rng_state()
    try:
        trainer.fit(module_of(config), data)
    finally:
        data.trainer = before
        torch.random.set_rng_state(state)
    return statistics.median(timed.seconds[1:] or timed.seconds)
