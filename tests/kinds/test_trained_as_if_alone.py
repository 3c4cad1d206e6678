"""What surrounds a task's training leaves it as it is: shared statistics, other micro-batches, scales of the loss."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from fusionlab import ClipModule, T5Module, ViTModule
from fusionlab.adapters import Adapter, Factors, load_adapter
from fusionlab.adapters.serving import save_fused_adapter
from fusionlab.backbones.vit import TimmBackbone
from fusionlab.data import ImageTasks, TextTasks
from fusionlab.errors import InputError
from fusionlab.modules.stepping import gradients_of


def trainer_of(steps: int = 3, **more: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, max_steps=steps, limit_val_batches=0, **quiet, **more)


def vector(weights: Any) -> Tensor:
    return torch.cat([weights.delta_weight(module).double().flatten() for module in weights.factors])


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_statistics_of_the_base_stay_as_they_are(method: Any) -> None:
    """BatchNorm's are one for all tasks, and neither adapters nor checkpoints hold them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("mobilevit_xxs", pretrained=False, num_classes=0)
    backbone = TimmBackbone(network, name="timm:mobilevit_xxs")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    module = ViTModule(backbone, method=method, num_warmup_steps=0, **({"rank": 4} if method == "lora" else {}))
    trainer_of(2).fit(module, ImageTasks(["digits", "signs"], batch_size=4, max_samples=8))
    after = {name.replace(".base_layer.", "."): value for name, value in module.base_model.state_dict().items()}
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
    assert any(name.endswith("running_mean") for name in before)
    assert module.training


def test_micro_batches_of_long_and_short_answers_make_the_batch_s_loss(tmp_path: Path) -> None:
    colors = ["red", "blue", "green", "grey", "pink"] * 4
    rows = [f"{color} cat {number},{number % 2}" for number, color in enumerate(colors)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    words = ["acceptable", "not equivalent at all positive"]
    task = {"name": "own", "path": str(tmp_path), "input_columns": ["text"], "label_words": words}

    def trained(batch_size: int, accumulated: int) -> Tensor:
        module = T5Module(method="lora", rank=4, num_warmup_steps=0, seed=1)
        for layer in module.base_model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        data = TextTasks([task], batch_size=batch_size, cache_dir=str(tmp_path / "cache"))
        trainer_of(3, accumulate_grad_batches=accumulated, precision="64-true").fit(module, data)
        return vector(module.finetuned("own"))

    whole = trained(8, 1)
    assert whole.norm() > 0
    torch.testing.assert_close(trained(4, 2), whole, rtol=1e-6, atol=1e-9)


class Norms(Callback):
    """Of each task's gradient before it is clipped."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            self.seen.append(sum(float(each.grad.double().square().sum()) for each in group["params"]) ** 0.5)


def test_gradients_are_clipped_by_their_own_norm_whatever_the_loss_is_scaled_by() -> None:
    def trained(clip: float, **more: Any) -> tuple[Tensor, list[float]]:
        module = ClipModule(rank=4, learning_rate=3e-3, num_warmup_steps=0, seed=1)
        norms = Norms()
        trainer = trainer_of(4, gradient_clip_val=clip, callbacks=[norms], **more)
        trainer.fit(module, ImageTasks(["digits", "signs"], batch_size=8, max_samples=32, seed=1))
        return vector(module.finetuned("digits")), norms.seen

    half, norms = trained(0.1, plugins=[MixedPrecision("16-mixed", "cpu")])
    whole, expected = trained(0.1)
    assert norms[:2] == pytest.approx(expected[:2], rel=0.05)
    assert (half - whole).norm() < 0.3 * whole.norm()


def test_a_scaled_loss_keeps_gradients_from_underflowing() -> None:
    weight = torch.ones((), requires_grad=True)
    loss = (weight.half() * torch.tensor(1e-4, dtype=torch.float16)).float() * 1e-4
    assert gradients_of([loss], [weight], None)[0] == 0.0
    loss = (weight.half() * torch.tensor(1e-4, dtype=torch.float16)).float() * 1e-4
    assert gradients_of([loss], [weight], 65536.0)[0].item() == pytest.approx(1e-8, rel=0.01)


def test_training_in_float16_is_refused() -> None:
    with pytest.raises(InputError, match="'16-true': the second moments of AdamW underflow"):
        trainer_of(precision="16-true").fit(ClipModule(rank=4), ImageTasks(["digits", "signs"], max_samples=8))


def test_what_bfloat16_loses_is_said(caplog: pytest.LogCaptureFixture) -> None:
    data = ImageTasks(["digits", "signs"], batch_size=4, max_samples=8)
    with caplog.at_level(logging.WARNING):
        trainer_of(1, precision="bf16-true").fit(ClipModule(rank=4), data)
    assert "a step that moves a weight by less than 1/256 of it is lost" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer_of(1, precision="bf16-mixed").fit(ClipModule(rank=4), data)
    assert "is lost" not in caplog.text


# fused attention as PEFT stores it


def of_attention(**parts: Factors) -> Adapter:
    return Adapter({f"b.attn.{name}": factors for name, factors in parts.items()}, fused_attention=("b.attn",))


def saved(adapter: Adapter, rank: int | None) -> tuple[Adapter, float]:
    with tempfile.TemporaryDirectory() as folder:
        _, error = save_fused_adapter(Path(folder), adapter, rank)
        return load_adapter(folder), error


def apart(first: Adapter, second: Adapter) -> float:
    squares = [(first.delta_weight(m).double() - second.delta_weight(m).double()).square().sum() for m in first.factors]
    return float(sum(squares) / sum(first.delta_weight(m).double().square().sum() for m in first.factors)) ** 0.5


def test_what_is_cut_off_is_of_the_weights() -> None:
    one = torch.eye(8)
    adapter = of_attention(
        q_proj=Factors(one[:1].clone(), one[:, :1].clone(), 1.0),
        out_proj=Factors(one[:3].clone(), one[:, :3].clone(), 3.0),
    )
    loaded, error = saved(adapter, 2)
    assert error == pytest.approx(0.5)
    assert apart(adapter, loaded) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("alphas", [(2.0, 1.0), (0.0, 3.0), (3.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_other_scales_come_back(alphas: tuple[float, float], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = {
        name: Factors(torch.randn(rank, 8, generator=draw).to(dtype), torch.randn(8, rank, generator=draw).to(dtype), a)
        for name, rank, a in zip(("q_proj", "v_proj"), (2, 3), alphas, strict=True)
    }
    loaded, error = saved(of_attention(**parts), None)
    assert error == 0.0
    assert apart(of_attention(**parts), loaded) < 1e-6


def test_an_attention_that_nothing_acts_on_is_written() -> None:
    zero = of_attention(q_proj=Factors(torch.ones(2, 8), torch.ones(8, 2), 0.0))
    loaded, _ = saved(zero, None)
    assert all(not loaded.delta_weight(module).any() for module in loaded.factors)
