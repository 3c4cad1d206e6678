"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with the run folder and readable errors."""

from __future__ import annotations

import os
import warnings
from argparse import ArgumentError
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from fusionlab.callbacks import (
    DryRun,
    DryRunEnds,
    FusionCallback,
    FusionProgressBar,
    LastCheckpoint,
    PredictionWriter,
    RunFolderCallback,
    StopOnSignal,
    TrainOnly,
    WholeCheckpointIO,
    around,
)
from fusionlab.commands.arguments import default_classes, refuse_empty_arguments
from fusionlab.commands.checkpoint import checkpoint_to_go_on_from
from fusionlab.commands.dates import settle_date
from fusionlab.commands.empty import refuse_empty
from fusionlab.commands.flags import add_flags, take_whole_numbers_first
from fusionlab.commands.folders import (
    check_places,
    check_untrained,
    folder_for_a_trial,
    folder_of,
    run_folder,
    taken_before,
)
from fusionlab.commands.harness import score_by_harness
from fusionlab.commands.messages import input_error_in, readable, refused_class
from fusionlab.commands.options import check_monitors, check_options
from fusionlab.commands.outputs import check_output, write_scores
from fusionlab.commands.parser import checked_flags, config_files, flag_names, given_flags
from fusionlab.commands.seeds import check_one_seed
from fusionlab.commands.trainer import (
    as_list,
    begins_anew,
    brings_progress_bar,
    lightning_errors,
    plain,
    profiler_of,
    quiet,
    trainer_built,
)
from fusionlab.contracts import as_data, as_module
from fusionlab.data.base import TaskData
from fusionlab.data.tasks import check_samples
from fusionlab.distributed.meeting import exit_code_of_others, leave, tell_bad_input
from fusionlab.distributed.ranks import RUN_FOLDER_VARIABLE
from fusionlab.distributed.strategies import SHARDED, RollCallDDP, ShardedDDP
from fusionlab.errors import InputError
from fusionlab.layout import CHECKPOINTS, LEASES
from fusionlab.runs.folder import RunFolder
from fusionlab.search.workbench import DEFAULT_SEED

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
    given: Mapping[str, list[str]] = {}
    """The values of the flags on the command line, by their names."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._classes = default_classes(options.get("args") or ())
        with ExitStack() as self.cleanup:
            super().__init__(*arguments, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the fusion callback, the run-folder flags, and one seed for everything."""
        parser.add_lightning_class_args(FusionCallback, "fusion")
        add_flags(parser)
        take_whole_numbers_first(parser)
        parser.set_defaults(self._classes)
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what :func:`main` was given, whatever else is on the command line of this process."""
        self.given, files = given_flags(args), config_files(args)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            of_command = self._subcommand_parsers.get(args[0], parser)
            raise InputError(readable(str(error), flag_names(of_command), args[0])) from error
        check_one_seed(self.config[self.config.subcommand].seed_everything, self.given, files)

    def _parse_ckpt_path(self) -> None:
        """Nothing: checkpoints hold no configuration, and one that cannot be read is told of when it is used."""

    def before_instantiate_classes(self) -> None:
        """Choose the run folder; the trainer writes nowhere else."""
        config = self.config[self.subcommand]
        refuse_empty(self._subcommand_parsers[self.subcommand], config)
        refuse_empty_arguments(config)
        given = [*self.given, *(["dry_run"] if config.dry_run else [])]  # of a file too: it must not become a true run
        if self.subcommand == "validate" and "trainer.limit_val_batches" not in self.given:
            config.trainer.limit_val_batches = config.trainer.limit_val_batches or 1.0  # 0 is what fit has
        check_options(self.subcommand, config, given)
        if self.subcommand == "fit" and config.trainer.fast_dev_run:
            config.trainer.default_root_dir = folder_for_a_trial(self.cleanup)
        config.trainer.default_root_dir = run_folder(self.subcommand, config)
        settle_date(self.subcommand, config, overwrite=self.subcommand == "fit" and begins_anew(config))
        if self.subcommand != "fit":
            check_output(config.output, config.data.init_args)
        if self.subcommand == "predict":
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [PredictionWriter(config.output)]}
        if self.subcommand != "fit":
            return
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": self._callbacks(config)}

    def _callbacks(self, config: Any) -> list[Callback]:
        self.stopping = StopOnSignal(None)
        callbacks: list[Callback] = [self.stopping]
        if config.dry_run:
            return callbacks
        if config.trainer.enable_checkpointing is not False:
            folder = folder_of(config).path / CHECKPOINTS
            self.stopping.checkpoint = LastCheckpoint(folder, config.checkpoint_every_n_steps)
            callbacks.append(self.stopping.checkpoint)
        if config.trainer.enable_progress_bar is not False and not brings_progress_bar(config.trainer.callbacks):
            callbacks.append(FusionProgressBar())
        return callbacks

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer, with whole checkpoints, and a roll call where there are several processes."""
        config = self.config[self.subcommand].trainer
        given = {key: as_list(self.config_init[self.subcommand].trainer[key]) for key in ("callbacks", "plugins")}
        plugins = [*given["plugins"], WholeCheckpointIO()]
        kwargs |= profiler_of(config.profiler, config.default_root_dir)
        if self.config[self.subcommand].get("dry_run"):  # not in the configuration, which is that of the run
            keeps = any(isinstance(each, Checkpoint) for each in given["callbacks"])  # which it then has to be on for
            kwargs |= {"enable_checkpointing": keeps, "enable_progress_bar": False}
        timeout = self.config[self.subcommand].start_timeout
        if config.strategy == SHARDED:
            kwargs["strategy"] = ShardedDDP(timeout)
        with trainer_built(config):
            trainer = super().instantiate_trainer(plugins=plugins, callbacks=list(given["callbacks"]), **kwargs)
            if type(trainer.strategy) is DDPStrategy and trainer.world_size > 1:
                strategy = RollCallDDP(timeout, **trainer.strategy._ddp_kwargs)
                kwargs |= {"plugins": plugins, "callbacks": list(given["callbacks"]), "strategy": strategy}
                trainer = super().instantiate_trainer(**kwargs)
        if config.default_root_dir is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[RUN_FOLDER_VARIABLE] = config.default_root_dir  # for the processes that Lightning starts
        check_places(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Decide between a new run, a resumed one, and a refusal; nothing is written before the data is checked."""
        module, data = as_module(self.model), as_data(self.datamodule, is_set_up=False)
        check_samples(module, data)
        config = self.config[self.subcommand]
        for key, value in module.resolved.items():
            config.model.init_args[key] = value
        if isinstance(data, TaskData) and config.data.init_args.get("tasks", "") is None:
            config.data.init_args.tasks = list(data.task_names)
        score_by_harness(config, self.subcommand, self.trainer, self.model, self.datamodule)
        if self.subcommand == "predict" and self.trainer.world_size > 1:  # which one has which input is not known
            raise InputError(f"predict runs in one process, got {self.trainer.world_size}; give --trainer.devices 1")
        if self.subcommand != "fit":
            return
        written = self.parser.dump(plain(self.config), skip_none=False, skip_check=True)
        resolved = yaml.safe_load(written)[self.subcommand]
        fuses = config.fusion.every_n_epochs is not None
        check_monitors(self.trainer, module, data, fuses=fuses)
        root, folder = RunFolder(Path(config.trainer.default_root_dir)), folder_of(config)
        overwrite = begins_anew(config)
        self.run_state = folder.check(resolved, overwrite=overwrite)
        if config.train_only and not overwrite:
            check_untrained(root, folder, data.task_names)
        taken = {} if overwrite or config.train_only else root.trained_tasks(resolved)
        if self.run_state == "unfinished":
            taken = {task: taken[task] for task in taken_before(folder, taken)}
        if config.dry_run:
            self.trainer.callbacks[:] = around(self.trainer.callbacks, DryRun(str(folder.path), self.run_state))
        self.trainer.callbacks.append(
            RunFolderCallback(
                folder, resolved, state=self.run_state, taken=taken, leases=root.path / LEASES, overwrite=overwrite,
                begins=not config.dry_run,
            )
        )  # fmt: skip
        if config.train_only:
            self.trainer.callbacks = [part for part in self.trainer.callbacks if not isinstance(part, FusionCallback)]
            self.trainer.callbacks.append(TrainOnly(root.path, folder))
        checkpoint = checkpoint_to_go_on_from(config, folder, self.run_state)
        if checkpoint is not None:
            self.config_init[self.subcommand]["ckpt_path"] = str(checkpoint)
            self.config_init[self.subcommand]["weights_only"] = config.weights_only is not False

    def fit(self, **arguments: Any) -> None:
        """The trainer's fit, with SIGTERM and SIGUSR1 handled; the handlers are put back however it ends."""
        self.stopping.install()
        try:
            with lightning_errors(), warnings.catch_warnings():
                if self.config["fit"].dry_run:  # which keeps no checkpoints
                    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
                self.trainer.fit(**arguments)
        except DryRunEnds:
            return
        finally:
            self.stopping.restore()

    def validate(self, *, verbose: bool, **arguments: Any) -> None:
        """The trainer's validate; ``verbose`` draws our own table, not Lightning's."""
        with lightning_errors():
            self.trainer.validate(verbose=False, **arguments)

    def test(self, *, verbose: bool, **arguments: Any) -> None:
        """The trainer's test; ``verbose`` draws our own table, not Lightning's."""
        with lightning_errors():
            self.trainer.test(verbose=False, **arguments)

    def predict(self, **arguments: Any) -> None:
        """The trainer's predict."""
        with lightning_errors():
            self.trainer.predict(**arguments)

    def after_validate(self) -> None:
        """Write and draw the rows."""
        if self.trainer.is_global_zero:
            write_scores(self.subcommand, self.config[self.subcommand], self.trainer, self.model)

    after_test = after_validate


def main(argv: list[str]) -> int:
    """Run one of the Lightning commands; returns the exit code.

    Raises:
        InputError: anything the user can mend.
        SystemExit: where another process of the run has ended, and tells why.
    """
    quiet()
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
    finally:
        leave()


def _run(argv: list[str]) -> int:
    argv = [argv[0], *checked_flags(argv[1:], ["fusion.rules"])]
    try:
        FusionCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=DEFAULT_SEED,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            args=argv,
        )
    except ValueError as error:
        wrapped = input_error_in(error)
        if wrapped is not None:
            raise wrapped from None
        if (refused := refused_class(str(error))) is None:
            raise
        raise InputError(refused) from error
    return 0
