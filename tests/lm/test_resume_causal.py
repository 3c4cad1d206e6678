"""A language model's fit that is killed in a step and given again equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from fusionlab.__main__ import main
from fusionlab.modules import CausalModule

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
KINDS = {
    "l_lora": ["--model.method", "l_lora", "--model.dropout", ".2"],
    "packed": ["--data.packing", "true", "--data.max_length", "64", "--trainer.accumulate_grad_batches", "2"],
    "one update an epoch": ["--data.batch_size", "20", "--trainer.accumulate_grad_batches", "2"],
    "tangent": ["--model.method", "tangent"],
    "full": ["--model.method", "full", "--data.batch_size", "3"],
    "tangent_lora": ["--model.method", "tangent_lora", "--model.dropout", ".2"],
}


def run(argv: list[str], log: Path, killed_at: int | None) -> None:
    """A fit in a process of its own, which kills itself in the step ``killed_at``."""
    torch.set_num_threads(1)
    original = CausalModule.loss

    def loss(self: CausalModule, task: str, batch: dict[str, Any]) -> torch.Tensor:
        if self.global_step == killed_at and task == "tale":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, task, batch)

    CausalModule.loss = loss  # type: ignore[method-assign]
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main(argv))


@pytest.fixture(scope="module")
def flags(causal_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "count": [{"prompt": f"film {i}:", "completion": " one" * (1 + i % 9)} for i in range(37)],
        "tale": [{"text": f"film {i} " + "or two " * (i % 7)} for i in range(41)],
    }
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    tasks = json.dumps([{"name": name, "path": str(folder / f"{name}.jsonl")} for name in rows])
    model = ["--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--model.max_new_tokens", "4"]
    data = ["--data", "ChatTasks", "--data.tasks", tasks, "--data.cache_dir", str(folder / "cache")]
    trainer = ["--trainer.max_steps", "7", "--checkpoint_every_n_steps", "2", "--trainer.enable_progress_bar", "false"]
    return ["fit", *model, *data, *trainer, "--data.batch_size", "4", "--fusion.rules", "[ties]"]


def ended(argv: list[str], root: Path, killed_at: int | None = None) -> int | None:
    log = root.with_suffix(".log")
    argv = [*argv, "--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"]
    process = ranks.CONTEXT.Process(target=run, args=(argv, log, killed_at))
    process.start()
    process.join()
    return process.exitcode


def same(ours: Any, theirs: Any) -> bool:
    """Nested equality, tensors bit for bit."""
    if isinstance(ours, torch.Tensor):
        return ours.equal(theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def check_killed(argv: list[str], folder: Path, places: list[int]) -> None:
    whole, root = folder / "whole", folder / "killed"
    assert ended(argv, whole) == 0, whole.with_suffix(".log").read_text()
    for place in places:
        assert ended(argv, root, place) == -signal.SIGKILL, root.with_suffix(".log").read_text()
        assert not (root / "results.json").exists()
    assert ended(argv, root) == 0, root.with_suffix(".log").read_text()
    ours, theirs = (torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in (root, whole))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(ours[key], theirs[key]), key
    assert ours["global_step"] == 7
    files = {each: sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (root, whole)}
    assert files[root] == files[whole]
    for name in files[root]:
        if name.endswith((".safetensors", "results.json")):
            assert (root / name).read_bytes() == (whole / name).read_bytes(), name


def test_killed_and_restarted_equals_uninterrupted(flags: list[str], tmp_path: Path) -> None:
    check_killed([*flags, *KINDS["l_lora"]], tmp_path, [5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_several_steps(flags: list[str], tmp_path: Path, kind: str) -> None:
    check_killed([*flags, *KINDS[kind]], tmp_path, [1, 3, 4, 6])
