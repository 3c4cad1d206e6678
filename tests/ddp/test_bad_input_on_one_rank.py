"""Bad input that one process alone meets: it tells so with exit code 2, and none leaves a traceback."""

from __future__ import annotations

import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from often import often

WORLD_SIZE = 3
FIT = [
    "fit", "--data.tasks", "[digits]", "--data.max_samples", "24", "--trainer.max_steps", "4", "--fusion.rules",
    "[average]", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp",
    "--trainer.devices", str(WORLD_SIZE),
]  # fmt: skip


def fail_at(where: str, error: Exception) -> None:
    """Let this process fail while the data is loaded, or in a step."""
    from fusionlab.data.images import ImageTasks
    from fusionlab.modules import ClipModule

    owner, name = (ImageTasks, "load_task") if where == "setup" else (ClipModule, "loss")
    original = getattr(owner, name)

    def failing(self: Any, *arguments: Any) -> Any:
        if torch.distributed.is_initialized() and (where == "setup" or self.global_step == 2):
            raise error
        return original(self, *arguments)

    setattr(owner, name, failing)


def look_late(seconds: float) -> None:
    """Let this process come late to see why another has left, as on a loaded machine."""
    from fusionlab.commands import fit

    original = fit.exit_code_of_others

    def late() -> int | None:
        time.sleep(seconds)
        return original()

    fit.exit_code_of_others = late


def worker(rank: int, port: int, folder: Path, where: str, culprit: int, kind: str, slow: int | None) -> None:
    torch.set_num_threads(1)
    ranks.as_torchrun_does(rank, port, WORLD_SIZE)
    from fusionlab.__main__ import main
    from fusionlab.errors import InputError

    if rank == culprit:
        fail_at(where, InputError("sample 7 is bad") if kind == "bad input" else KeyError("a fault"))
    if rank == slow:
        look_late(6.0)
    outcome = "a fault"
    with (folder / f"{rank}.err").open("w") as errors, redirect_stderr(errors), redirect_stdout(errors):
        try:
            outcome = f"exit code {main([*FIT, '--trainer.default_root_dir', str(folder / 'run')])}"
        except SystemExit as ended:
            outcome = f"exit code {ended.code}"
        finally:
            (folder / f"{rank}.outcome").write_text(outcome)


def run(folder: Path, where: str, culprit: int, kind: str = "bad input", slow: int | None = None) -> list[str]:
    arguments = (ranks.free_port(), folder, where, culprit, kind, slow)
    context = ranks.start(worker, arguments, WORLD_SIZE, join=False)
    for process in context.processes:
        process.join(240)
        assert not process.is_alive()
    return [(folder / f"{rank}.outcome").read_text() for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(
    ("where", "culprit", "slow"),
    often([("setup", 1, None), ("setup", 1, 2), ("step", 0, 1), ("step", 2, None)], "setup-1-None", "step-2-None"),
)
def test_one_message_and_no_traceback(tmp_path: Path, where: str, culprit: int, slow: int | None) -> None:
    outcomes = run(tmp_path, where, culprit, slow=slow)
    assert outcomes == ["exit code 2"] * WORLD_SIZE
    told = [(tmp_path / f"{rank}.err").read_text() for rank in range(WORLD_SIZE)]
    assert told[culprit].count("fusionlab: sample 7 is bad") == 1
    assert not any("sample 7" in text for rank, text in enumerate(told) if rank != culprit)
    assert not any("Traceback" in text for text in told)
    # nobody waits for a timeout, which are minutes; how long the start takes is the machine's affair
    ends = [(tmp_path / f"{rank}.outcome").stat().st_mtime for rank in range(WORLD_SIZE)]
    assert max(ends) - min(ends) < 60


def test_a_fault_stays_a_fault_everywhere(tmp_path: Path) -> None:
    assert set(run(tmp_path, "step", 1, "fault")) <= {"a fault", "exit code 1"}
