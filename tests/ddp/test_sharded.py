"""Training with weights that are split over two processes: what ``ddp`` gives, on half of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from often import often
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import ViTConfig, ViTModel

WORLD_SIZE, STEPS = 2, 4
FIT = [
    "fit", "--data.max_samples", "16", "--data.batch_size", "4", "--trainer.max_steps", str(STEPS), "--train_only",
    "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.devices", str(WORLD_SIZE),
    "--model.rank", "4", "--checkpoint_every_n_steps", "2",
]  # fmt: skip
CLIP = ["--data.tasks", "[digits, signs]"]
T5 = ["--model", "T5Module", "--data", "TextTasks", "--data.tasks", "[sentiment]"]
VIT = ["--model", "ViTModule", "--model.backbone"]
KINDS = {
    "lora": [*CLIP, "--model.method", "lora", "--model.dropout", "0.1", "--trainer.gradient_clip_val", "0.1"],
    "l_lora": [*CLIP, "--model.method", "l_lora"],
    "t5": [*T5, "--model.method", "lora"],
    "full": [*CLIP, "--model.method", "full", "--trainer.gradient_clip_val", "0.1"],
    "vit full": [*CLIP, "--model.method", "full", "--trainer.precision", "bf16-mixed", *VIT],
    "t5 full": [*T5, "--model.method", "full", "--trainer.accumulate_grad_batches", "2"],
}


def note_shares(module: Any, folder: Path) -> None:
    """Write how much of what is split this process holds between two steps, and what is trained and whole."""
    split = {name: value for name, value in module.named_parameters() if isinstance(value, DTensor)}
    for optimizer in module.trainer.optimizers:
        for number, state in enumerate(optimizer.state.values()):
            split |= {f"{key} {number}": value for key, value in state.items() if isinstance(value, DTensor)}
    held = sum(value.to_local().numel() for value in split.values())
    of = sum(value.numel() for value in split.values())
    whole = [name for name, value in module.named_parameters() if value.requires_grad and name not in split]
    shares = {"held": held, "of": of, "split": sorted(split), "trained whole": whole}
    (folder / f"shares-{module.global_rank}.json").write_text(json.dumps(shares))


def worker(rank: int, port: int, folder: Path, options: list[str], fails_at: int | None) -> None:
    torch.set_num_threads(1)
    ranks.as_torchrun_does(rank, port, WORLD_SIZE)
    from fusionlab.__main__ import main
    from fusionlab.modules.base import FusionModule

    step, full_tensor, gathers = FusionModule.training_step, DTensor.full_tensor, []

    def counted(value: DTensor) -> torch.Tensor:
        gathers.append(value.numel())
        return full_tensor(value)

    def refused(self: Any) -> Any:
        raise AssertionError("split weights must stay on their device: what is trained is gathered at the very end")

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        note_shares(self, folder)
        if self.global_step == fails_at:
            raise KeyError("a fault")
        return step(self, batch, batch_idx)

    FusionModule.training_step = watched  # type: ignore[method-assign]
    DTensor.full_tensor = counted  # type: ignore[method-assign]
    if "fsdp" in options:
        FusionModule.cpu = refused  # type: ignore[method-assign]
    code = main([*FIT, *options, "--trainer.default_root_dir", str(folder / "run")])
    (folder / f"gathers-{rank}.json").write_text(json.dumps(sum(gathers)))
    assert code == 0


@pytest.fixture
def vit(tmp_path: Path) -> str:
    """A folder with a small ViT, whose heads are trained too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 34, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def run(folder: Path, options: list[str], fails_at: int | None = None) -> list[int]:
    folder.mkdir(exist_ok=True)
    context = ranks.start(worker, (ranks.free_port(), folder, options, fails_at), WORLD_SIZE, join=False)
    for process in context.processes:
        process.join(90)
        assert not process.is_alive()
    return [process.exitcode for process in context.processes]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What the run's adapters, fine-tuned weights and heads hold, by file and name.

    But for T5's queries over answers of one token: attention has no choice there, and AdamW makes steps of rounding.
    """
    files = sorted((folder / "run").rglob("*.safetensors"))
    assert files
    found = {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}
    return {key: value for key, value in found.items() if not ("decoder" in key and "SelfAttention.q" in key)}


def moments(folder: Path) -> list[dict[str, torch.Tensor]]:
    """AdamW's states in the run's checkpoint: they tell the gradients' size, which the updates do not."""
    (file,) = (folder / "run").rglob("last.ckpt")
    (state,) = torch.load(file, weights_only=True)["optimizer_states"]
    return list(state["state"].values())


@pytest.mark.parametrize("kind", often(KINDS, "lora"))
def test_split_weights_train_the_same(tmp_path: Path, kind: str, vit: str) -> None:
    options = KINDS[kind] + ([vit] if kind.startswith("vit") else [])
    for strategy in ("ddp", "fsdp"):
        assert run(tmp_path / strategy, [*options, "--trainer.strategy", strategy]) == [0, 0]
    torch.testing.assert_close(trained(tmp_path / "fsdp"), trained(tmp_path / "ddp"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments(tmp_path / "fsdp"), moments(tmp_path / "ddp"), rtol=1e-3, atol=1e-7)
    own = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("fusionlab.json"))]
    assert len({record.get("base_hash") for record in own}) == 1
    held = 0
    for rank in range(WORLD_SIZE):
        shares = json.loads((tmp_path / "fsdp" / f"shares-{rank}.json").read_text())
        assert 0.45 * shares["of"] < shares["held"] < 0.55 * shares["of"]
        assert not [name for name in shares["split"] if "lora_" in name]
        assert (not shares["trained whole"]) == ("full" in kind)
        assert ("exp_avg 0" in shares["split"]) == ("full" in kind)
        assert json.loads((tmp_path / "ddp" / f"shares-{rank}.json").read_text())["of"] == 0
        held += shares["held"]
        gathered = json.loads((tmp_path / "fsdp" / f"gathers-{rank}.json").read_text())
        assert (gathered > 0) == ("full" in kind)  # the frozen base is in no checkpoint: nor is it gathered for one
    assert held == shares["of"]


@pytest.mark.parametrize(("kind", "then"), often([("lora", "fsdp"), ("full", "fsdp"), ("full", "ddp")]))
def test_a_fault_and_a_restart_change_nothing(tmp_path: Path, kind: str, then: str) -> None:
    options = [*KINDS[kind], "--trainer.strategy"]
    assert 0 not in run(tmp_path / "broken", [*options, "fsdp"], fails_at=3)
    assert run(tmp_path / "broken", [*options, then]) == [0, 0]
    assert run(tmp_path / "whole", [*options, "fsdp"]) == [0, 0]
    torch.testing.assert_close(trained(tmp_path / "broken"), trained(tmp_path / "whole"), rtol=1e-4, atol=1e-6)
