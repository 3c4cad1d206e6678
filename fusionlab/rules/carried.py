"""What rules share that carry statistics of models run over data, as searches hand them out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fusionlab.errors import InputError, name_list

UNTOLD = {"told": False}
"""Metadata of a field that no configuration holds: tensors."""


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Short SHA-256 over names, shapes and values; it stands for them in configurations and keys."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_carried(rule: str, search: str, carried: Mapping[str, Iterable[str]], tasks: Iterable[str]) -> None:
    """Raise unless there are statistics, and those of these tasks.

    Args:
        rule: its name.
        search: names of what finds it.
        carried: by tensor, the tasks that statistics are there of.
        tasks: those that are fused.

    Raises:
        InputError: a rule that is taken from a configuration, or one that was found for other tasks.
    """
    if not carried:
        raise InputError(
            f"{rule} needs statistics of models that were run over data, which no configuration holds; give the rule "
            f"that finds them ({search}), with models and data"
        )
    known = set.intersection(*(set(of) for of in carried.values()))
    if missing := [task for task in tasks if task not in known]:
        raise InputError(f"{rule} has no statistics of {name_list(missing)}; it was found for {name_list(known)}")


def check_known(rule: str, carried: Iterable[str], names: Iterable[str]) -> None:
    """Raise if there are statistics of a tensor that is not fused: files call it otherwise, and it would be averaged.

    Raises:
        InputError: with the names.
    """
    fused = set(names)
    if unknown := [name for name in carried if name not in fused]:
        raise InputError(
            f"{rule} has statistics of {name_list(unknown)}, which what is fused calls otherwise or does not have; "
            f"write base and models anew with the same version of transformers"
        )
