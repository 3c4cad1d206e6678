"""``fit --ckpt_path``: which checkpoint a run goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError
from fusionlab.files import named, path_of
from fusionlab.layout import CHECKPOINTS, LAST
from fusionlab.runs.checkpoints import read_checkpoint
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
        InputError: the given one, or the folder's own, cannot be read or is past the run's end; or the given one goes
            against the folder's own.
    """
    given = None if config.ckpt_path is None else _checked(_path(config.ckpt_path), config)
    own = folder.last_checkpoint
    if state != "unfinished":
        if given is not None and config.overwrite and folder.path.resolve() in given.resolve().parents:
            raise InputError(
                f"--overwrite deletes what is in {str(folder.path)!r}, where --ckpt_path lies; leave one out"
            )
        return given
    before = folder.config().get("ckpt_path")
    same = before is not None and str(given) == _path(before)
    if given is not None and not (own is not None and given.samefile(own)) and not same:
        raise InputError(
            f"the unfinished run in {str(folder.path)!r} goes on from its own {own or 'start'}, not from "
            f"{str(given)!r}; leave --ckpt_path out, or give another --trainer.default_root_dir"
        )
    if own is None and given is None and before is not None:
        raise InputError(
            f"the unfinished run in {str(folder.path)!r} began at {before!r}; give it as --ckpt_path again"
        )
    if own is not None:
        advice = "give --overwrite to start anew, or put a whole one there"
        _check_end(own, read_checkpoint(own, "the run's own", advice, needed=_NEEDED), "the run's own", config)
    return own or given


def _path(given: str | Path) -> str:
    with named("--ckpt_path"):
        return str(path_of(given))


def _checked(path: str, config: Any) -> Path:
    if path.partition(":")[0] in KEYWORDS and not Path(path).exists():
        raise InputError(
            f"--ckpt_path {path!r}: give a file; an unfinished run goes on from its last checkpoint without --ckpt_path"
        )
    if not Path(path).is_file():
        raise InputError(f"--ckpt_path: no file {path!r}; give a checkpoint, such as {_LAST}")
    found = read_checkpoint(
        Path(path),
        "--ckpt_path",
        f"give {_LAST}",
        needed=_NEEDED,
        lacking="to score weights give test --model.weights FOLDER",
        weights_only=config.weights_only is not False,
    )
    _check_end(Path(path), found, "--ckpt_path", config)
    return Path(path)


def _check_end(path: Path, found: Mapping[str, Any], what: str, config: Any) -> None:
    if 0 <= config.trainer.max_steps < found["global_step"]:
        raise InputError(
            f"{what} {str(path)!r} is at step {found['global_step']}, past trainer.max_steps {config.trainer.max_steps}"
        )
