"""Adapters inside a model: what is adapted, what trains, what switching touches, and that all comes back."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from oracles import merge_adapter
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fusionlab import adapters
from fusionlab.errors import InputError

PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return CLIPVisionModelWithProjection(config).eval()


def features(model: nn.Module) -> Tensor:
    return model(pixel_values=PIXELS).image_embeds


def perturb(model: nn.Module, task: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable_parameters(model, task):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_every_target_is_adapted_in_scope_and_counted(model: nn.Module) -> None:
    report = adapters.inject(model, ["a"], target_modules=["q_proj", "layers.1.mlp.fc1"], scope="vision_model", rank=2)
    assert report.num_adapted_layers == 3
    assert set(report.module_names) == {
        "vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.1.self_attn.q_proj",
        "vision_model.encoder.layers.1.mlp.fc1",
    }
    assert report.num_trainable == 2 * 2 * (32 + 32) + 2 * (32 + 48)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == report.num_trainable


@pytest.mark.parametrize(
    ("targets", "scope", "message"),
    [
        (["q_proj", "v_prj"], "", "'v_prj' matches no layer; did you mean 'v_proj'"),
        (["q_proj"], "vision", "no submodule 'vision'; did you mean 'vision_model'"),
        (["visual_projection"], "vision_model", "'visual_projection' matches no layer below 'vision_model'"),
        (["self_attn"], "", "'self_attn' is a CLIPAttention"),
        ([], "", "at least one name"),
        ("q_proj", "", "must be a list"),
    ],
)
def test_targets_that_match_nothing_are_refused_and_leave_the_model_alone(
    model: nn.Module, targets: list[str], scope: str, message: str
) -> None:
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=re.escape(message)):
        adapters.inject(model, ["a"], target_modules=targets, scope=scope)
    assert [name for name, _ in model.named_parameters()] == names


def test_attention_that_bypasses_its_layers_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(InputError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        adapters.inject(model, ["a"], target_modules=["out_proj"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "l_Lora"}, "unknown method 'l_Lora'; did you mean 'l_lora'"),
        ({"rank": 0}, "got rank 0"),
        ({"lora_alpha": -1.0}, "lora_alpha -1.0"),
        ({"dropout": 1.0}, "got 1.0"),
    ],
)
def test_values_out_of_range_are_refused(model: nn.Module, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        adapters.inject(model, ["a"], **values)


def test_task_names_may_hold_anything_and_come_once(model: nn.Module) -> None:
    tasks = ["sun397.v2", "train", "a b/c", "weight", "sun397%2Ev2", "ä"]
    adapters.inject(model, tasks, rank=2)
    for seed, task in enumerate(tasks):
        perturb(model, task, seed)
    outputs = []
    for task in tasks:
        adapters.activate(model, task)
        outputs.append(features(model))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == len(tasks)
    with pytest.raises(InputError, match="already has adapters named train"):
        adapters.inject(model, ["train"])
    with pytest.raises(InputError, match="each once"):
        adapters.inject(model, ["x", "x"])
    with pytest.raises(InputError, match="no adapter 'trian'; did you mean 'train'"):
        adapters.activate(model, "trian")


def test_a0_depends_on_seed_and_layer_name_alone(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    state = torch.get_rng_state()
    report = adapters.inject(model, ["a", "b"], rank=2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    more = adapters.inject(other, ["z"], rank=2, seed=7, target_modules=["v_proj", "k_proj"], method="l_lora")
    a, b, z = adapters.extract(model, "a"), adapters.extract(model, "b"), adapters.extract(other, "z")
    name = "vision_model.encoder.layers.1.self_attn.v_proj"
    assert torch.equal(a.factors[name].lora_a, b.factors[name].lora_a)
    assert torch.equal(a.factors[name].lora_a, z.factors[name].lora_a)
    assert not torch.equal(a.factors[name].lora_a, a.factors[name.replace("v_proj", "q_proj")].lora_a)
    assert report.a0_hash != more.a0_hash
    assert adapters.inject(model, ["c"], rank=2, seed=7).a0_hash == report.a0_hash
    assert adapters.inject(model, ["d"], rank=2, seed=8).a0_hash != report.a0_hash
    bound = 1 / 32**0.5  # PEFT's default: Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < a.factors[name].lora_a.abs().max() <= bound


def test_pretrained_is_bitwise_the_model_before_injection(model: nn.Module) -> None:
    before, state = features(model), {name: value.clone() for name, value in model.state_dict().items()}
    adapters.inject(model, ["a", "b"], rank=2)
    assert torch.equal(features(model), before)
    perturb(model, "a")
    adapters.activate(model, "a")
    assert not torch.equal(features(model), before)
    adapters.activate(model, None)
    assert torch.equal(features(model), before)
    assert adapters.base_state(model).keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in adapters.base_state(model).items())


@pytest.mark.parametrize(("method", "trained"), [("lora", {"lora_A", "lora_B"}), ("l_lora", {"lora_B"})])
def test_switching_never_changes_what_trains_or_mixes_gradients(
    model: nn.Module, method: str, trained: set[str]
) -> None:
    adapters.inject(model, ["a", "b"], method=method, rank=2)
    perturb(model, "a"), perturb(model, "b", 1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {part for name in parameters for part in ("lora_A", "lora_B") if part in name} == trained
    alone = {}
    for task in ("a", "b"):
        adapters.activate(model, task)
        mine = adapters.trainable_parameters(model, task)
        alone[task] = torch.autograd.grad(features(model).square().sum(), mine)
        assert all(gradient.any() for gradient in alone[task])
    for task in ("a", "b", None, "a"):
        adapters.activate(model, task)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parameters)
    for task in ("a", "b"):
        adapters.activate(model, task)
        features(model).square().sum().backward()
    for task in ("a", "b"):
        for parameter, gradient in zip(adapters.trainable_parameters(model, task), alone[task], strict=True):
            assert torch.equal(parameter.grad, gradient)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []


@pytest.mark.parametrize("method", ["lora", "l_lora"])
def test_gradient_checkpointing_recomputes_with_the_adapter_of_the_forward(model: nn.Module, method: str) -> None:
    adapters.inject(model, ["a", "b"], method=method, rank=2)
    perturb(model, "a"), perturb(model, "b", 1)
    model.train()
    adapters.activate(model, "a")
    parameters = adapters.trainable_parameters(model, "a")
    expected = torch.autograd.grad(features(model).square().sum(), parameters)
    adapters.enable_gradient_checkpointing(model)
    loss = features(model).square().sum()
    adapters.activate(model, "b")
    for gradient, plain in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, plain)
    assert adapters.active(model) == "b"


def test_gradient_checkpointing_that_cannot_keep_adapters_apart_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no gradient checkpointing that keeps adapters apart"):
        adapters.enable_gradient_checkpointing(nn.Linear(2, 2))


def test_dropout_acts_on_the_adapter_alone_and_in_training_only(model: nn.Module) -> None:
    before = features(model)
    adapters.inject(model, ["a"], method="l_lora", rank=2, dropout=0.5)
    adapters.activate(model, "a")
    assert torch.equal(features(model.train()), before)
    perturb(model, "a")
    assert not torch.equal(features(model), features(model))
    assert torch.equal(features(model.eval()), features(model))


def test_dropout_of_a_model_in_eval_mode_is_off_after_injection(model: nn.Module) -> None:
    adapters.inject(model, ["a"], rank=2, dropout=0.9)
    perturb(model, "a")
    adapters.activate(model, "a")
    assert torch.equal(features(model), features(model))


@pytest.mark.parametrize("method", ["lora", "l_lora"])
def test_an_extracted_adapter_added_to_another_copy_gives_the_same_features(model: nn.Module, method: str) -> None:
    other, pristine = copy.deepcopy(model), copy.deepcopy(model)
    adapters.inject(model, ["a"], method=method, rank=2)
    perturb(model, "a")
    adapters.activate(model, "a")
    adapter = adapters.extract(model, "a")
    with adapters.added(other, adapter):
        # float32 rounding through two layers of features of size 1
        torch.testing.assert_close(features(other), features(model), rtol=0, atol=2e-5)
        assert adapters.extract(other, "added") is adapter
    pristine.load_state_dict(merge_adapter(pristine.state_dict(), adapter))
    torch.testing.assert_close(features(pristine), features(model), rtol=0, atol=2e-5)


def test_adding_and_removing_leave_training_as_it_was(model: nn.Module) -> None:
    donor = copy.deepcopy(model)
    adapters.inject(donor, ["wide"], rank=3, target_modules=["q_proj", "fc1"])
    perturb(donor, "wide")
    wide = adapters.extract(donor, "wide")
    adapters.inject(model, ["a"], rank=2, target_modules=["q_proj"])
    perturb(model, "a")
    adapters.activate(model, "a")
    before, flags = features(model), {id(p): p.requires_grad for p in model.parameters()}
    state = torch.get_rng_state()
    adapters.add(model, "fused", wide)
    assert torch.equal(features(model), before)
    assert {id(p): p.requires_grad for p in model.parameters() if id(p) in flags} == flags
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in flags)
    adapters.activate(model, "fused")
    adapters.activate(donor, "wide")
    assert torch.equal(features(model), features(donor))
    adapters.remove(model, "fused")
    assert adapters.active(model) is None
    adapters.activate(model, "a")
    assert torch.equal(features(model), before)
    assert {id(p): p.requires_grad for p in model.parameters()} == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_adding_to_a_model_that_trains_its_own_weights_freezes_none_of_them(model: nn.Module) -> None:
    donor = copy.deepcopy(model)
    adapters.inject(donor, ["a"], rank=2)
    model.vision_model.post_layernorm.weight.requires_grad_(False)
    with adapters.added(model, adapters.extract(donor, "a")):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert {name for name in frozen if ".lora_" not in name} == {"vision_model.post_layernorm.weight"}
        assert len(frozen) == 1 + 2 * 4


def test_an_adapter_for_another_model_is_refused_by_name(model: nn.Module) -> None:
    factors = adapters.Factors(torch.ones(2, 8), torch.ones(8, 2), lora_alpha=2)
    with pytest.raises(InputError, match=r"does not have: encoder\.q_proj"):
        adapters.add(model, "x", adapters.Adapter({"encoder.q_proj": factors}))
    with pytest.raises(InputError, match=re.escape("q_proj (8, 8), the model has (32, 32)")):
        adapters.add(model, "x", adapters.Adapter({"vision_model.encoder.layers.0.self_attn.q_proj": factors}))
    with pytest.raises(InputError, match="is a LayerNorm, expected a linear layer"):
        adapters.add(model, "x", adapters.Adapter({"vision_model.post_layernorm": factors}))


def test_a_deep_copy_switches_its_own_adapters(model: nn.Module) -> None:
    adapters.inject(model, ["a"], rank=2)
    perturb(model, "a")
    other = copy.deepcopy(model)
    before = features(model)
    adapters.activate(other, "a")
    assert adapters.active(model) is None
    assert torch.equal(features(model), before)
    assert not torch.equal(features(other), before)


def test_a_half_precision_base_gets_float32_adapters(model: nn.Module) -> None:
    model = model.to(torch.bfloat16)
    adapters.inject(model, ["a"], rank=2)
    assert {parameter.dtype for parameter in adapters.trainable_parameters(model, "a")} == {torch.float32}
    adapters.activate(model, "a")
    assert model(pixel_values=PIXELS.bfloat16()).image_embeds.dtype == torch.bfloat16
