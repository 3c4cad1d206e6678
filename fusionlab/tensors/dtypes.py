"""Dtypes by name, and what a model's configuration says of the dtype of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fusionlab.errors import InputError, did_you_mean

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def dtype_of(given: str | torch.dtype | None, what: str) -> torch.dtype | None:
    """The dtype of this name, or the dtype itself; None for none.

    Raises:
        InputError: no such dtype; the message begins with ``what``.
    """
    name = str(given).removeprefix("torch.")
    if given is not None and name not in _DTYPES:
        raise InputError(f"{what}: no such dtype {name!r}; {did_you_mean(name, _DTYPES)}")
    return None if given is None else _DTYPES[name]


def say_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """Let ``config.json`` in ``folder``, where there is one, say that the weights are of ``dtype``.

    Transformers loads weights in the dtype that it says there. None changes nothing.
    """
    path = folder / "config.json"
    if dtype is not None and path.is_file():
        config = _with_dtype(json.loads(path.read_text()), str(dtype).removeprefix("torch."))
        path.write_text(json.dumps(config, indent=2) + "\n")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
    changed = {key: _with_dtype(value, dtype) if _says_dtype(value) else value for key, value in changed.items()}
    return changed if "torch_dtype" in changed else changed | {"dtype": dtype}


def _says_dtype(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value)
