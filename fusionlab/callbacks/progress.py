"""One progress display for the whole run: training steps, then what is being scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusionlab.callbacks.attached import attached


class FusionProgressBar(ProgressBar):
    """Says what is running: the training step with its loss, or which model is scored on which split."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._training: Any = None
        self._enabled = True

    def disable(self) -> None:
        """Draw nothing (Lightning calls this on all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the training line at the step that the run is at."""
        module, data = attached(trainer, pl_module)
        tasks = len(data.tasks)
        total = trainer.estimated_stepping_batches
        self._training = self._draw().add_task(
            f"fine-tuning {tasks} task{'s' * (tasks != 1)} ({module.method})",
            total=None if total == float("inf") else int(total),
            completed=trainer.global_step,
            detail="",
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the training line."""
        every = max(1, trainer.log_every_n_steps)
        if self._progress is None or trainer.global_step % every:
            return
        loss = outputs["loss"].item() / len(batch)
        self._progress.update(self._training, completed=trainer.global_step, detail=f"mean loss {loss:.3f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the training line."""
        if self._progress is not None:
            self._progress.update(self._training, completed=trainer.global_step)

    @contextmanager
    def scoring(self, description: str, num_batches: int) -> Iterator[Callable[[], None]]:
        """A line that counts evaluation batches; gives the function to call after each."""
        progress = self._draw()
        line = progress.add_task(description, total=num_batches, detail="")
        try:
            yield lambda: progress.advance(line)
        finally:
            progress.remove_task(line)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the display."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the display, so that the error stands below it."""
        self._close()

    def _draw(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                disable=not self._enabled,
            )
            self._progress.start()
        return self._progress

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
