"""Which command a flag acts in; given to another, it is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from fusionlab.errors import InputError

# options that act in some commands only
TRAINING = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps",
    "enable_checkpointing", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "detect_anomaly",
)  # fmt: skip
COMMANDS_OF: Mapping[str, tuple[str, ...]] = {
    **{f"trainer.{name}": ("fit",) for name in TRAINING},
    "trainer.limit_val_batches": ("fit", "validate"),
    "trainer.limit_test_batches": ("fit", "test"),
    "trainer.limit_predict_batches": ("predict",),
    "trainer.logger": ("fit", "validate", "test"),
    "trainer.inference_mode": ("validate", "test", "predict"),
    "overwrite": ("fit",),
    "train_only": ("fit",),
    "dry_run": ("fit", "fuse", "sweep"),
    "checkpoint_every_n_steps": ("fit",),
    "fusion": ("fit",),
    "output": ("validate", "test", "predict"),
    "model.weights": ("validate", "test", "predict"),
    "model.heads": ("validate", "test", "predict"),
    "data.images": ("predict",),
    "data.texts": ("predict",),
}


def does_nothing(flag: str, command: str, data: str = "") -> str:
    """What is said of a flag that acts in other commands only."""
    return f"--{flag} does nothing in {command}, only in {', '.join(commands_of(flag, data))}; leave it out"


def commands_of(flag: str, data: str = "") -> tuple[str, ...]:
    """The commands that the flag acts in; none where it is no question in which.

    Args:
        flag: its name.
        data: the class of the data.
    """
    if flag == "data.prompts" and data.endswith("ChatTasks"):
        return ("predict",)
    return COMMANDS_OF.get(flag) or COMMANDS_OF.get(flag.partition(".")[0]) or ()


def check_given(command: str, flags: Iterable[str], data: str = "", foreign: Collection[str] = ()) -> None:
    """Raise if a flag was given to a command in which it does nothing.

    In a file it may stand: one configuration serves all commands.

    Args:
        command: which one.
        flags: names of the flags on the command line.
        data: the class of the data.
        foreign: of ``model`` and ``data`` those of other packages, whose arguments mean what these say.

    Raises:
        InputError: one of them acts in other commands only.
    """
    for flag in (flag for flag in flags if flag.partition(".")[0] not in foreign):
        commands = commands_of(flag, data)
        if commands and command not in commands:
            raise InputError(does_nothing(flag, command, data))
