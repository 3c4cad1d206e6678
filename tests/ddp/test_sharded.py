"""Adapters trained over frozen weights that are split over two processes: those of ``ddp``, on half of the weights."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed.tensor import DTensor

WORLD_SIZE, STEPS = 2, 4
FIT = [
    "fit", "--data.max_samples", "16", "--data.batch_size", "4", "--trainer.max_steps", str(STEPS), "--train_only",
    "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.devices", str(WORLD_SIZE),
    "--model.rank", "4", "--checkpoint_every_n_steps", "2",
]  # fmt: skip
CLIP = ["--data.tasks", "[digits, signs]"]
T5 = ["--model", "T5Module", "--data", "TextTasks", "--data.tasks", "[sentiment]"]
KINDS = {
    "lora": [*CLIP, "--model.method", "lora", "--model.dropout", "0.1", "--trainer.gradient_clip_val", "0.1"],
    "l_lora": [*CLIP, "--model.method", "l_lora"],
    "t5": [*T5, "--model.method", "lora"],
}


def note_shares(module: Any, folder: Path) -> None:
    """Write how much of the layers' frozen weights this process holds between two steps."""
    split = {name: value for name, value in module.base_model.named_parameters() if isinstance(value, DTensor)}
    held = sum(value.to_local().numel() for value in split.values())
    of = sum(value.numel() for value in split.values())
    shares = {"held": held, "of": of, "adapters split": [name for name in split if "lora_" in name]}
    (folder / f"shares-{module.global_rank}.json").write_text(json.dumps(shares))


def worker(rank: int, port: int, folder: Path, options: list[str], fails_at: int | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from fusionlab.__main__ import main
    from fusionlab.modules.base import FusionModule

    step = FusionModule.training_step

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        note_shares(self, folder)
        if self.global_step == fails_at:
            raise KeyError("a fault")
        return step(self, batch, batch_idx)

    FusionModule.training_step = watched  # type: ignore[method-assign]
    code = main([*FIT, *options, "--trainer.default_root_dir", str(folder / "run")])
    assert code == 0


def run(folder: Path, options: list[str], fails_at: int | None = None) -> list[int]:
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fusionlab.cli"])
    context = multiprocessing.start_processes(
        worker, (port, folder, options, fails_at), nprocs=WORLD_SIZE, start_method="forkserver", join=False
    )
    for process in context.processes:
        process.join(90)
        assert not process.is_alive()
    return [process.exitcode for process in context.processes]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What the run's adapters hold, by file and name.

    But for T5's queries over answers of one token: attention has no choice there, and AdamW makes steps of rounding.
    """
    files = sorted(folder.rglob("adapters/*/adapter_model.safetensors"))
    assert files
    found = {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}
    return {key: value for key, value in found.items() if not ("decoder" in key and "SelfAttention.q" in key)}


@pytest.mark.parametrize("kind", KINDS)
def test_split_weights_train_the_same_adapters(tmp_path: Path, kind: str) -> None:
    for strategy in ("ddp", "fsdp"):
        assert run(tmp_path / strategy, [*KINDS[kind], "--trainer.strategy", strategy]) == [0, 0]
    torch.testing.assert_close(trained(tmp_path / "fsdp"), trained(tmp_path / "ddp"), rtol=1e-4, atol=1e-6)
    own = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("adapters/*/fusionlab.json"))]
    assert len({record["base_hash"] for record in own}) == 1
    for rank in range(WORLD_SIZE):
        shares = json.loads((tmp_path / "fsdp" / f"shares-{rank}.json").read_text())
        assert shares["held"] * WORLD_SIZE == shares["of"] > 0
        assert shares["adapters split"] == []
        assert json.loads((tmp_path / "ddp" / f"shares-{rank}.json").read_text())["of"] == 0


def test_a_fault_and_a_restart_change_nothing(tmp_path: Path) -> None:
    options = [*KINDS["lora"], "--trainer.strategy", "fsdp"]
    assert 0 not in run(tmp_path / "broken", options, fails_at=3)
    assert run(tmp_path / "broken", options) == [0, 0]
    assert run(tmp_path / "whole", options) == [0, 0]
    torch.testing.assert_close(trained(tmp_path / "broken"), trained(tmp_path / "whole"), rtol=1e-4, atol=1e-6)
