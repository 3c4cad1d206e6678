"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with the run folder and readable errors."""

from __future__ import annotations

import inspect
import logging
import os
import re
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import transformers
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fusionlab.callbacks import (
    DryRun,
    DryRunEnds,
    FusionCallback,
    FusionProgressBar,
    LastCheckpoint,
    RunFolderCallback,
    StopOnSignal,
    TrainOnly,
    WholeCheckpointIO,
)
from fusionlab.commandline import checked_flags
from fusionlab.data import ImageTasks
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.modules import ClipModule, FusionModule
from fusionlab.predicting import write_predictions
from fusionlab.ranks import (
    RUN_FOLDER_VARIABLE,
    SHARDED,
    RollCallDDP,
    ShardedDDP,
    check_sharded,
    check_strategy,
    exit_code_of_others,
    started_world_size,
    tell_bad_input,
)
from fusionlab.reporting import print_table, write_results
from fusionlab.runs import CHECKPOINTS, LEASES, RESULTS, RunFolder
from fusionlab.tasks import check_samples

QUOTED = r"'([^']+)'"
TRAINER_DEFAULTS = {
    "max_steps": 80,
    "max_epochs": -1,
    "logger": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}


class FusionCLI(LightningCLI):
    """LightningCLI whose trainer root is the run folder."""

    run_state = "new"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the fusion callback, the run-folder flags, and one seed for everything."""
        parser.add_lightning_class_args(FusionCallback, "fusion")
        parser.add_argument("--overwrite", action="store_true", help="start anew in a run folder that is in use (fit)")
        parser.add_argument(
            "--train_only",
            action="store_true",
            help="train and write the adapters only; a later fit over all tasks there fuses and scores (fit)",
        )
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="check everything by the code of the run, tell what it would do and take, and stop (fit)",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps", type=int, default=100, help="updates between two saves of last.ckpt (fit)"
        )
        parser.add_argument(
            "--start_timeout", type=float, default=300, help="seconds to wait at the start for all processes"
        )
        parser.add_argument(
            "--output", type=str, default=None, help="file for the predictions (predict) or the rows (test)"
        )
        parser.set_defaults({"model": ClipModule.__name__, "data": ImageTasks.__name__})
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what :func:`main` was given, whatever else is on the command line of this process."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder; the trainer writes nowhere else."""
        config = self.config[self.subcommand]
        if config.seed_everything is True or config.seed_everything is False:
            raise InputError("seed_everything must be a number, so that the run can be repeated")
        if self.subcommand == "predict" and config.output is None:
            raise InputError("predict needs --output, the file for the predictions, such as predictions.csv")
        check_strategy(config.trainer.strategy)
        if config.trainer.strategy == SHARDED:
            check_sharded(
                config.model.init_args.method,
                train_only=self.subcommand == "fit" and config.train_only,
                limit_val_batches=config.trainer.limit_val_batches,
            )
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(self._next_run_folder(config).path)
        if self.subcommand != "fit":
            if config.dry_run:
                raise InputError(f"dry_run is of fit; {self.subcommand} writes nothing but its rows")
            return
        if config.dry_run:
            config.trainer.enable_checkpointing = config.trainer.enable_progress_bar = False
        if config.train_only and (config.trainer.max_steps or -1) < 1:
            raise InputError(
                "train_only needs --trainer.max_steps: an epoch is as long as the longest task of a job, so that in "
                "epochs a task would be trained for another time by itself than beside others"
            )
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": self._callbacks(config)}

    def _callbacks(self, config: Any) -> list[Callback]:
        self.stopping = StopOnSignal(None)
        callbacks: list[Callback] = [self.stopping]
        if config.trainer.enable_checkpointing is not False:
            folder = self._folder(config).path / CHECKPOINTS
            self.stopping.checkpoint = LastCheckpoint(folder, config.checkpoint_every_n_steps)
            callbacks.append(self.stopping.checkpoint)
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(FusionProgressBar())
        return callbacks

    def _folder(self, config: Any) -> RunFolder:
        """The run folder, or this job's part of it."""
        root = RunFolder(Path(config.trainer.default_root_dir))
        if not config.train_only:
            return root
        return root.part(task if isinstance(task, str) else task["name"] for task in config.data.init_args.tasks)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer, with whole checkpoints, and a roll call where there are several processes."""
        config = self.config[self.subcommand].trainer
        given = {key: list(self.config_init[self.subcommand].trainer[key] or []) for key in ("callbacks", "plugins")}
        plugins = [*given["plugins"], WholeCheckpointIO()]
        timeout = self.config[self.subcommand].start_timeout
        if config.strategy == SHARDED:
            kwargs["strategy"] = ShardedDDP(timeout)
        try:
            trainer = super().instantiate_trainer(plugins=plugins, callbacks=list(given["callbacks"]), **kwargs)
            if type(trainer.strategy) is DDPStrategy and trainer.world_size > 1:
                strategy = RollCallDDP(timeout, **trainer.strategy._ddp_kwargs)
                kwargs |= {"plugins": plugins, "callbacks": list(given["callbacks"]), "strategy": strategy}
                trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            raise InputError(f"the trainer cannot be made: {error}") from error
        if config.default_root_dir is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[RUN_FOLDER_VARIABLE] = config.default_root_dir  # for the processes that Lightning starts
        return trainer

    def _next_run_folder(self, config: Any) -> RunFolder:
        if os.environ.get("LOCAL_RANK", "0") != "0" and RUN_FOLDER_VARIABLE in os.environ:
            return RunFolder(Path(os.environ[RUN_FOLDER_VARIABLE]))
        processes = max(started_world_size(), config.trainer.num_nodes)
        if processes > 1 or (self.subcommand == "fit" and config.train_only):
            what = f"{processes} processes or nodes" if processes > 1 else "jobs that train one run's tasks"
            raise InputError(
                f"{what} were started: give --trainer.default_root_dir, a folder that all of them see, so that they "
                f"agree on it"
            )
        module_class = _import(config.model.class_path)
        backbone = config.model.init_args.backbone or module_class.default_backbone
        kind = config.model.init_args.method if self.subcommand == "fit" else self.subcommand
        return RunFolder.next_free(f"{Path(backbone).name}-{kind}")

    def after_instantiate_classes(self) -> None:
        """Decide between a new run, a resumed one, and a refusal; nothing is written before the data is checked."""
        check_samples(self.model, self.datamodule)
        config = self.config[self.subcommand]
        for key, value in self.model.resolved.items():
            config.model.init_args[key] = value
        if config.data.init_args.tasks is None:
            config.data.init_args.tasks = list(self.datamodule.definitions)
        if self.subcommand != "fit":
            return
        resolved = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_check=True))[self.subcommand]
        root, folder = RunFolder(Path(config.trainer.default_root_dir)), self._folder(config)
        overwrite = config.overwrite and not _is_restarted()
        self.run_state = folder.check(resolved, overwrite=overwrite)
        taken = {} if overwrite or config.train_only else root.trained_tasks(resolved)
        if self.run_state == "unfinished":
            gone = [task for task in folder.taken() if task not in taken]
            if gone:
                raise InputError(
                    f"the run in {str(folder.path)!r} took {name_list(gone)} over from its parts/, which hold them no "
                    f"longer; give --overwrite to train all tasks anew"
                )
            taken = {task: taken[task] for task in folder.taken()}
        begin = RunFolderCallback(
            folder, resolved, state=self.run_state, taken=taken, leases=root.path / LEASES, overwrite=overwrite
        )
        if config.dry_run:
            begin.begins = False
            self.trainer.callbacks.append(DryRun(str(folder.path), self.run_state))
        self.trainer.callbacks.append(begin)
        if config.train_only:
            self.trainer.callbacks = [part for part in self.trainer.callbacks if not isinstance(part, FusionCallback)]
            self.trainer.callbacks.append(TrainOnly(root.path, folder))
        if self.run_state == "unfinished" and folder.last_checkpoint is not None:
            self.config_init[self.subcommand]["ckpt_path"] = str(folder.last_checkpoint)
            self.config_init[self.subcommand]["weights_only"] = True

    def fit(self, **arguments: Any) -> None:
        """The trainer's fit, with SIGTERM and SIGUSR1 handled; the handlers are put back however it ends."""
        self.stopping.install()
        try:
            self.trainer.fit(**arguments)
        except DryRunEnds:
            return
        finally:
            self.stopping.restore()

    def after_validate(self) -> None:
        """Write and draw the rows."""
        self._write_rows()

    after_test = after_validate

    def after_predict(self) -> None:
        """Write the predictions."""
        output = self.config["predict"].output
        if self.trainer.is_global_zero:
            write_predictions(Path(output), self.model.predictions)
            print(f"{len(self.model.predictions)} predictions: {output}")

    def _write_rows(self) -> None:
        if not self.trainer.is_global_zero:
            return
        config = self.config[self.subcommand]
        path = Path(config.output) if config.output else Path(config.trainer.default_root_dir) / RESULTS
        if path.exists() and not config.output:  # the results of the run itself stay as they are
            path = path.with_name(f"{self.subcommand}.json")
        write_results(path, self.model.rows)
        print_table(self.model.rows, f"{self.model.backbone.name}: {config.model.init_args.weights or 'pretrained'}")
        print(f"rows: {path}")


def main(argv: list[str]) -> int:
    """Run one of the Lightning commands; returns the exit code.

    Raises:
        InputError: anything the user can mend.
        SystemExit: where another process of the run has ended, and tells why.
    """
    _quiet()
    try:
        return _run(argv)
    except InputError:
        tell_bad_input()
        raise
    except RuntimeError as error:
        code = exit_code_of_others()
        if code is None:
            raise
        raise SystemExit(code) from error


def _run(argv: list[str]) -> int:
    argv = [argv[0], *checked_flags(argv[1:], ["fusion.rules"])]
    try:
        FusionCLI(
            FusionModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False},
            args=argv,
        )
    except ArgumentError as error:
        raise InputError(readable(str(error))) from error
    except ValueError as error:
        wrapped = _input_error_in(error)
        if wrapped is None:
            raise
        raise wrapped from None
    return 0


def _input_error_in(error: BaseException | None) -> InputError | None:
    """The InputError that jsonargparse wrapped while it built an object, if there is one; any other is a fault."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def readable(message: str) -> str:
    """One line out of a parser's message: the unknown key with its nearest, or what was expected and what came."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
    option = re.search(r"Option '([\w.]+)' is not accepted", message)
    nested = re.search(r"NestedArg\(key='([\w.]+)'", message)
    if unknown or option:
        key = (unknown or option).group(1)
        known = _known_options()
        return f"unknown key {key!r}; {did_you_mean(key, known if unknown else [k.split('.')[-1] for k in known])}"
    key = nested or re.search(r'arser key "([\w.]+)"', message)
    kinds = dict.fromkeys(re.findall(r"Expected an? (<class '.+?'>|typing\.\w+\[.+?\](?=\.|\s|$))", message))
    value = re.search(r"(?:Got value|Given value): (.+)", message)
    if key and kinds and value and "NestedArg" not in value.group(1):
        return f"{key.group(1)}: {_expected(list(kinds), value.group(1).strip())}"
    if nested and kinds:
        got = re.search(r"Got value: (.+)", message)
        return f"{nested.group(1)}: {_expected(list(kinds), got.group(1).strip() if got else '?')}"
    return re.sub(r"\s+", " ", message)


def _expected(kinds: list[str], value: str) -> str:
    choices = [choice for kind in kinds if kind.startswith("typing.Literal[") for choice in re.findall(QUOTED, kind)]
    if choices:
        return f"no such choice {value!r}; {did_you_mean(value, choices)}"
    names = [re.sub(r"<class '(.+?)'>", r"\1", kind) for kind in kinds]
    return f"expected {' or '.join(name for name in names if name != 'NoneType')}, got {value!r}"


def _known_options() -> list[str]:
    sections = {"trainer": Trainer, "model": ClipModule, "data": ImageTasks, "fusion": FusionCallback}
    names = [f"{prefix}.{name}" for prefix, owner in sections.items() for name in inspect.signature(owner).parameters]
    own = (
        "config",
        "seed_everything",
        "overwrite",
        "output",
        "train_only",
        "dry_run",
        "checkpoint_every_n_steps",
        "start_timeout",
    )
    return [*names, *sections, *own]


def _import(class_path: str) -> type[FusionModule]:
    module, _, name = class_path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _is_restarted() -> bool:
    """Whether SLURM or torchrun has started this very job again, which then goes on even with ``--overwrite``."""
    return any(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _quiet() -> None:
    """Leave Lightning's and transformers' notices out; warnings stay, but for one of Lightning about torch."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
