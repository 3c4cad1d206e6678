"""Processes of one run: what the launcher says, and what they must agree on."""

from __future__ import annotations

from typing import Any

from fusionlab.errors import InputError
from fusionlab.runs.leases import number_of_launcher

RUN_FOLDER_VARIABLE = "FUSIONLAB_RUN_FOLDER"


def started_world_size() -> int:
    """Number of processes that the launcher in the environment started; 1 without one."""
    return number_of_launcher("WORLD_SIZE") or number_of_launcher("SLURM_NTASKS") or 1


def started_rank() -> int:
    """This process's rank by the launcher in the environment; 0 without one."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if (rank := number_of_launcher(name)) is not None:
            return rank
    return 0


def same_on_all_ranks(strategy: Any, what: str, value: Any) -> None:
    """Raise on the ranks that see another value than rank 0.

    Raises:
        InputError: this rank differs.
    """
    first = strategy.broadcast(value)
    differs = strategy.reduce_boolean_decision(first != value, all=False)
    if differs:
        raise InputError(
            f"the processes do not agree on {what}: rank 0 sees {first!r}, rank {strategy.global_rank} {value!r}; they "
            f"need the same files, on a file system that all of them share"
        )


def raise_together(strategy: Any, error: InputError | None) -> None:
    """Raise rank 0's error on all ranks, so that none of them waits for it; only rank 0 has a message.

    Raises:
        InputError: on rank 0.
        SystemExit: with exit code 2, on the others.
    """
    failed = strategy.broadcast(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
