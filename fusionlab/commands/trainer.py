"""How options of the command line become the trainer's: progress bars, profiles, plain values, what is printed."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import transformers
from jsonargparse import Namespace
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fusionlab.callbacks.run_folder import is_of_options
from fusionlab.commands.options import class_names
from fusionlab.errors import InputError

_PROFILERS: dict[str, Callable[..., Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def quiet() -> None:
    """Leave Lightning's and transformers' notices out; warnings stay, but for two of Lightning: about torch, and
    about the numbers of predicted inputs, which their rows name themselves.

    A summary of the model that is asked for is shown.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")


def profiler_of(name: Any, folder: str | None) -> dict[str, Any]:
    """The trainer's profiler by its name, which writes ``STAGE-profile.txt`` into the run folder; else nothing."""
    if name not in _PROFILERS:
        return {}
    return {"profiler": _PROFILERS[name](dirpath=folder, filename="profile")}


def brings_progress_bar(callbacks: Any) -> bool:
    """Whether a progress display is among the callbacks that are asked for."""
    return any(name.endswith("ProgressBar") for name in class_names(callbacks))


def as_list(value: Any) -> list[Any]:
    """A list of none, one or several."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def plain(value: Any) -> Any:
    """A configuration that can be written: members of enumerations, which classes have for defaults, by their value."""
    if isinstance(value, Namespace):
        found = Namespace()
        for key, of_key in vars(value).items():
            found[key] = plain(of_key)
        return found
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def is_restarted() -> bool:
    """Whether SLURM or torchrun has started this very job again, which then goes on even with ``--overwrite``."""
    return any(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


@contextmanager
def lightning_errors() -> Iterator[None]:
    """What Lightning says of options that cannot be is bad input.

    Raises:
        InputError: in place of Lightning's own errors about its options.
    """
    try:
        yield
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        if not is_of_options(error):
            raise
        told = " ".join(str(error).split())
        lacking = re.search(r"No supported \w+ backend|can not run on your system|No CUDA GPUs", told)
        advice = "; give --trainer.accelerator auto, which takes what this machine has, or cpu" if lacking else ""
        raise InputError(f"trainer: {told.rstrip('.') if lacking else told}{advice}") from error
