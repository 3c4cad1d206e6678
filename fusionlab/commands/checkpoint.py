"""``fit --ckpt_path``: which checkpoint a run goes on from."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

from fusionlab.errors import InputError, name_list
from fusionlab.layout import CHECKPOINTS, CONFIG, LAST
from fusionlab.runs.folder import RunFolder

KEYWORDS = ("last", "best", "hpc", "registry")
_LAST = f"RUN/{CHECKPOINTS}/{LAST}"
_NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")


def checkpoint_to_go_on_from(config: Any, folder: RunFolder, state: str) -> Path | None:
    """The checkpoint that a fit starts from: the folder's own last one, else the one that is given; None for neither.

    Args:
        config: of fit, with ``ckpt_path``, ``weights_only``, ``overwrite`` and ``trainer.max_steps``.
        folder: the run folder, or this job's part of it.
        state: what was found there.

    Raises:
        InputError: the given one cannot be read, is past the run's end, or goes against the folder's own.
    """
    given = None if config.ckpt_path is None else _checked(str(config.ckpt_path), config)
    own = folder.last_checkpoint
    if state != "unfinished":
        if given is not None and config.overwrite and folder.path.resolve() in given.resolve().parents:
            raise InputError(
                f"--overwrite deletes what is in {str(folder.path)!r}, where --ckpt_path lies; leave one out"
            )
        return given
    before = yaml.safe_load((folder.path / CONFIG).read_text()).get("ckpt_path")
    if given is not None and not (own is not None and given.samefile(own)) and str(given) != before:
        raise InputError(
            f"the unfinished run in {str(folder.path)!r} goes on from its own {own or 'start'}, not from "
            f"{str(given)!r}; leave --ckpt_path out, or give another --trainer.default_root_dir"
        )
    if own is None and given is None and before is not None:
        raise InputError(
            f"the unfinished run in {str(folder.path)!r} began at {before!r}; give it as --ckpt_path again"
        )
    return own or given


def _checked(path: str, config: Any) -> Path:
    if path.partition(":")[0] in KEYWORDS and not Path(path).exists():
        raise InputError(
            f"--ckpt_path {path!r}: give a file; an unfinished run goes on from its last checkpoint without --ckpt_path"
        )
    if not Path(path).is_file():
        raise InputError(f"--ckpt_path: no file {path!r}; give a checkpoint, such as {_LAST}")
    weights_only = config.weights_only is not False
    if not zipfile.is_zipfile(path):
        raise InputError(f"--ckpt_path {path!r} is no checkpoint, or is cut short; give {_LAST}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise InputError(
            f"--ckpt_path {path!r} is no checkpoint of fit ({str(error).splitlines()[0][:150]})"
        ) from error
    missing = [key for key in _NEEDED if not isinstance(found, dict) or key not in found]
    if missing:
        raise InputError(
            f"--ckpt_path {path!r} is no whole checkpoint of fit: it lacks {name_list(missing)}; to score weights give "
            f"test --model.weights FOLDER"
        )
    if 0 <= config.trainer.max_steps < found["global_step"]:
        raise InputError(
            f"--ckpt_path {path!r} is at step {found['global_step']}, past trainer.max_steps {config.trainer.max_steps}"
        )
    return Path(path)
