"""How options of the command line become the trainer's: progress bars, profiles, plain values, what is printed."""

from __future__ import annotations

import logging
import re
import signal
import traceback
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
from fusionlab.runs.leases import number_of_launcher

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
    if not isinstance(name, str) or name not in _PROFILERS:
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


def begins_anew(config: Any) -> bool:
    """Whether ``fit`` overwrites a run: what a cluster started again goes on with what it had begun."""
    return bool(config.overwrite) and not is_restarted()


def is_restarted() -> bool:
    """Whether SLURM or torchrun has started this very job again, which then goes on even with ``--overwrite``."""
    return any(number_of_launcher(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


@contextmanager
def lightning_errors() -> Iterator[None]:
    """What Lightning says of options that cannot be is bad input, and what interrupts it goes on.

    Raises:
        InputError: in place of Lightning's own errors about its options.
        KeyboardInterrupt: in place of Lightning's exit with code 1, which says nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        if not is_of_options(error):
            raise
        raise InputError(_told(error)) from error
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)  # which Lightning has switched off
        raise error.__context__ from None


@contextmanager
def trainer_built(trainer: Namespace) -> Iterator[None]:
    """While the trainer is built, all that Lightning refuses is an option, or what the launcher says, and bad input.

    Args:
        trainer: its options.

    Raises:
        InputError: in place of Lightning's own errors.
    """
    try:
        with lightning_errors():
            yield
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, InputError) or not frames[-1].f_globals["__name__"].startswith("lightning."):
            raise
        given = f", got {trainer.devices!r} with accelerator {trainer.accelerator!r}"
        raise InputError(_told(error) + (given if "devices" in str(error) else "")) from error


def _told(error: BaseException) -> str:
    """Lightning's message in one line, with what to do where the machine or the launcher is the reason."""
    told = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError):
        told = f"the environment lacks {told}, which the launcher should have set"
    if re.search(r"No supported \w+ backend|can not run on your system|No CUDA GPUs", told):
        return f"trainer: {told}; give --trainer.accelerator auto, which takes what this machine has, or cpu"
    if re.search("SLURM|--ntasks", told):
        return f"trainer: {told}; start it by srun, or for one process unset SLURM_NTASKS"
    return f"trainer: {told}"
