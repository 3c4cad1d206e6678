"""Every key of ``fit``, ``validate``, ``test`` and ``predict`` is known here: it works, or is refused with the reason.

A key that works has a case that shows an effect other than the default's, here or in the file that is named; one that
needs GPUs or several nodes is refused on this machine. A key that this file does not know makes it red.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, callbacks

import fusionlab
from fusionlab.__main__ import main
from fusionlab.callbacks import __all__ as our_callbacks
from fusionlab.commands import given, options
from fusionlab.commands.fit import TRAINER_DEFAULTS, FusionCLI
from fusionlab.data import TextTasks
from fusionlab.modules import FusionModule
from fusionlab.search.workbench import arguments_of

TESTS = Path(__file__).parents[1]
DATA = ["--data.tasks", "[textures]", "--data.max_samples", "14", "--data.eval_batch_size", "8"]
QUIET = ["--trainer.accelerator", "cpu"]
TRAIN = [*DATA, *QUIET, "--data.batch_size", "4", "--model.rank", "2", "--model.learning_rate", "0.01", "--train_only"]
BASE = {"trainer.max_steps": "6", "trainer.enable_progress_bar": "false"}
CLASSES = {
    "model": [fusionlab.ClipModule, fusionlab.ViTModule, fusionlab.T5Module, fusionlab.CausalModule],
    "data": [fusionlab.ImageTasks, TextTasks, fusionlab.ChatTasks],
}


@dataclass
class Seen:
    """What a command did."""

    code: int = -1
    out: str = ""
    files: dict[str, str] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self) -> str:
        return self.files["adapters/textures/adapter_model.safetensors"]


def state(module: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": module.global_step,
        "trained": len(module.trainer.fit_loop.epoch_loop.batch_progress.__dict__),
        "samples": tuple(batch["index"].tolist()),
        "dtype": next(module.base_model.parameters()).dtype,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "anomaly": torch.is_anomaly_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "strategy": type(module.trainer.strategy).__name__,
    }


def run(root: Path, command: str, *flags: str, base: dict[str, str] = BASE) -> Seen:
    """Run a command whose steps and scores are watched."""
    seen, loss, score = Seen(), fusionlab.ClipModule.loss, fusionlab.ClipModule.score

    def watched_loss(self: Any, task: str, batch: dict[str, Any]) -> torch.Tensor:
        seen.losses.append(state(self, batch))
        return loss(self, task, batch)

    def watched_score(self: Any, task: str, batch: dict[str, Any], metrics: Any) -> None:
        seen.scores.append(state(self, batch) | {"after": len(seen.losses)})
        score(self, task, batch, metrics)

    given = {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")}
    shared = TRAIN if command == "fit" else [*DATA, *QUIET]
    kept = base if command == "fit" else {"trainer.enable_progress_bar": "false"}
    kept = {key: value for key, value in kept.items() if key not in given}
    argv = [command, *shared, *(f"--{key}={value}" for key, value in kept.items())]
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with pytest.MonkeyPatch.context() as patch, Captured() as captured:
        patch.setattr(fusionlab.ClipModule, "loss", watched_loss)
        patch.setattr(fusionlab.ClipModule, "score", watched_score)
        try:
            seen.code = main([*argv, *flags, "--trainer.default_root_dir", str(root)])
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    seen.out = captured.text
    seen.files = {
        re.sub(r"^parts/\w+/", "", str(path.relative_to(root))): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    return seen


class Captured:
    """What is printed meanwhile."""

    def __enter__(self) -> Captured:
        import contextlib
        import io

        self._buffer = io.StringIO()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(contextlib.redirect_stdout(self._buffer))
        self._stack.enter_context(contextlib.redirect_stderr(self._buffer))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.text = self._buffer.getvalue()


def cb(name: str, **settings: Any) -> str:
    return json.dumps([{"class_path": name, "init_args": settings}])


def steps(seen: Seen) -> int:
    return len(seen.losses)


def updates(seen: Seen) -> int:
    return len({each["step"] for each in seen.losses})


def per_update(seen: Seen) -> float:
    return steps(seen) / updates(seen)


def samples(seen: Seen) -> int:
    return len({each["samples"] for each in seen.losses})


def validated(seen: Seen) -> list[int]:
    return [each["after"] for each in seen.scores]


def of(name: str) -> Callable[[Seen], Any]:
    return lambda seen: {each[name] for each in [*seen.losses, *seen.scores]}


def file(pattern: str) -> Callable[[Seen], Any]:
    return lambda seen: [name for name in seen.files if re.search(pattern, name)]


def content(pattern: str) -> Callable[[Seen], Any]:
    return lambda seen: [seen.files[name] for name in file(pattern)(seen)]


def said(text: str) -> Callable[[Seen], bool]:
    return lambda seen: text in seen.out


def weights(seen: Seen) -> str:
    return seen.weights


VALIDATES = ["--trainer.limit_val_batches", "1.0"]
EPOCHS = ["--trainer.max_epochs", "2", "--trainer.max_steps", "8"]
CSV = ["--trainer.logger", "true"]
LOGGED = "lightning_logs/"
AT_ONCE = ["--trainer.max_time", "00:00:00:00"]
# key: what is given, what shows the effect, what is given beside it, also by default
Case = tuple[list[str], Callable[[Seen], Any], list[str]]
FIT: dict[str, Case] = {
    "trainer.max_steps": (["--trainer.max_steps", "3"], steps, []),
    "trainer.max_epochs": (["--trainer.max_epochs", "1"], steps, []),
    "trainer.min_steps": (["--trainer.min_steps", "3"], steps, AT_ONCE),
    "trainer.min_epochs": (["--trainer.min_epochs", "1"], steps, AT_ONCE),
    "trainer.max_time": (AT_ONCE, steps, []),
    "trainer.limit_train_batches": (["--trainer.limit_train_batches", "2"], steps, ["--trainer.max_epochs", "1"]),
    "trainer.limit_val_batches": (["--trainer.limit_val_batches", "1"], validated, EPOCHS),
    "trainer.overfit_batches": (["--trainer.overfit_batches", "1"], samples, []),
    "trainer.val_check_interval": (["--trainer.val_check_interval", "2"], validated, [*EPOCHS, *VALIDATES]),
    "trainer.check_val_every_n_epoch": (["--trainer.check_val_every_n_epoch", "2"], validated, [*EPOCHS, *VALIDATES]),
    "trainer.num_sanity_val_steps": (["--trainer.num_sanity_val_steps", "1"], validated, VALIDATES),
    "trainer.fast_dev_run": (["--trainer.fast_dev_run", "2"], lambda seen: (steps(seen), list(seen.files)), []),
    "trainer.logger": (CSV, file(LOGGED), ["--trainer.log_every_n_steps", "1"]),
    "trainer.log_every_n_steps": (["--trainer.log_every_n_steps", "1"], content("csv|events"), CSV),
    "trainer.callbacks": (["--trainer.callbacks", cb("ModelCheckpoint", every_n_train_steps=2)], file("step="), []),
    "trainer.enable_checkpointing": (["--trainer.enable_checkpointing", "false"], file("ckpt"), []),
    "trainer.enable_progress_bar": (["--trainer.enable_progress_bar", "true"], said("fine-tuning"), []),
    "trainer.enable_model_summary": (["--trainer.enable_model_summary", "true"], said("Trainable"), []),
    "trainer.accumulate_grad_batches": (["--trainer.accumulate_grad_batches", "2"], per_update, []),
    "trainer.gradient_clip_val": (["--trainer.gradient_clip_val", "1e-9"], weights, []),
    "trainer.gradient_clip_algorithm": (
        ["--trainer.gradient_clip_algorithm", "value"], weights, ["--trainer.gradient_clip_val", "1e-9"],
    ),
    "trainer.precision": (["--trainer.precision", "bf16-true"], of("dtype"), []),
    "trainer.deterministic": (["--trainer.deterministic", "true"], of("deterministic"), []),
    "trainer.benchmark": (["--trainer.benchmark", "true"], of("benchmark"), []),
    "trainer.detect_anomaly": (["--trainer.detect_anomaly", "true"], of("anomaly"), []),
    "trainer.profiler": (["--trainer.profiler", "simple"], file("profile"), []),
    "trainer.plugins": (
        ["--trainer.plugins", cb("lightning.pytorch.plugins.HalfPrecision", precision="bf16-true")], of("dtype"), [],
    ),
    "trainer.strategy": (["--trainer.strategy", "ddp", "--trainer.devices", "1"], of("strategy"), []),
    "seed_everything": (["--seed_everything", "1"], weights, []),
    "model.num_warmup_steps": (["--model.num_warmup_steps", "4"], weights, []),
    "model.weight_decay": (["--model.weight_decay", "0.5"], weights, []),
}  # fmt: skip
SCORING: dict[str, Case] = {
    "trainer.precision": (["--trainer.precision", "bf16-true"], of("dtype"), []),
    "trainer.deterministic": (["--trainer.deterministic", "true"], of("deterministic"), []),
    "trainer.benchmark": (["--trainer.benchmark", "true"], of("benchmark"), []),
    "trainer.inference_mode": (["--trainer.inference_mode", "false"], of("inference"), []),
    "trainer.profiler": (["--trainer.profiler", "simple"], file("profile"), []),
    "trainer.logger": (CSV, file(LOGGED), []),
    "trainer.fast_dev_run": (["--trainer.fast_dev_run", "1"], lambda seen: len(seen.scores), []),
    "verbose": (["--verbose", "false"], lambda seen: "pretrained" in seen.out, []),
}
# the fast ones that stand for the rest in the normal suite
COVERING = (
    "trainer.max_time", "trainer.overfit_batches", "trainer.callbacks", "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val", "trainer.precision", "trainer.deterministic", "trainer.profiler", "trainer.logger",
)  # fmt: skip
# refused whatever the command, with the words of the reason
REFUSED: dict[str, tuple[list[str], str]] = {
    "trainer.barebones": (["--trainer.barebones", "true"], "times the trainer itself"),
    "trainer.use_distributed_sampler": (["--trainer.use_distributed_sampler", "false"], "without a sampler"),
    "trainer.reload_dataloaders_every_n_epochs": (
        ["--trainer.reload_dataloaders_every_n_epochs", "1"],
        "same in every",
    ),
    "trainer.enable_autolog_hparams": (["--trainer.enable_autolog_hparams", "false"], "config.yaml holds"),
    "trainer.model_registry": (["--trainer.model_registry", "x"], "no checkpoint is loaded from a registry"),
    "trainer.sync_batchnorm": (["--trainer.sync_batchnorm", "true"], "keeps the statistics of the base"),
}
NEEDS_MORE: dict[str, tuple[list[str], str]] = {  # GPUs or nodes
    "trainer.accelerator": (["--trainer.accelerator", "gpu"], "No supported gpu backend found"),
}
SHOWN_IN = {  # where the effect of a key is shown
    "trainer.devices": "training/test_resume.py", "trainer.num_nodes": "training/test_resume_cluster.py",
    "trainer.limit_test_batches": "kinds/test_bounded_runs.py", "trainer.limit_predict_batches": "kinds/test_flags.py",
    "trainer.default_root_dir": "kinds/test_bounded_runs.py", "ckpt_path": "kinds/test_checkpoints_given.py",
    "weights_only": "kinds/test_checkpoints_given.py", "overwrite": "kinds/test_fit_dry_run.py",
    "train_only": "training/test_resume_tasks.py", "dry_run": "kinds/test_fit_dry_run.py",
    "checkpoint_every_n_steps": "training/test_resume.py", "start_timeout": "training/test_resume.py",
    "output": "kinds/test_bounded_runs.py", "fusion.rules": "training/test_fit_clip.py",
    "fusion.every_n_epochs": "training/test_fit_clip.py", "fusion.finetuned_on": "training/test_fit_clip.py",
    "fusion.full_reference": "training/test_cli_errors.py", "fusion.diagnostics": "training/test_t5_cli.py",
    "fusion.dtype": "kinds/test_16_bit_bases.py", "return_predictions": "kinds/test_flags.py",
    "config": "training/test_configs.py", "model": "training/test_t5_cli.py", "data": "training/test_t5_cli.py",
    "model.backbone": "kinds/test_caches.py", "model.method": "training/test_tangent_fit.py",
    "model.rank": "kinds/test_checkpoints_given.py", "model.lora_alpha": "kinds/test_checkpoints_given.py",
    "model.dropout": "training/test_fit_open_clip.py", "model.target_modules": "kinds/test_checkpoints_given.py",
    "model.learning_rate": "kinds/test_checkpoints_given.py", "model.lr_schedule": "training/test_full_fit.py",
    "model.weights": "training/test_full_fit.py", "model.heads": "training/test_vit_fit.py",
    "model.evaluation": "training/test_t5_errors.py", "model.ranking": "lm/test_causal_fit.py",
    "model.max_new_tokens": "training/test_sweep_t5.py", "model.dtype": "kinds/test_16_bit_bases.py",
    "model.gradient_checkpointing": "lm/test_causal_fit.py", "model.seed": "kinds/test_one_recipe.py",
    "model.samples_at_once": "training/test_grouped.py",
    "data.tasks": "training/test_fit_clip.py", "data.batch_size": "lm/test_ranks.py",
    "data.eval_batch_size": "kinds/test_bounded_runs.py", "data.image_size": "kinds/test_vocabularies.py",
    "data.on_bad_image": "training/test_image_tasks_bad_data.py", "data.images": "training/test_vit_fit.py",
    "data.max_samples": "kinds/test_bounded_runs.py", "data.cache_dir": "kinds/test_caches.py",
    "data.seed": "kinds/test_one_recipe.py", "data.prompts": "training/test_text_tasks.py",
    "data.suite": "kinds/test_suites.py",
    "data.max_tokens": "kinds/test_text_over_the_limit.py", "data.texts": "training/test_text_tasks.py",
    "data.max_length": "kinds/test_keys.py", "data.packing": "lm/test_causal_fit.py",
    "data.completion_only_loss": "lm/test_templates.py", "data.assistant_only_loss": "lm/test_templates.py",
    "data.apply_chat_template": "lm/test_templates.py", "data.chat_template_path": "lm/test_chat_cases.py",
    "data.system": "lm/test_templates.py", "data.on_empty": "lm/test_chat_cases.py",
    "data.date": "lm/test_templates.py",
    "data.tokenizer": "kinds/test_text_over_the_limit.py",
    "harness": "lm/test_harness.py", "harness_limit": "lm/test_harness.py", "harness_num_fewshot": "lm/test_harness.py",
}  # fmt: skip
ASKS = ("help", "print_config", "trainer", "fusion")  # for help, or a file of the keys below
CALLBACKS_THAT_WORK = {
    "Callback", "Checkpoint", "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LambdaCallback",
    "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "ProgressBar",
    "RichModelSummary", "RichProgressBar", "SpikeDetection", "TQDMProgressBar", "ThroughputMonitor", "Timer",
    "FusionProgressBar",
}  # fmt: skip
NO_OPTIONS = {
    "WholeCheckpointIO",
    "DryRun",
    "around",
    "DryRunEnds",
    "NothingToTrain",
}  # of the command itself, no callbacks to be given


class ParsersOnly(Exception):  # noqa: N818
    """The parsers are made; nothing is run."""


def keys() -> dict[str, list[str]]:
    """The keys of each command's parser, by reading them off the parsers."""
    found: dict[str, list[str]] = {}

    class Reader(FusionCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            for command, sub in self._subcommand_parsers.items():
                found[command] = [action.dest for action in sub._actions]
            raise ParsersOnly

    with pytest.raises(ParsersOnly):
        Reader(
            FusionModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_callback=None, seed_everything_default=42, trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False, load_from_checkpoint_support=False, args=["fit"],
        )  # fmt: skip
    for prefix, classes in CLASSES.items():
        of_classes = [f"{prefix}.{name}" for each in classes for name in arguments_of(each)]
        for command in found:
            found[command] += dict.fromkeys(of_classes)
    return found


def test_every_key_is_known() -> None:
    known = {*FIT, *SCORING, *REFUSED, *NEEDS_MORE, *SHOWN_IN, *ASKS}
    found = keys()
    assert set(found) == {"fit", "validate", "test", "predict"}
    asked = {key for of_command in found.values() for key in of_command if not key.endswith(".help")}
    assert asked - known == set()
    assert known - asked == set()
    acting = [key for key in found["validate"] if key in FIT and key not in SCORING and key.startswith("trainer.")]
    shared = {"trainer.callbacks", "trainer.plugins", "trainer.strategy", "trainer.enable_progress_bar"}
    assert {key for key in acting if key not in given.COMMANDS_OF} == shared


def test_every_callback_is_known() -> None:
    refused = set(options.CALLBACKS)
    asked = {*callbacks.__all__, *our_callbacks} - NO_OPTIONS
    assert asked - refused - CALLBACKS_THAT_WORK == set()
    assert refused & CALLBACKS_THAT_WORK == set()


@pytest.mark.parametrize("key", SHOWN_IN)
def test_where_a_key_is_shown_it_is_given(key: str) -> None:
    text, name = (TESTS / SHOWN_IN[key]).read_text(), key.rpartition(".")[2]
    assert re.search(rf"\b{name}\b", text), f"{SHOWN_IN[key]} does not know {key}"


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[str]], Seen]:
    known: dict[tuple[str, ...], Seen] = {}

    def get(command: str, beside: list[str]) -> Seen:
        key = (command, *beside)
        if key not in known:
            known[key] = run(tmp_path_factory.mktemp("default") / "run", *key)
        return known[key]

    return get


def marked(cases: dict[str, Case]) -> list[Any]:
    return [key if key in COVERING else pytest.param(key, marks=pytest.mark.slow) for key in cases]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*ModelCheckpoint")  # Lightning's advice on options
@pytest.mark.parametrize("key", marked(FIT))
def test_what_works_in_fit_has_an_effect(key: str, tmp_path: Path, defaults: Callable[..., Seen]) -> None:
    given, effect, beside = FIT[key]
    ours, theirs = run(tmp_path / "run", "fit", *given, *beside), defaults("fit", beside)
    assert (ours.code, theirs.code) == (0, 0), ours.out + theirs.out
    assert effect(ours) != effect(theirs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("key", SCORING)
def test_what_works_in_scoring_has_an_effect(
    key: str, command: str, tmp_path: Path, defaults: Callable[..., Seen]
) -> None:
    given, effect, beside = SCORING[key]
    ours, theirs = run(tmp_path / "run", command, *given, *beside), defaults(command, beside)
    assert (ours.code, theirs.code) == (0, 0), ours.out + theirs.out
    assert effect(ours) != effect(theirs)


@pytest.mark.parametrize("key", [*REFUSED, *NEEDS_MORE])
def test_what_cannot_work_says_why(key: str, tmp_path: Path) -> None:
    if key in NEEDS_MORE and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags, reason = (REFUSED | NEEDS_MORE)[key]
    seen = run(tmp_path / "run", "fit", *flags)
    assert (seen.code, seen.files, reason in seen.out) == (2, {}, True), seen.out


@pytest.mark.gpu
def test_a_gpu_is_used_where_there_is_one(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "fit", "--trainer.accelerator", "gpu", "--trainer.devices", "1").code == 0


OF_OTHERS = [
    (command, key)
    for number, (key, commands) in enumerate(given.COMMANDS_OF.items())
    for command in ["fit", "validate", "test", "predict"]
    if command not in commands and (command == "fit" or number % 3 == ["validate", "test", "predict"].index(command))
]


@pytest.mark.parametrize(("command", "key"), OF_OTHERS)
def test_what_acts_in_other_commands_only_is_refused(command: str, key: str) -> None:
    with pytest.raises(fusionlab.errors.InputError, match=f"--{key} does nothing in {command}"):
        given.check_given(command, [key], "fusionlab.ImageTasks")


@pytest.mark.parametrize("name", options.CALLBACKS)
def test_a_callback_that_cannot_work_is_refused(name: str) -> None:
    config = run_config(callbacks=[{"class_path": f"somewhere.{name}"}])
    with pytest.raises(fusionlab.errors.InputError, match=f"{name} cannot work here"):
        options.check_options("fit", config)


@pytest.mark.parametrize("name", options.PLUGINS)
def test_a_plugin_that_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(fusionlab.errors.InputError, match=f"{name} cannot work here"):
        options.check_options("fit", run_config(plugins=[{"class_path": f"somewhere.{name}"}]))


def run_config(**trainer: Any) -> Any:
    from jsonargparse import Namespace
    from lightning.pytorch import Trainer

    values = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    return Namespace(trainer=Namespace(**{**values, **trainer}), data=Namespace(class_path="fusionlab.ImageTasks"))


STOPS: dict[str, tuple[str, list[str], int]] = {
    "a loss of ours": (cb("EarlyStopping", monitor="train/textures/loss", stopping_threshold=99.0), [], 4),
    "a score of ours": (
        cb("EarlyStopping", monitor="validation/textures/accuracy", mode="max", stopping_threshold=-1.0), VALIDATES, 4,
    ),
    "the time": (cb("Timer", duration="00:00:00:00"), [], 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", STOPS)
def test_callbacks_stop_the_training(case: str, tmp_path: Path) -> None:
    given, beside, expected = STOPS[case]
    seen = run(tmp_path / "run", "fit", "--trainer.callbacks", given, *beside)
    assert (seen.code, steps(seen)) == (0, expected), seen.out


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a metric that is never logged": (["--trainer.callbacks", cb("EarlyStopping", monitor="loss")], "never logged"),
    "a metric without validation": (
        ["--trainer.callbacks", cb("ModelCheckpoint", monitor="validation/textures/accuracy")], "limit_val_batches",
    ),
    "a misspelt score": (
        ["--trainer.callbacks", cb("EarlyStopping", monitor="validation/textures/acc"), *VALIDATES], "not available",
    ),
    "rates without a logger": (["--trainer.callbacks", cb("LearningRateMonitor")], "no logger"),
    "a logger that is not installed": (["--trainer.logger", "WandbLogger"], "wandb"),
    "an interval over an epoch": (["--trainer.val_check_interval", "9", *VALIDATES], "val_check_interval"),
    "an interval without validation": (["--trainer.val_check_interval", "2"], "give --trainer.limit_val_batches"),
    "an algorithm without a value": (["--trainer.gradient_clip_algorithm", "value"], "gradient_clip_val"),
    "data without tasks": (["--data", "lightning.LightningDataModule"], "unknown key 'tasks' of LightningDataModule"),
    "weights to train from": (["--model.weights", "somewhere"], "--model.weights does nothing in fit"),
    "a profiler of no name": (["--trainer.profiler", "fast"], "profiler"),
}  # fmt: skip
if find_spec("wandb") is not None:
    del MISTAKES["a logger that is not installed"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", MISTAKES)
def test_a_refused_command_leaves_no_run_behind(case: str, tmp_path: Path) -> None:
    flags, reason = MISTAKES[case]
    seen = run(tmp_path / "run", "fit", *flags)
    assert (seen.code, reason in seen.out, "Traceback" in seen.out) == (2, True, False), seen.out
    assert not any(name.endswith(("config.yaml", "trained.json", ".ckpt")) for name in seen.files)


def test_predictions_are_bounded_and_say_so(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    argv = ["--data.images", str(tmp_path / "images"), "--data.eval_batch_size=2"]
    argv += ["--output", str(tmp_path / "out.csv")]
    seen = run(tmp_path / "run", "predict", *argv, "--trainer.limit_predict_batches", "2")
    assert (seen.code, "4 predictions (a part of the inputs" in seen.out) == (0, True), seen.out
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5
    assert run(tmp_path / "run", "predict", *argv, "--return_predictions", "true").code == 2
