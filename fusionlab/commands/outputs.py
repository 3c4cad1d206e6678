"""What ``validate`` and ``test`` write and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from fusionlab.contracts import Module
from fusionlab.layout import RESULTS, SCORED
from fusionlab.reporting import print_table, write_results


def write_scores(command: str, config: Any, trainer: Trainer, module: Module) -> None:
    """Draw the rows that were scored, and write them: to ``output``, else into the run folder."""
    if config.verbose:
        print_table(module.rows, f"{module.backbone.name}: {config.model.init_args.get('weights') or 'pretrained'}")
    if trainer.fast_dev_run:
        print("fast_dev_run: nothing is written")
        return
    path = Path(config.output) if config.output else Path(config.trainer.default_root_dir) / RESULTS
    if path.exists() and not config.output:  # the results of the run itself stay as they are
        path = path.with_name(SCORED[command])
    write_results(path, module.rows)
    print(f"rows: {path}")
