"""Checkpoints of ``fit``, refused where they are cut short or something else."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, named


def read_checkpoint(
    path: Path,
    what: str,
    advice: str,
    *,
    needed: Sequence[str] = ("state_dict",),
    lacking: str | None = None,
    weights_only: bool = True,
) -> dict[str, Any]:
    """What a checkpoint holds; tensors are read from the file when they are used.

    Args:
        path: the file.
        what: what a message calls it, before its path.
        advice: what to do where it cannot be used.
        needed: keys that it must have.
        lacking: what to do where it has not; ``advice`` by default.
        weights_only: refuse what is neither tensors nor plain values.

    Raises:
        InputError: it is gone, cannot be read, is cut short, or is no checkpoint of ``fit``.
    """
    with named(what, advice), accessed(path), path.open("rb") as file:
        is_whole = zipfile.is_zipfile(file)
    if not is_whole:
        raise InputError(f"{what} {str(path)!r} is no checkpoint, or is cut short; {advice}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:150]
        raise InputError(f"{what} {str(path)!r} is no checkpoint of fit ({reason}); {advice}") from error
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing:
        raise InputError(
            f"{what} {str(path)!r} is no whole checkpoint of fit: it lacks {name_list(missing)}; {lacking or advice}"
        )
    assert isinstance(found, dict)
    return found
