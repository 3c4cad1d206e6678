"""A fused adapter is one function to PEFT, to an engine that knows no patterns, and to fusionlab."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter
from fusionlab.backbones import OpenClipBackbone, load_backbone
from fusionlab.fusion.folders import save_fused
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules import TaskArithmetic

LAMBDAS = {"a": 0.7, "b": -0.4, "c": 1.1}
PREFIX = "base_model.model."


@cache
def stock() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def perturbed(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def by_peft(folder: Path, *configs: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    for seed, (task, config) in enumerate(zip(LAMBDAS, configs, strict=False)):
        peft_model = get_peft_model(copy.deepcopy(stock()), LoraConfig(**({"target_modules": ["q_proj"]} | config)))
        perturbed(peft_model, seed)
        peft_model.to(dtype).save_pretrained(folder / task)


def by_fusionlab(folder: Path, **settings: Any) -> None:
    """Adapters from one seeded start, B and what else is trained moved."""
    model = copy.deepcopy(stock())
    settings = {"rank": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]} | settings
    adapters.inject(model, list(LAMBDAS), **settings)
    perturbed(model, 7)
    for task in LAMBDAS:
        adapters.save_adapter(folder / task, adapters.extract(model, task))


MAKERS: dict[str, Callable[[Path], None]] = {
    "one rank, trained A": lambda folder: by_peft(folder, *[{"r": 2, "lora_alpha": 3}] * 3),
    "ranks, alphas and rsLoRA differ": lambda folder: by_peft(
        folder, {"r": 2, "lora_alpha": 3}, {"r": 4, "lora_alpha": 7, "use_rslora": True}, {"r": 1, "lora_alpha": 0.3}
    ),
    "patterns": lambda folder: by_peft(
        folder,
        {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"r": 3, "lora_alpha": 1, "target_modules": ["q_proj", "up_proj"]},
    ),
    "modules differ": lambda folder: by_peft(
        folder, {"target_modules": ["q_proj"], "r": 2}, {"target_modules": ["v_proj", "down_proj"], "r": 3}
    ),
    "bfloat16": lambda folder: by_peft(folder, *[{"r": 2, "lora_alpha": 3}] * 2, dtype=torch.bfloat16),
    "lora of one start": lambda folder: by_fusionlab(folder, method="lora"),
    "l_lora": lambda folder: by_fusionlab(folder, method="l_lora"),
}


def dense(adapter: Adapter, module: str) -> Tensor:
    """τ from the definitions, float64."""
    f = adapter.factors[module]
    s = f.lora_alpha / (f.lora_a.shape[0] ** (0.5 if f.use_rslora else 1))
    a, b = f.lora_a.double(), f.lora_b.double()
    return s * b @ a


def weighted_sum(inputs: dict[str, Adapter]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for task, adapter in inputs.items():
        for module in adapter.factors:
            total[module] = total.get(module, 0) + LAMBDAS[task] * dense(adapter, module)
    return total


def served(folder: Path) -> dict[str, Tensor]:
    """What an engine adds to each weight: ranks from shapes, lora_alpha / r from the top level, no patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, lora_a in tensors.items():
        if name.endswith(".lora_A.weight"):
            lora_b = tensors[name.replace(".lora_A.", ".lora_B.")]
            assert lora_b.shape[1] == lora_a.shape[0] <= config["r"]  # an engine allots r
            scaling = config["lora_alpha"] / config["r"]
            found[name.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = (
                scaling * lora_b.double() @ lora_a.double()
            )
    return found


def by_stock_peft(folder: Path, base: nn.Module) -> dict[str, Tensor]:
    peft_model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    layers = {name: layer for name, layer in peft_model.named_modules() if isinstance(layer, LoraLayer)}
    assert all(layer.scaling["default"] == 1 for layer in layers.values())
    return {name.removeprefix(PREFIX): layer.get_delta_weight("default") for name, layer in layers.items()}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all modules."""
    assert got.keys() == expected.keys()
    squares = sum((got[module].double() - expected[module]).square().sum() for module in expected)
    return float((squares / sum(value.square().sum() for value in expected.values())) ** 0.5)


def fuse(folder: Path, *flags: str) -> dict[str, Any]:
    tasks = [task for task in LAMBDAS if (folder / task).is_dir()]
    coefficients = json.dumps({task: LAMBDAS[task] for task in tasks})
    inputs = [f"--finetuned.{task}={folder / task}" for task in tasks]
    rule = ["--rule", "task_arithmetic", "--rule.scaling_coefficient", coefficients]
    assert main(["fuse", "--base", str(folder / "base"), *inputs, *rule, "--output", str(folder / "out"), *flags]) == 0
    return json.loads((folder / "out" / "fusion.json").read_text())


@pytest.mark.parametrize("rank", [None, 16, 2], ids=["as it comes", "padded", "cut"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_fused_adapter_is_one_function_to_every_reader(kind: str, rank: int | None, tmp_path: Path, capsys) -> None:
    stock().save_pretrained(tmp_path / "base")
    MAKERS[kind](tmp_path)
    record = fuse(tmp_path, *([] if rank is None else ["--rank", str(rank)]))
    printed = capsys.readouterr().out
    inputs = {task: adapters.load_adapter(tmp_path / task) for task in LAMBDAS if (tmp_path / task).is_dir()}
    expected = weighted_sum(inputs)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    ours = served(tmp_path / "out")
    error = distance(ours, expected)
    loaded = adapters.load_adapter(tmp_path / "out")
    for other in (by_stock_peft(tmp_path / "out", stock()), {name: dense(loaded, name) for name in loaded.factors}):
        assert distance(other, ours) < 1e-6
    if rank is not None:
        shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "out/adapter_model.safetensors").items()}
        assert {shape[0] if ".lora_A." in name else shape[1] for name, shape in shapes.items()} == {rank}
        assert (config["r"], config["rank_pattern"], record["rank"]) == (rank, {}, rank)
        assert f"relative truncation error {record['truncation_error']:.3g}" in printed
    tails = [torch.linalg.svdvals(value)[rank or 16 :].square().sum() for value in expected.values()]
    best = float((sum(tails) / sum(value.square().sum() for value in expected.values())) ** 0.5)
    assert error < best + 1e-6
    if rank == 2:
        assert record["truncation_error"] == pytest.approx(best, abs=1e-6)
        assert error == pytest.approx(best, abs=1e-6)
    elif rank is not None:
        assert record["truncation_error"] == 0


@pytest.mark.parametrize("rank", [None, 18])
@pytest.mark.parametrize("method", ["lora", "l_lora"])
def test_fusionlab_reads_its_own_fused_adapter_back_whole(method: str, rank: int | None, tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path / "base")
    by_fusionlab(tmp_path, method=method)
    fuse(tmp_path, *([] if rank is None else ["--rank", str(rank)]))
    inputs = {task: adapters.load_adapter(tmp_path / task) for task in LAMBDAS}
    first, fused = inputs["a"], adapters.combine(inputs, {"*": LAMBDAS})
    back = adapters.load_adapter(tmp_path / "out")
    assert (back.method, back.a0_hash, back.seed) == (fused.method, fused.a0_hash, fused.seed)
    for module, factors in fused.factors.items():
        for part in ("lora_a", "lora_b"):
            assert torch.equal(getattr(back.factors[module], part), getattr(factors, part))
        assert back.factors[module].scaling == pytest.approx(factors.scaling)
    if method == "l_lora":  # the rank of one, from one start, of which the hash is known
        assert back.a0_hash == first.a0_hash != ""
        assert back.ranks == first.ranks
        starts = {name: (f.lora_a, None) for name, f in back.factors.items()}
        assert adapters.hash_initial(starts) == back.a0_hash
    again = adapters.combine({"x": back, "y": inputs["b"]}, {"*": {"x": 1.0, "y": 0.5}})
    for module in again.factors:
        expected = dense(back, module) + 0.5 * dense(inputs["b"], module)
        torch.testing.assert_close(dense(again, module), expected, rtol=1e-5, atol=1e-6)


def test_one_task_alone_keeps_its_lora_alpha_until_it_is_fused(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path / "base")
    by_fusionlab(tmp_path, method="lora")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 5, {}, {})
    for task in "bc":
        (tmp_path / task).rename(tmp_path / f"not-{task}")
    for scaling_coefficient in (1.0, 0.5):
        LAMBDAS_ONE = {"a": scaling_coefficient}
        adapter = adapters.load_adapter(tmp_path / "a")
        fused = adapters.combine({"a": adapter}, {"*": LAMBDAS_ONE})
        adapters.save_fused_adapter(tmp_path / f"{scaling_coefficient}", fused)
        expected = {module: scaling_coefficient * dense(adapter, module) for module in adapter.factors}
        assert distance(served(tmp_path / f"{scaling_coefficient}"), expected) < 1e-6


@pytest.mark.parametrize("method", ["lora", "l_lora", "tangent_lora"])
def test_a_run_writes_its_fused_adapters_so_too(method: str, tmp_path: Path) -> None:
    backbone = load_backbone("tiny-clip")
    base = {name: tensor.clone() for name, tensor in adapters.base_state(backbone.model).items()}
    adapters.inject(
        backbone.model, list(LAMBDAS), method=method, rank=3, lora_alpha=5, target_modules=["q_proj", "v_proj"],
        scope="vision_model",
    )  # fmt: skip
    perturbed(backbone.model, 3)
    inputs = {task: adapters.extract(backbone.model, task) for task in LAMBDAS}
    fused = fuse_weights(TaskArithmetic(LAMBDAS), base, inputs)
    save_fused(tmp_path / "fused", fused, backbone, {"model": "fused"})
    assert distance(served(tmp_path / "fused"), weighted_sum(inputs)) < 1e-6
    back = adapters.load_adapter(tmp_path / "fused")
    assert back.method == method
    assert set(back.ranks.values()) == ({9} if method == "lora" else {3})
    for module, factors in fused.weights.factors.items():  # what was scored is what is saved
        assert torch.equal(back.factors[module].lora_b, factors.lora_b)
        assert back.factors[module].scaling == factors.scaling


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("rank", [None, 12, 3], ids=["as it comes", "padded", "cut"])
@pytest.mark.parametrize("method", ["lora", "l_lora"])
def test_fused_attention_is_written_so_too(
    method: str, rank: int | None, open_clip_folder: Path, tmp_path: Path
) -> None:
    backbone = OpenClipBackbone.load(str(open_clip_folder), name="mine")
    adapters.inject(
        backbone.model, ["a", "b"], method=method, rank=2, lora_alpha=5,
        target_modules=["q_proj", "v_proj", "c_fc"], scope="visual",
    )  # fmt: skip
    perturbed(backbone.model, 3)
    inputs = {task: adapters.extract(backbone.model, task) for task in ("a", "b")}
    fused = adapters.combine(inputs, {"*": {"a": 0.7, "b": -0.4}})
    ranks, error = adapters.save_fused_adapter(tmp_path / "out", fused, rank)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert rank is None or set(ranks.values()) == {rank}
    back = adapters.load_adapter(tmp_path / "out")
    assert set(back.factors) == set(fused.factors)
    expected = {module: dense(fused, module) for module in fused.factors}
    got = distance({module: dense(back, module) for module in back.factors}, expected)
    assert got == pytest.approx(error, abs=1e-6)
    assert (error > 0) == (rank == 3)
    if rank != 3:
        assert (back.method, back.a0_hash, back.ranks) == (fused.method, fused.a0_hash, fused.ranks)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}", force_quick_gelu=False)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = PeftModel.from_pretrained(model, tmp_path / "out").eval().encode_image(images)
    with adapters.added(backbone.model, replace(back, method="lora")):
        torch.testing.assert_close(backbone.model.encode_image(images), features, rtol=0, atol=1e-5)
