"""One progress display for the whole run: training steps, then what is being scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusionlab.callbacks.attached import attached
from fusionlab.progress import Lines


class FusionProgressBar(ProgressBar):
    """Says what is running: the training step with its loss, or which model is scored on which split.

    A bar on a terminal; elsewhere, as in a cluster's log, a plain line now and then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._progress: Progress | None = None
        self._training: Any = None
        self._lines: Lines | None = None
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
        steps = trainer.estimated_stepping_batches
        total = None if steps == float("inf") else int(steps)
        what = f"fine-tuning {tasks} task{'s' * (tasks != 1)} ({module.method})"
        if self._is_plain:
            self._lines = Lines(what, total, done=trainer.global_step, write=self._say)
            self._say(f"{what}: step {trainer.global_step} of {'an unknown number' if total is None else total}")
            return
        self._training = self._draw().add_task(what, total=total, completed=trainer.global_step, detail="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the training line."""
        every = max(1, trainer.log_every_n_steps)
        if (self._progress is None and self._lines is None) or trainer.global_step % every:
            return
        detail = f"mean loss {outputs['loss'].item() / len(batch):.3f}"
        if self._lines is not None:
            self._lines.reach(trainer.global_step, detail)
        elif self._progress is not None:
            self._progress.update(self._training, completed=trainer.global_step, detail=detail)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the training line."""
        if self._lines is not None:
            self._say(f"{self._lines.what}: trained, {trainer.global_step} steps")
            self._lines = None
        elif self._progress is not None:
            self._progress.update(self._training, completed=trainer.global_step)

    @contextmanager
    def scoring(self, description: str, num_batches: int) -> Iterator[Callable[[], None]]:
        """A line that counts evaluation batches; gives the function to call after each."""
        if self._is_plain:
            yield Lines(description, num_batches, write=self._say).advance
            return
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

    @property
    def _is_plain(self) -> bool:
        return not self._console.is_terminal

    def _say(self, line: str) -> None:
        if self._enabled:
            print(line, flush=True)

    def _draw(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
                disable=not self._enabled,
            )
            self._progress.start()
        return self._progress

    def _close(self) -> None:
        self._lines = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
