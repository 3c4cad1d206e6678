"""Several processes of this machine on one sweep: each works on the ledger as if alone, with threads of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
import yaml

from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.errors import InputError, name_list

Helper = tuple["subprocess.Popen[bytes]", IO[bytes]]


def num_processes(recipe: SweepRecipe, num_runs: int, device: torch.device) -> int:
    """How many processes share the work: what the recipe says; else one a thread of torch's, where there are as many
    runs and models are scored on the CPU."""
    if recipe.processes is not None:
        return recipe.processes
    return min(torch.get_num_threads(), num_runs) if device.type == "cpu" else 1


@contextmanager
def helping(recipe: SweepRecipe, count: int) -> Iterator[None]:
    """Within the block ``count`` processes, this one among them, work on the sweep and share its threads.

    The others end with the block, or with this process, however it ends; the ledger keeps what they did. One that
    failed is told of: what it had in hand is done by the others.
    """
    if count == 1:
        yield
        return
    threads = torch.get_num_threads()
    own = max(1, threads // count)
    with tempfile.TemporaryDirectory(prefix="fusionlab-") as folder, ExitStack() as stack:
        path = Path(folder) / "recipe.yaml"
        path.write_text(_written(recipe))
        torch.set_num_threads(own)
        stack.callback(torch.set_num_threads, threads)
        helpers = [_start(path, number / count, own, folder) for number in range(1, count)]
        stack.callback(_end, helpers)
        yield


def _written(recipe: SweepRecipe) -> str:
    """The recipe as another process reads it.

    Raises:
        InputError: it holds a rule that no configuration gives again.
    """
    try:
        return yaml.safe_dump({**vars(recipe), "processes": 1}, sort_keys=False)
    except yaml.YAMLError as error:
        named = recipe.rules if isinstance(recipe.rules, dict) else {}
        held = name_list(name for name, rule in named.items() if not isinstance(rule, str | dict)) or error
        raise InputError(f"rules: no configuration gives {held} again to another process; give processes 1") from error


def _start(recipe: Path, place: float, threads: int, folder: str) -> Helper:
    told = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when the helper has ended
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    argv = [sys.executable, "-m", "fusionlab.commands.sweep.processes", str(recipe), str(place)]
    # in a session of its own: Ctrl-C is for this process, which ends the others
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=told, stderr=told, env=environment, start_new_session=True
    )
    return process, told


def _end(helpers: list[Helper]) -> None:
    """End those that still run, and tell of those that failed."""
    for process, told in helpers:
        failed = process.poll()
        process.kill()
        process.communicate()
        told.seek(0)
        if failed:
            lines = told.read().decode(errors="replace").strip().splitlines()
            warnings.warn(
                f"a helping process ended with exit code {failed}; the others did its work. It said last: "
                + " / ".join(lines[-3:]),
                stacklevel=2,
            )
        told.close()


def _end_with_parent() -> None:
    """End this process when the one that started it closes the pipe, or is gone."""
    sys.stdin.buffer.read()
    os._exit(0)


def main(recipe: str, place: str) -> int:
    """Work on a sweep beside the process that started this one."""
    from fusionlab.commands.sweep.execute import Sweep
    from fusionlab.commands.trainer import quiet

    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    Sweep(SweepRecipe(**yaml.safe_load(Path(recipe).read_text())), float(place)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
