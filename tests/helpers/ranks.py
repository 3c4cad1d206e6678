"""Processes of a test, forked from one that has imported the package, which takes a process by itself seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
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


def as_torchrun_does(rank: int, port: int, count: int) -> None:
    """Set what `torchrun` sets for a process of one machine."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def command(argv: list[str], count: int, folder: Path) -> str:
    """Run a command of Lightning's on so many processes; what the first writes on the standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--trainer.devices", str(count), "--trainer.strategy", "ddp"]
    start(_command, (free_port(), count, [*argv, *flags], folder), count)
    return (folder / "0.err").read_text()


def _command(rank: int, port: int, count: int, argv: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    as_torchrun_does(rank, port, count)
    from fusionlab.__main__ import main

    with (folder / f"{rank}.err").open("w") as errors, redirect_stderr(errors):
        code = main(argv)
    assert code == 0, (folder / f"{rank}.err").read_text()[-3000:]
