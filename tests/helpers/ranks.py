"""Processes of a test, forked from one that has imported the package, which takes a process by itself seconds."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

from torch import multiprocessing as of_torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fusionlab.commands.fit", "fusionlab.data.text"])


def start(worker: Callable[..., None], arguments: tuple[Any, ...], count: int, *, join: bool = True) -> Any:
    """Call ``worker(rank, *arguments)`` in as many processes; the context to wait for without ``join``."""
    return of_torch.start_processes(worker, arguments, nprocs=count, start_method="forkserver", join=join)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
