"""Tasks that go through the network as one batch are trained as if alone: gradients, draws, updates, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

import fusionlab
from fusionlab import adapters
from fusionlab.backbones import load_backbone
from fusionlab.errors import InputError
from fusionlab.modules import FusionModule
from fusionlab.modules.grouping import in_groups, losses_of, num_at_once

TASKS = ["digits", "signs", "textures"]
SEEDS = [3, 4, 5]


def fit(samples_at_once: int, **options: Any) -> dict[str, adapters.Adapter]:
    """Three steps of tiny-clip; the adapters."""
    module = fusionlab.ClipModule(
        method=options.pop("method", "lora"), rank=2, dropout=options.pop("dropout", 0.0), learning_rate=0.05,
        num_warmup_steps=1, weight_decay=0.1, samples_at_once=samples_at_once, seed=1,
    )  # fmt: skip
    data = fusionlab.ImageTasks(TASKS, batch_size=4, max_samples=10, seed=1)
    trainer = Trainer(
        accelerator="cpu", devices=1, precision="64-true", max_steps=3, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return {task: module.finetuned(task) for task in TASKS}


def largest_difference(ours: dict[str, adapters.Adapter], theirs: dict[str, adapters.Adapter]) -> float:
    """Of any factor, relative to its size."""
    differences = [
        ((mine - other).norm() / other.norm()).item()
        for task, adapter in theirs.items()
        for module, factors in adapter.factors.items()
        for mine, other in (
            (ours[task].factors[module].lora_a, factors.lora_a),
            (ours[task].factors[module].lora_b, factors.lora_b),
        )
    ]
    assert not any(map(math.isnan, differences))
    return max(differences)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.3, "gradient_clip_val": 0.05}, {"method": "l_lora", "accumulate_grad_batches": 2}],
    ids=["lora with dropout, clipped", "l_lora, accumulated"],
)
def test_adapters_come_out_as_if_trained_one_after_another(options: dict[str, Any]) -> None:
    assert largest_difference(fit(8, **options), fit(0, **options)) < 1e-10  # two tasks and one


class Case:
    """A module with three trained tasks in float64, and ragged micro-batches of them."""

    def __init__(self, kind: str, dropout: float, sizes: Sequence[int] = (4, 3, 1)) -> None:
        self.module: Any = _module(kind, dropout)
        for seed, task in enumerate(TASKS):
            generator = torch.Generator().manual_seed(seed)
            for parameter in self.module.task_parameters[task]:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        generator = torch.Generator().manual_seed(9)
        size = self.module.backbone.image_size
        self.parts = {
            task: {
                "images": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
                "labels": torch.randint(0, 3, (count,), generator=generator),
                "index": torch.arange(count),
            }
            for task, count in zip(TASKS, sizes, strict=True)
        }

    def gradients(self, groups: Sequence[Sequence[str]]) -> dict[str, list[Tensor]]:
        """By task, where the tasks of each group go together; another adapter is active at the backward."""
        found = {}
        for tasks in groups:
            parts = {task: self.parts[task] for task in tasks}
            losses = losses_of(self.module, parts, [SEEDS[TASKS.index(task)] for task in tasks])
            self.module.activate(TASKS[0])
            wanted = [parameter for task in tasks for parameter in self.module.task_parameters[task]]
            every = iter(torch.autograd.grad(list(losses.values()), wanted))
            found |= {task: [next(every) for _ in self.module.task_parameters[task]] for task in tasks}
        return found

    def assert_as_alone(self, tasks: Sequence[str] = TASKS) -> None:
        alone, together = self.gradients([[task] for task in tasks]), self.gradients([tasks])
        for task in tasks:
            assert all(gradient.any() for gradient in alone[task])
            for gradient, expected in zip(together[task], alone[task], strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def _module(kind: str, dropout: float) -> Any:
    from transformers import ViTConfig, ViTModel

    from fusionlab.backbones.vit import ViTBackbone

    if kind == "clip":
        module: Any = fusionlab.ClipModule(load_backbone("tiny-clip"), rank=2, dropout=dropout)
        module.heads = {task: F.normalize(torch.eye(3, 128), dim=-1).double() for task in TASKS}
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        noisy = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
        network = ViTModel(ViTConfig(**shape, **noisy, image_size=16, patch_size=8), add_pooling_layer=False)
        module = fusionlab.ViTModule(ViTBackbone(network, name="random"), rank=2, dropout=dropout)
    FusionModule.add_adapters(module, TASKS)
    if kind == "vit":
        for task in TASKS:
            module.task_parameters[task] += module.add_head(task, 3)
    return module.double().train()


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_ragged_and_absent_tasks_change_nothing_for_the_others(kind: str) -> None:
    """The ViT's own dropout, in layers and attention, draws for each task what it draws for it alone too."""
    case = Case(kind, dropout=0.4)
    case.assert_as_alone()
    case.assert_as_alone(TASKS[1:])
    before = case.gradients([TASKS])["digits"]
    case.parts["signs"]["images"] = 255 - case.parts["signs"]["images"]
    assert all(torch.equal(*pair) for pair in zip(case.gradients([TASKS])["digits"], before, strict=True))


def test_recomputed_layers_meet_the_same_adapters_and_draws() -> None:
    case = Case("clip", dropout=0.4)
    expected = case.gradients([[task] for task in TASKS])
    adapters.enable_gradient_checkpointing(case.module.base_model)
    ran: list[int] = []
    layer = case.module.base_model.vision_model.encoder.layers[0].mlp.fc1
    layer.register_forward_hook(lambda *_: ran.append(1))
    found = case.gradients([TASKS])
    assert len(ran) == 2  # once more in the backward
    for task in TASKS:
        for gradient, alone in zip(found[task], expected[task], strict=True):
            torch.testing.assert_close(gradient, alone, rtol=1e-9, atol=1e-12)


def test_half_precision_rounds_no_more_than_one_after_another() -> None:
    case = Case("clip", dropout=0.0)
    case.module.float()
    exact = case.gradients([TASKS])
    with torch.autocast("cpu", torch.bfloat16):
        together, alone = case.gradients([TASKS]), case.gradients([[task] for task in TASKS])
    for task in TASKS:
        wanted, ours, theirs = (torch.cat([part.flatten() for part in of[task]]) for of in (exact, together, alone))
        error = (theirs - wanted).norm()
        assert 0 < (ours - wanted).norm() < 1.5 * error < wanted.norm()


def test_the_network_runs_once_for_a_group() -> None:
    case, ran = Case("clip", dropout=0.0), []
    case.module.base_model.vision_model.register_forward_hook(lambda *_: ran.append(1))
    case.gradients([TASKS[:2], TASKS[2:]])
    assert len(ran) == 2


def test_after_a_group_one_task_acts_again() -> None:
    case = Case("clip", dropout=0.0)
    alone = case.gradients([["textures"]])
    case.gradients([TASKS])
    assert adapters.active(case.module.base_model) == "digits"
    again = case.gradients([["textures"]])
    assert all(torch.equal(*pair) for pair in zip(again["textures"], alone["textures"], strict=True))


def test_what_cannot_go_together_is_said() -> None:
    module = fusionlab.ClipModule(method="full", samples_at_once=64)
    with pytest.raises(InputError, match=r"samples_at_once 64.*method 'full' has no adapters that act layer by layer"):
        num_at_once(module)
    module.samples_at_once = "auto"
    assert num_at_once(module) == 0
    module = fusionlab.ClipModule(samples_at_once="auto")
    module.add_adapters(TASKS)
    assert num_at_once(module) == 128
    assert fusionlab.ClipModule().to("meta").samples_by_default == 0
    module.base_model.extra = nn.BatchNorm2d(3)
    module.samples_at_once = 2
    with pytest.raises(InputError, match="extra takes statistics over the batch"):
        num_at_once(module)
    with pytest.raises(InputError, match="at least 0, got -1"):
        fusionlab.ClipModule(samples_at_once=-1)


def test_groups_are_even_and_within_the_budget() -> None:
    sizes = dict(zip("abcdefg", [32] * 7, strict=True))
    assert list(map(len, in_groups(sizes, 128))) == [4, 3]
    assert list(map(len, in_groups(sizes, 96))) == [3, 2, 2]
    assert list(map(len, in_groups(sizes | {"a": 64}, 128))) == [2, 2, 2, 1]
    assert list(map(len, in_groups(sizes, 0))) == [1] * 7
    assert in_groups(sizes, 224) == [list("abcdefg")]
