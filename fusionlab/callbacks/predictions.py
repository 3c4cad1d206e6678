"""Predictions into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from fusionlab.errors import InputError
from fusionlab.evaluation.predicting import write_predictions
from fusionlab.files import path_of


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns, a list of rows for each batch, at the end: whole or not at all.

    Args:
        output: the file, ``.jsonl`` or CSV.
    """

    def __init__(self, output: str) -> None:
        super().__init__("batch")
        self.output = path_of(output)
        self._rows: list[Mapping[str, Any]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep a batch's rows until all are there.

        Raises:
            InputError: ``predict_step`` returned something else.
        """
        if not isinstance(prediction, list) or not all(isinstance(row, Mapping) for row in prediction):
            raise InputError(
                f"predict writes rows: {type(pl_module).__name__}.predict_step must return a list of mappings for "
                f"each batch, got {type(prediction).__name__}"
            )
        self._rows += prediction

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, and say so where the rows are of a part of the inputs."""
        rows, self._rows = self._rows, []
        what = f"{len(rows)} predictions"
        if isinstance(trainer.limit_predict_batches, int) or trainer.limit_predict_batches != 1.0:  # 1 is one batch
            what += f" (a part of the inputs: limit_predict_batches {trainer.limit_predict_batches})"
        if trainer.fast_dev_run:
            print(f"fast_dev_run: {what}; nothing is written")
            return
        write_predictions(self.output, rows)
        print(f"{what}: {self.output}")
