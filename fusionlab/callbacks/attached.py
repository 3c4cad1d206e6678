"""The module and data of a trainer, as callbacks ask them."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from fusionlab.contracts import Data, Module, as_data, as_module


def attached(trainer: Trainer, module: LightningModule) -> tuple[Module, Data]:
    """The module that a hook is given, and the trainer's data.

    Raises:
        InputError: one lacks members that are asked for here.
    """
    return as_module(module), as_data(trainer.datamodule)
