"""One module and one data module, built from a configuration as ``fit`` builds them, to score models with."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from fusionlab.adapters import base_state
from fusionlab.contracts import Data, Module, as_data, as_module
from fusionlab.data.tasks import check_samples
from fusionlab.errors import InputError, did_you_mean
from fusionlab.runs.loading import point_hash

DEFAULT_SEED = 42  # of everything, where none is given


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
    with isolate_rng(include_cuda=torch.cuda.is_initialized()):
        for seeded in (random.seed, np.random.seed, torch.manual_seed):  # a network may be drawn
            seeded(_seed_of(config))
        made, given = attached_module(config), data_of(config)
    attached = made.trainer
    module, source = as_module(made), as_data(given, is_set_up=False)
    check_samples(module, source)
    given.trainer = attached
    given.setup("fit")
    source = as_data(given)
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


def attached_module(config: Mapping[str, Any]) -> Any:
    """The LightningModule of a configuration, on the device and in the precision of its trainer."""
    attached = trainer_of(config)
    made = attached.precision_plugin.convert_module(module_of(config))
    attached.strategy.connect(made)
    made.trainer = attached
    return made.to(attached.strategy.root_device)


def module_of(config: Mapping[str, Any]) -> Any:
    """The LightningModule of a configuration, as it is made.

    Raises:
        InputError: what the module refuses.
    """
    return _made("model", config)


def data_of(config: Mapping[str, Any]) -> Any:
    """The LightningDataModule of a configuration, as it is made.

    Raises:
        InputError: what the data refuse.
    """
    return _made("data", config)


def _made(key: str, config: Mapping[str, Any]) -> Any:
    """As ``fit`` makes it: every argument is of its type, and classes among them are made too."""
    given = config.get(key) or {}
    owner = class_given(key, given)
    parser, _ = parser_of(owner)
    known = known_arguments(key, owner, given)
    if "seed" in arguments_of(owner):
        known["seed"] = _seed_of(config)
    arguments = parser.instantiate(parser.parse_object(known))
    return owner(**arguments.as_dict(), **(given.get("dict_kwargs") or {}))


def _seed_of(config: Mapping[str, Any]) -> int:
    seed = config.get("seed_everything")
    return DEFAULT_SEED if seed is None else int(seed)


def class_given(key: str, given: Mapping[str, Any]) -> Any:
    """The class of ``model`` or ``data``; where none is named, the one that `fit` takes.

    Raises:
        InputError: there is no such class.
    """
    default, package = {"model": ("ClipModule", "fusionlab.modules"), "data": ("ImageTasks", "fusionlab.data")}[key]
    path = given.get("class_path") or default
    try:
        return class_of(path, package)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{key}: no class {path!r}: {error}; give the path of one, such as my_package.Mine") from error


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
        InputError: it takes no argument of one of these names, or they stand beside ``init_args``.
    """
    arguments, known = dict(given.get("init_args") or {}), arguments_of(owner)
    if beside := [name for name in given if name not in ("class_path", "init_args", "dict_kwargs")]:
        raise InputError(
            f"{key}: unknown key {beside[0]!r} beside class_path; give {{init_args: {{{beside[0]}: ...}}}}"
        )
    for name in arguments:
        if name not in known:
            raise InputError(f"{key}: unknown key {name!r} of {owner.__name__}; {did_you_mean(name, known)}")
    return arguments
