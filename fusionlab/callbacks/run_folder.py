"""Write the run's configuration once the data is known to be good, and clear what an overwritten run left."""

from __future__ import annotations

import shutil
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from fusionlab.reporting import write_text
from fusionlab.runs import CHECKPOINTS, CONFIG, RESULTS, RunFolder


class RunFolderCallback(Callback):
    """Begins the run folder.

    Args:
        folder: the run folder.
        config: the resolved configuration.
        is_new: False where an unfinished run goes on, whose folder is left as it is.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], *, is_new: bool) -> None:
        self.folder, self.config, self.is_new = folder, config, is_new

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml; the first thing that the run writes."""
        if not (self.is_new and trainer.is_global_zero):
            return
        (self.folder.path / RESULTS).unlink(missing_ok=True)
        for name in (CHECKPOINTS, "adapters", "finetuned", "fused", "plots"):
            shutil.rmtree(self.folder.path / name, ignore_errors=True)
        write_text(self.folder.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False))
