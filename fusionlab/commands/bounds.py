"""Numbers of the trainer and of the commands that are out of bounds, or contradict each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fusionlab.errors import InputError, did_you_mean

# the least value of each option of the trainer, with what else to do
LEAST: Mapping[str, tuple[int, str]] = {
    "num_nodes": (1, "give the number of machines"),
    "accumulate_grad_batches": (1, "1 updates after every batch"),
    "check_val_every_n_epoch": (1, "leave it out for every epoch"),
    "log_every_n_steps": (0, "0 logs nothing"),
    "num_sanity_val_steps": (-1, "-1 takes all batches, 0 none"),
    "min_steps": (0, "leave it out"),
    "min_epochs": (0, "leave it out"),
}
RULES = ("rule", "rules")  # of recipes: these check their own numbers, and name the rule
UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")


def check_bounds(trainer: Any) -> None:
    """Raise for a number of the trainer that it takes and stumbles over later, or acts on otherwise than it says.

    Raises:
        InputError: the option, what was expected, and what came.
    """
    for name, (least, advice) in LEAST.items():
        if trainer[name] is not None and trainer[name] < least:
            raise InputError(f"trainer.{name} must be at least {least}, got {trainer[name]}; {advice}")
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise InputError(
            f"trainer.gradient_clip_val must not be negative, got {trainer.gradient_clip_val}; 0 clips nothing"
        )
    if trainer.val_check_interval == 0:
        raise InputError("trainer.val_check_interval 0 would never validate; leave it out")
    for unit in ("steps", "epochs"):
        least, most = trainer[f"min_{unit}"], trainer[f"max_{unit}"]
        if most == 0:
            raise InputError(f"trainer.max_{unit} 0 leaves nothing to train; give at least 1, or -1 for no such bound")
        if least is not None and most is not None and 0 < most < least:
            raise InputError(
                f"trainer.min_{unit} {least} is more than trainer.max_{unit} {most}, which ends the training; give less"
            )
    _check_time(trainer.max_time)


def check_finite(given: Any, name: str) -> None:
    """Raise if a number anywhere in a recipe's value is infinite, or none.

    Raises:
        InputError: naming its place.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            check_finite(value, f"{name}.{key}")
    elif isinstance(given, list | tuple):
        for value in given:
            check_finite(value, name)
    elif isinstance(given, float) and not math.isfinite(given):
        raise InputError(f"{name}: expected a finite number, got {given}; give one, or leave it out")


def check_timeout(seconds: float) -> None:
    """Raise unless ``start_timeout`` is a time that can be waited.

    Raises:
        InputError: it is not positive, or has no end.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InputError(f"start_timeout must be a positive number of seconds, got {seconds}")


def _check_time(given: Any) -> None:
    """Raise if ``max_time`` is no time: of another unit, or negative."""
    if isinstance(given, Mapping):
        for unit in given:
            if unit not in UNITS:
                raise InputError(f"trainer.max_time: no unit {unit!r}; {did_you_mean(str(unit), UNITS)}")
        try:
            given = timedelta(**given)
        except OverflowError as error:
            raise InputError(f"trainer.max_time {dict(given)} is too long; leave it out") from error
    if isinstance(given, timedelta) and given < timedelta(0):
        raise InputError(f"trainer.max_time must not be negative, got {given.total_seconds():g} seconds")
