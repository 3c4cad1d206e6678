"""Tensors beside the fused ones: copied to the bit where nothing changes them, averaged, ignored, or named.

Real models of transformers' own classes, saved by them, with what older and newer versions keep beside the parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionlab.__main__ import main

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = TEXT | {"vocab_size": 40, "num_key_value_heads": 2}
IMAGE = TEXT | {"image_size": 8, "patch_size": 4}
RULES: dict[str, tuple[str, ...]] = {
    "average": ("average",),
    "metagpt": ("metagpt",),
    "ties": ("ties", "--rule.density", "0.5"),
    "dare": ("dare", "--rule.rule", "average"),
    "tsv_m": ("tsv_m",),
    "iso_c": ("iso_c",),
    "slerp": ("slerp",),
    "karcher": ("karcher",),
    "nuslerp": ("nuslerp",),
    "model_stock": ("model_stock",),
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def save(model: Any, folder: Path, more: dict[str, Tensor] | None = None, without: tuple[str, ...] = ()) -> Path:
    """As transformers writes it, with some tensors more and some less."""
    model.save_pretrained(folder)
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if name not in without}
    save_file(state | (more or {}), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(folder: Path, *flags: str, tasks: str = "ab", output: str = "out") -> dict[str, Any]:
    inputs = [part for task in tasks for part in (f"--finetuned.{task}", str(folder / task))]
    assert main(["fuse", "--base", str(folder / "base"), *inputs, "--output", str(folder / output), *flags]) == 0
    return json.loads((folder / output / "fusion.json").read_text())


def fused(folder: Path, output: str = "out") -> dict[str, Tensor]:
    return load_file(folder / output / "model.safetensors")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def three(make: Callable[[], Any], folder: Path, more: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Base, a and b of one class with weights of their own, all with the same tensors beside them."""
    torch.manual_seed(0)
    models = {name: make() for name in ("base", "a", "b")}
    for name, model in models.items():
        save(model, folder / name, more)
    return models


def masks() -> dict[str, Tensor]:
    nan = torch.full((3, 4), math.nan)
    nan[0] = torch.tensor([1.0, -2.5, 0.0, 7.0])
    return {
        "model.causal": torch.full((6, 6), -math.inf).triu(1),
        "model.half": torch.full((1, 1, 4, 4), -math.inf, dtype=torch.float16).triu(1),
        "model.brain": torch.full((5,), math.inf, dtype=torch.bfloat16),
        "model.nan": nan,
        "model.payload": torch.tensor([0x7FC12345, 0x3F800001], dtype=torch.int32).view(torch.float32),
        "model.lowest": torch.full((2, 2), torch.finfo(torch.float32).min),
        "model.flags": torch.tensor([True, False]),
        "model.long": torch.full((40_000,), -math.inf),  # more than one cut
    }


@pytest.mark.parametrize("rule", RULES)
def test_what_nothing_changes_is_copied_bit_for_bit(rule: str, tmp_path: Path) -> None:
    beside = masks()
    three(llama, tmp_path / "with", beside)
    three(llama, tmp_path / "without")
    record = run(tmp_path / "with", "--rule", *RULES[rule])
    plain = run(tmp_path / "without", "--rule", *RULES[rule])
    found = fused(tmp_path / "with")
    for name, value in beside.items():
        assert torch.equal(bits(found.pop(name)), bits(value)), name
    expected = fused(tmp_path / "without")
    assert found.keys() == expected.keys()
    if rule != "ties":  # its threshold counts zeros too
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
        assert record["norms"] == pytest.approx(plain["norms"], rel=1e-12)


@pytest.mark.parametrize("rule", ["average", "ties", "karcher", "tsv_m", "model_stock", "nuslerp", "slerp"])
def test_frozen_parameters_are_copied_bit_for_bit(rule: str, tmp_path: Path) -> None:
    """What no model trained stays what it is, also under rules that work on the weights and round."""
    torch.manual_seed(0)
    models = {name: llama() for name in ("base", "a", "b")}
    frozen = [name for name, _ in models["base"].named_parameters() if "layers.0" in name or "embed" in name]
    for model in models.values():
        model.load_state_dict(
            models["base"].state_dict() | {k: v for k, v in model.state_dict().items() if k not in frozen}
        )
    for name, model in models.items():
        save(model, tmp_path / name)
    run(tmp_path, "--rule", *RULES[rule])
    before, after = fused(tmp_path, "base"), fused(tmp_path)
    assert all(torch.equal(bits(after[name]), bits(before[name])) for name in frozen)
    assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m["a"]["model.causal"].fill_(0.0), "model.causal of the base has NaN or Inf"),
        (lambda m: m["a"]["model.causal"].neg_(), "model.causal"),
        (lambda m: m["b"]["model.nan"].zero_(), "model.nan"),
        (lambda m: m["b"]["model.norm.weight"].fill_(math.inf), "model.norm.weight of 'b' has NaN or Inf"),
        (lambda m: m["base"]["model.norm.weight"].fill_(math.nan), "model.norm.weight of the base has NaN or Inf"),
    ],
    ids=["other mask", "other sign", "NaN in one", "Inf in an input", "NaN in the base"],
)
@pytest.mark.parametrize("rule", ["metagpt", "tsv_m", "karcher"])
def test_what_is_not_finite_and_differs_is_named(
    rule: str, spoil: Callable[[Any], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three(llama, tmp_path, masks())
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in ("base", "a", "b")}
    spoil(states)
    for name, state in states.items():
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    inputs = [part for task in "ab" for part in (f"--finetuned.{task}", str(tmp_path / task))]
    flags = ["--base", str(tmp_path / "base"), *inputs, "--output", str(tmp_path / "out"), "--rule", rule]
    assert main(["fuse", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def resnet() -> Any:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**config))


def regnet() -> Any:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 8, "num_labels": 3}
    return transformers.RegNetForImageClassification(transformers.RegNetConfig(**config))


def mobilenet() -> Any:
    return transformers.MobileNetV1ForImageClassification(
        transformers.MobileNetV1Config(image_size=32, depth_multiplier=0.25, min_depth=8, num_labels=3)
    )


def levit() -> Any:
    config = {"image_size": 32, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
    return transformers.LevitForImageClassification(transformers.LevitConfig(**config, key_dim=[8, 8, 8], num_labels=3))


CONVOLUTIONAL = {"resnet": resnet, "regnet": regnet, "mobilenet": mobilenet, "levit": levit}


def seen(make: Callable[[], Any], steps: int) -> Any:
    """A model whose running statistics come from random images, as many steps as its counters say."""
    model = make().train()
    with torch.no_grad():
        for _ in range(steps):
            model(pixel_values=1 + 2 * torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("rule", ["average", "metagpt", "ties", "dare", "tsv_m"])
@pytest.mark.parametrize("case", CONVOLUTIONAL)
def test_running_statistics_are_averaged_whatever_the_rule(case: str, rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {name: seen(CONVOLUTIONAL[case], steps) for steps, name in enumerate(("base", "a", "b"), start=1)}
    states = {name: model.state_dict() for name, model in models.items()}
    for name, model in models.items():
        save(model, tmp_path / name)
    record = run(tmp_path, "--rule", *RULES[rule])
    loaded = type(models["base"]).from_pretrained(tmp_path / "out").eval()
    after = loaded.state_dict()
    statistics = [name for name in after if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) > 3
    for name in statistics:
        torch.testing.assert_close(after[name], (states["a"][name] + states["b"][name]) / 2, rtol=1e-6, atol=1e-6)
        assert name.endswith("mean") or (after[name] > 0).all()
    counters = [name for name in after if name.endswith("num_batches_tracked")]
    assert all(torch.equal(after[name], states["base"][name]) for name in counters)
    assert len(record["tensors"]["averaged"]) == len(statistics)
    parameters = [name for name, _ in models["base"].named_parameters()]
    squares = [(states["a"][name] - states["base"][name]).double().square().sum() for name in parameters]
    assert record["norms"]["a"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)
    with torch.no_grad():
        assert loaded(pixel_values=torch.randn(2, 3, 32, 32)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_norms_in_float32_of_a_model_in_bfloat16(dtype: str | None, tmp_path: Path) -> None:
    """Every tensor keeps the dtype that the base stores it in, unless one is asked for; τ is taken in float32."""
    models = three(llama, tmp_path)
    states = {}
    for name, model in models.items():
        state = {key: value.bfloat16() for key, value in model.state_dict().items()}
        wide = {key: model.state_dict()[key] for key in state if "norm" in key}
        states[name] = state | (wide if name != "b" else {})
        save_file(states[name], tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    run(tmp_path, "--rule", "average", *(("--dtype", dtype) if dtype else ()))
    for name, value in fused(tmp_path).items():
        assert value.dtype == (states["base"][name].dtype if dtype is None else getattr(torch, dtype))
        mean = (states["a"][name].float() + states["b"][name].float()) / 2
        torch.testing.assert_close(value.float(), mean.to(value.dtype).float(), rtol=1e-2, atol=1e-6)
