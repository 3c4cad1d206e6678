"""One module and one data module, built from a configuration as ``fit`` builds them, to score models with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch import Trainer

from fusionlab.adapters import base_state
from fusionlab.contracts import Data, Module, as_data, as_module
from fusionlab.data.tasks import check_samples
from fusionlab.errors import InputError, did_you_mean
from fusionlab.runs.loading import point_hash


@dataclass(frozen=True)
class Workbench:
    """One module and one data module, set up once and used for every model.

    Args:
        module: on its device, its tasks prepared, without adapters.
        data: with all splits.
        base_hash: of all base weights.
    """

    module: Module
    data: Data
    base_hash: str

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """The base's state."""
        return base_state(self.module.base_model)

    def versions(self, task: str) -> dict[str, Any]:
        """The samples of a task by split."""
        return {split: self.data.splits[task][split].data_version for split in ("validation", "test")}


def workbench(config: Mapping[str, Any], runs: Sequence[Path] = ()) -> Workbench:
    """Build module and data as ``fit`` would.

    Args:
        config: of a run, or what one is fitted with: ``model``, ``data`` and ``trainer``.
        runs: finished runs whose heads are put in, where they have any.

    Raises:
        InputError: what the module or the data refuses.
    """
    data = dict(config.get("data") or {})
    data_class = class_given("data", data)
    attached = trainer_of(config)
    made = attached.precision_plugin.convert_module(module_of(config))
    attached.strategy.connect(made)
    made.trainer = attached
    made.to(attached.strategy.root_device)
    given = data_class(**known_arguments("data", data_class, data))
    module, source = as_module(made), as_data(given)
    check_samples(module, source)
    given.trainer = attached
    given.setup("fit")
    attached.datamodule = given  # type: ignore[attr-defined]
    if runs:
        module.read_run(runs, source.tasks)
    module.prepare_tasks(source.tasks)
    module.eval()
    return Workbench(module, source, point_hash(module.base_model))


def trainer_of(config: Mapping[str, Any], **more: Any) -> Trainer:
    """What a module is attached to that is scored, or trained for a trial: one device, with its precision.

    Args:
        config: of a run, or what one is fitted with.
        more: further arguments of the trainer.
    """
    trainer = dict(config.get("trainer") or {})
    kept = {name: trainer[name] for name in ("accelerator", "precision") if trainer.get(name) is not None}
    return Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kept,
        **more,
    )


def module_of(config: Mapping[str, Any]) -> Any:
    """The LightningModule of a configuration, as it is made.

    Raises:
        InputError: what the module refuses.
    """
    model = dict(config.get("model") or {})
    module_class = class_given("model", model)
    return module_class(**known_arguments("model", module_class, model))


def class_given(key: str, given: Mapping[str, Any]) -> Any:
    """The class of ``model`` or ``data``; where none is named, the one that `fit` takes."""
    default, package = {"model": ("ClipModule", "fusionlab.modules"), "data": ("ImageTasks", "fusionlab.data")}[key]
    return class_of(given.get("class_path", default), package)


def class_of(path: str, package: str) -> type:
    """The class that a configuration names: of ``package`` by its name alone, of any other by its whole path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module or package), name)


def arguments_of(owner: type) -> list[str]:
    """The names of a class's arguments, with those that it hands on to its base."""
    return list(parser_of(owner)[1])


@cache
def parser_of(owner: type) -> tuple[jsonargparse.ArgumentParser, list[str]]:
    """A parser of a class's arguments, and their names."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    return parser, parser.add_class_arguments(owner, as_group=False, fail_untyped=False)


def known_arguments(key: str, owner: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``init_args`` that are given for a class.

    Raises:
        InputError: it takes no argument of one of these names.
    """
    arguments, known = dict(given.get("init_args") or {}), arguments_of(owner)
    for name in arguments:
        if name not in known:
            raise InputError(f"{key}: unknown key {name!r} of {owner.__name__}; {did_you_mean(name, known)}")
    return arguments
