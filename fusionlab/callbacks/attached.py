"""The module and data of a trainer, as callbacks ask them."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from fusionlab.contracts import Data, Module, as_data, as_module
from fusionlab.data.limits import limited


def attached(trainer: Trainer, module: LightningModule) -> tuple[Module, Data]:
    """The module that a hook is given, and the trainer's data.

    Raises:
        InputError: one lacks members that are asked for here.
    """
    return as_module(module), as_data(trainer.datamodule)


def attached_to_score(trainer: Trainer, module: LightningModule) -> tuple[Module, Data]:
    """The same, with the samples that the trainer's options leave to be scored.

    Raises:
        InputError: one lacks members, or an option leaves a part of data that cannot be cut.
    """
    given, data = attached(trainer, module)
    return given, limited(data)
