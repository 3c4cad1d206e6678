"""SIGTERM, Ctrl-C and SLURM's warning signal: finish the step, save it on all ranks, ask for a requeue, end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fusionlab.callbacks.last_checkpoint import LastCheckpoint
from fusionlab.runs.leases import slurm_job


class StopOnSignal(Callback):
    """Ends the run at a step's end when SIGTERM, SIGINT or SIGUSR1 comes to any rank, with that step saved.

    Lightning saves inside the signal handler, in the middle of a step, where ranks can wait for each other for ever
    and the update is lost; here all ranks agree first. Outside of the training the process ends at once. The exit code
    is 128 + the signal's number, and the same command goes on from the saved step. Under SLURM, SIGUSR1
    (``#SBATCH --signal=USR1@120``) also requeues the job. A second SIGINT ends the process at once; one that comes
    right after the first, as torchrun hands it on, is the same. Signals that the process ignores, as those of a shell's
    background do with SIGINT, stay ignored.

    Args:
        checkpoint: saves the step; without one the run ends unsaved.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    same_within_seconds = 0.5

    def __init__(self, checkpoint: LastCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self._received: int | None = None
        self._received_at = 0.0
        self._training = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on; before Lightning does, which then leaves SIGUSR1 alone."""
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heeded}

    def restore(self) -> None:
        """Put the handlers back as they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._received = self._received, number
        if not self._training:
            self._end(number, "the same command starts again where it was")
        now = time.monotonic()
        if first is None:
            self._received_at = now
        elif number == signal.SIGINT and now - self._received_at > self.same_within_seconds:
            self._end(number, "at once, so that this step is lost; the same command goes on from what was saved before")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning and wait for the end of a step from now on."""
        self._training = True
        for number in self._before:
            signal.signal(number, self._handle)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End here if any rank was told to, unless gradients are being accumulated."""
        if trainer.fit_loop._should_accumulate():
            return
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        number = self._received or signal.SIGTERM
        if self.checkpoint is not None:
            self.checkpoint.save(trainer)
        if trainer.is_global_zero and number == signal.SIGUSR1:
            requeue()
        saved = "saved" if self.checkpoint is not None else "not saved: checkpoints are off"
        self._end(number, f"step {trainer.global_step} is {saved}; the same command goes on from there")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a signal ends the process at once; what is left to do takes no training."""
        self._training = False
        if self._received is not None:
            self._end(self._received, "training is done; the same command fuses and scores")

    def _end(self, number: int, state: str) -> None:
        print(f"fusionlab: stopped by {signal.Signals(number).name}; {state}", file=sys.stderr)
        raise SystemExit(128 + number)


def requeue() -> None:
    """Ask SLURM to run this job, or this task of an array, again; nothing where there is no SLURM."""
    job = slurm_job()
    if job is not None:
        subprocess.run(["scontrol", "requeue", job], check=True)
