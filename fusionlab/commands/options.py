"""Options of Lightning's commands and trainer that cannot work here, or not in a command, each with the reason.

What is not named here works, as Lightning's documentation says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fusionlab.commands.bounds import check_bounds, check_timeout
from fusionlab.commands.given import check_given
from fusionlab.contracts import Data, Module
from fusionlab.data import ChatTasks, TextTasks
from fusionlab.data.base import TaskData
from fusionlab.distributed.strategies import SHARDED, check_sharded, check_strategy
from fusionlab.errors import InputError, name_list
from fusionlab.modules import FusionModule
from fusionlab.search.workbench import class_given

# options of the trainer that never act, whatever the value, with what to do
NEVER: Mapping[str, str] = {
    "barebones": "it times the trainer itself, without log, checkpoints and progress; leave it out",
    "reload_dataloaders_every_n_epochs": "the data is the same in every epoch; leave it out",
    "use_distributed_sampler": "rows are dealt to the processes without a sampler; leave it out",
    "enable_autolog_hparams": "nothing is logged as hyperparameters; the run's config.yaml holds the configuration",
    "sync_batchnorm": "BatchNorm keeps the statistics of the base while tasks are trained; leave it out",
    "model_registry": "no checkpoint is loaded from a registry; give --model.weights a folder or --ckpt_path a file",
}
VALIDATION = ("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps")
LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}
_OF_THE_COMMAND = "the command sets it up itself; leave it out"
_OTHER_WEIGHTS = "it acts on all weights, the frozen ones and every task's alike; leave it out"
CALLBACKS: Mapping[str, str] = {
    "BatchSizeFinder": "the batch size decides what is trained; give --data.batch_size",
    "LearningRateFinder": "tasks train with one rate each by the same schedule; give --model.learning_rate",
    "StochasticWeightAveraging": _OTHER_WEIGHTS,
    "WeightAveraging": _OTHER_WEIGHTS,
    "EMAWeightAveraging": _OTHER_WEIGHTS,
    "ModelPruning": _OTHER_WEIGHTS,
    "BaseFinetuning": _OTHER_WEIGHTS,
    "BackboneFinetuning": _OTHER_WEIGHTS,
    "FusionCallback": "it is there already; its options are --fusion.OPTION",
    "LastCheckpoint": "it is there already; give --checkpoint_every_n_steps",
    "StopOnSignal": _OF_THE_COMMAND,
    "RunFolderCallback": _OF_THE_COMMAND,
    "TrainOnly": "give --train_only",
    "HarnessScores": "give --harness",
    "SaveConfigCallback": "config.yaml is written already; leave it out",
    "BasePredictionWriter": "predictions are written to --output; leave it out",
    "PredictionWriter": "predictions are written to --output; leave it out",
}
PLUGINS: Mapping[str, str] = {
    "CheckpointIO": "checkpoints are written whole or not at all by the package; leave it out",
    "TorchSyncBatchNorm": "BatchNorm keeps the statistics of the base while tasks are trained",
    "BitsandbytesPrecision": "it puts in other layers, which have no task vectors; leave it out",
    "TransformerEnginePrecision": "it puts in other layers, which have no task vectors; leave it out",
    "DeepSpeedPrecision": "it belongs to a strategy that cannot work here; give trainer.precision",
    "FSDPPrecision": "it belongs to a strategy that cannot work here; give trainer.precision",
    "XLAPrecision": "it needs a TPU; give trainer.precision",
}


def check_options(command: str, config: Any, flags: Iterable[str] = ()) -> None:
    """Raise if the configuration asks for what cannot work here; before anything is made.

    Args:
        command: which one.
        config: its configuration.
        flags: names of the flags on the command line, which must act in the command.

    Raises:
        InputError: which option, why, and what to do.
    """
    trainer, defaults = config.trainer, inspect.signature(Trainer).parameters
    model, data = (class_given(part, config.get(part) or {}) for part in ("model", "data"))
    own = {"model": issubclass(model, FusionModule), "data": issubclass(data, TaskData)}
    check_given(command, flags, data.__name__, [part for part, is_own in own.items() if not is_own])
    for name, reason in NEVER.items():
        if trainer[name] != defaults[name].default:
            raise InputError(f"trainer.{name} {trainer[name]!r} does nothing here: {reason}")
    if str(trainer.precision).startswith("transformer-engine"):
        raise InputError(f"trainer.precision {trainer.precision!r}: {PLUGINS['TransformerEnginePrecision']}")
    for key, refused in (("callbacks", CALLBACKS), ("plugins", PLUGINS)):
        for name in class_names(trainer[key]):
            kind = "CheckpointIO" if name.endswith("CheckpointIO") else name
            if kind in refused:
                raise InputError(f"trainer.{key}: {name} cannot work here: {refused[kind]}")
    if "GradientAccumulationScheduler" in class_names(trainer.callbacks) and issubclass(data, ChatTasks | TextTasks):
        raise InputError(
            f"trainer.callbacks: GradientAccumulationScheduler cannot work with {data.__name__}, whose loss is the "
            f"mean over the learnt tokens of an update of known size; give trainer.accumulate_grad_batches"
        )
    if command != "fit":
        _check_scoring(command, config)
    else:
        _check_fit(config)
        for name in ("weights", "heads") if own["model"] else ():
            if config.model.init_args.get(name) is not None:
                raise InputError(f"model.{name} is for validate, test and predict; fit trains anew: leave it out")
    check_timeout(config.start_timeout)
    check_strategy(trainer.strategy)
    if trainer.strategy == SHARDED:
        check_sharded(
            config.model.init_args.get("method"),
            train_only=command == "fit" and config.train_only,
            limit_val_batches=trainer.limit_val_batches,
        )


def _check_fit(config: Any) -> None:
    trainer = config.trainer
    check_bounds(trainer)
    if trainer.gradient_clip_algorithm is not None and trainer.gradient_clip_val is None:
        raise InputError("trainer.gradient_clip_algorithm does nothing without trainer.gradient_clip_val; give both")
    validates = trainer.limit_val_batches or trainer.overfit_batches or trainer.fast_dev_run
    defaults = {"val_check_interval": (None, 1.0), "check_val_every_n_epoch": (1,), "num_sanity_val_steps": (None, 0)}
    for name in VALIDATION:
        if not validates and trainer[name] not in defaults[name]:
            raise InputError(
                f"trainer.{name} {trainer[name]!r} does nothing without validation while training, which fit "
                f"leaves out; give --trainer.limit_val_batches too, such as 1.0"
            )
    if trainer.limit_train_batches == 0:
        raise InputError("trainer.limit_train_batches 0 leaves nothing to train on; leave it out")
    if config.ckpt_path is None and config.weights_only is not None:
        raise InputError("weights_only says how --ckpt_path is read, which is not given; leave it out")
    if config.ckpt_path is not None and trainer.fast_dev_run:
        raise InputError("fast_dev_run tries the first steps of a run, never those after a --ckpt_path; leave one out")
    if config.train_only and (trainer.max_steps or -1) < 1:
        raise InputError(
            "train_only needs --trainer.max_steps: an epoch is as long as the longest task of a job, so that in "
            "epochs a task would be trained for another time by itself than beside others"
        )


def _check_scoring(command: str, config: Any) -> None:
    if config.ckpt_path is not None or config.weights_only is not None:
        raise InputError(
            f"--ckpt_path and --weights_only do nothing in {command}: a checkpoint holds what fit trains, one "
            f"adapter a task, to go on from there; give --model.weights RUN/adapters/TASK or "
            f"RUN/fused/RULE"
        )
    limit = LIMITS[command]
    if config.trainer[limit] == 0:
        raise InputError(f"trainer.{limit} 0 leaves nothing to score; leave it out")
    if command == "predict" and config.output is None:
        raise InputError("predict needs --output, the file for the predictions, such as predictions.csv")
    if command == "predict" and config.return_predictions is not None:
        raise InputError("return_predictions does nothing here: predictions are written to --output; leave it out")


def check_monitors(trainer: Trainer, module: Module, data: Data, *, fuses: bool) -> None:
    """Raise if a callback of the trainer waits for a metric that is never logged.

    Args:
        trainer: which has the callbacks.
        module: one of another package logs what it wants.
        data: whose tasks' metrics are logged; of another package they may be known once it is set up only.
        fuses: whether fused models are scored while training.

    Raises:
        InputError: its name, and those that there are.
    """
    if not isinstance(module, FusionModule):
        return
    tasks, validates = list(data.task_names), bool(trainer.limit_val_batches)
    known = [f"train/{task}/loss" for task in tasks]
    starts = [f"validation/{task}/" for task in tasks] if validates or fuses else []
    for callback in trainer.callbacks:
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
            continue
        monitor = callback.monitor.removesuffix("_step").removesuffix("_epoch")
        of_trainer = isinstance(callback, ModelCheckpoint) and monitor in ("epoch", "step")
        if of_trainer or monitor in known or monitor.startswith(tuple(starts) or "\0"):
            continue
        more = (
            "; validation/TASK/METRIC" + ("/MODEL" if fuses and not validates else "")
            if starts
            else ("; give --trainer.limit_val_batches for validation/TASK/METRIC")
        )
        raise InputError(
            f"{type(callback).__name__} waits for {callback.monitor!r}, which is never logged; there are "
            f"{name_list(known)}{more}"
        )


def class_names(entries: Any) -> list[str]:
    """The class names of what a list of classes, or one, is to be made of."""
    entries = entries if isinstance(entries, list) else [entries] if entries is not None else []
    return [_name(entry) for entry in entries]


def _name(entry: Any) -> str:
    return str(entry if isinstance(entry, str) else entry["class_path"]).rpartition(".")[2]
