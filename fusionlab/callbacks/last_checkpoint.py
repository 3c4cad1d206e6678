"""The checkpoint that an interrupted run goes on from, written whole or not at all."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from fusionlab.callbacks.attached import attached
from fusionlab.errors import InputError
from fusionlab.files import written_whole
from fusionlab.layout import LAST


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all: written beside, synced, renamed.

    Lightning's own goes through a temporary file on another disk, whose move can be cut in half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``.NAME.tmp-*`` beside ``path`` and rename it.

        Raises:
            InputError: it cannot be written, such as on a full disk.
        """
        with written_whole(Path(path)) as unfinished, unfinished.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, about a write that the system has refused
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
            file.flush()
            os.fsync(file.fileno())


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: every so many steps, at the end of epochs and of the training, and when told to stop.

    Beside what Lightning stores (adapters, optimizer, schedule, position in the data) it holds the random states and
    the number of processes. A save falls between two updates only, so nothing that was accumulated is lost.

    Args:
        folder: where ``last.ckpt`` lies.
        every_n_steps: updates between two saves.
    """

    def __init__(self, folder: Path, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise InputError(f"checkpoint_every_n_steps must be at least 1, got {every_n_steps}")
        self.path = folder / LAST
        self.every_n_steps = every_n_steps
        self._saved_at = -1
        self._restored: dict[str, Any] | None = None
        self._run: dict[str, int] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is different from the run that is resumed."""
        _, data = attached(trainer, pl_module)
        self._run = {"processes": trainer.world_size, "batch_size": data.batch_size * trainer.world_size}
        if self._restored is not None and self._restored["run"] != self._run and trainer.is_global_zero:
            print(_what_changed(self._restored["run"], self._run), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random states of the checkpoint back."""
        self._saved_at = trainer.global_step
        if self._restored is not None:
            _set_random_states(self._restored["random"])
            self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a multiple of ``every_n_steps`` was just reached, and after an epoch's last batch.

        Not when the epoch has ended: what Lightning counts then leaves out a batch of the next one after a restart,
        where gradients are accumulated.
        """
        if trainer.global_step % self.every_n_steps == 0 or trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the training ends within an epoch."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save unless this step is saved already, or gradients are being accumulated."""
        if self.is_due(trainer):
            trainer.save_checkpoint(self.path)
            self._saved_at = trainer.global_step

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the step is not saved yet and no gradient waits for an update; never where nothing is kept."""
        if trainer.fast_dev_run:
            return False
        return trainer.global_step != self._saved_at and not trainer.fit_loop._should_accumulate()

    def state_dict(self) -> dict[str, Any]:
        """The random states of this process, and how many processes there are."""
        return {"random": _random_states(), "run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until training starts."""
        self._restored = state_dict


def _what_changed(before: dict[str, int], now: dict[str, int]) -> str:
    return (
        f"fusionlab: resumed by {now['processes']} processes, {before['processes']} before: an update now takes "
        f"{now['batch_size']} samples of each task, {before['batch_size']} before; the data goes on at the same step"
    )


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
