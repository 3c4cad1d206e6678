"""Adapters in and out of stock PEFT: the same function both ways, and what is no low-rank sum refused by name."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fusionlab import adapters
from fusionlab.errors import InputError

# PEFT asks transformers for a property under its old name, and before 0.21 for the vocabulary of models without a name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

TOKENS = torch.arange(2, 14).view(2, 6)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def clip() -> nn.Module:
    text = TOWER | {"vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER | {"image_size": 16, "patch_size": 8}))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**TOWER, image_size=16, patch_size=8, num_labels=3))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=40, decoder_start_token_id=0)
    )


def output(model: nn.Module) -> Tensor:
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "clip":
            return model(input_ids=TOKENS, pixel_values=PIXELS).logits_per_image
        if kind == "vit":
            return model(pixel_values=PIXELS).logits
        return model(input_ids=TOKENS, labels=TOKENS).logits


MODELS = {
    "clip": (clip, ["q_proj", "v_proj"], "vision_model"),
    "vit": (vit, ["q_proj", "v_proj"], ""),
    "t5": (t5, ["q", "v"], ""),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def perturb(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def train_with_peft(model: nn.Module, folder: Path, config: LoraConfig) -> PeftModel:
    peft_model = get_peft_model(model, config).eval()
    perturb([parameter for name, parameter in peft_model.named_parameters() if ".lora_" in name])
    peft_model.save_pretrained(folder)
    return peft_model


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["lora", "l_lora"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_stock_peft_reads_what_is_written_here_as_the_same_function(tmp_path: Path, kind: str, method: str) -> None:
    model, (_, targets, scope) = build(kind), MODELS[kind]
    base, pretrained = copy.deepcopy(model), output(model)
    report = adapters.inject(
        model,
        ["a.b"],
        method=method,
        rank=2,
        lora_alpha=3,
        target_modules=targets,
        scope=scope,
        base_model_name="some/base",
    )
    perturb(adapters.trainable_parameters(model, "a.b"))
    adapters.activate(model, "a.b")
    adapter = adapters.extract(model, "a.b")
    adapters.save_adapter(tmp_path, adapter)

    peft_model = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(output(peft_model), output(model), rtol=0, atol=1e-5)
    assert (output(model) - pretrained).abs().max() > 1e-2
    layers = [name for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)]
    assert [name.removeprefix("base_model.model.") for name in layers] == list(report.module_names)
    config = peft_model.peft_config["default"]
    assert config.base_model_name_or_path == "some/base"
    assert (config.r, config.lora_alpha) == (2, 3)

    back = adapters.load_adapter(tmp_path)
    assert (back.method, back.a0_hash, back.seed) == (method, report.a0_hash, 0)
    for module, factors in adapter.factors.items():
        for part in ("lora_a", "lora_b"):
            assert torch.equal(getattr(back.factors[module], part), getattr(factors, part))
        assert torch.equal(back.delta_weight(module), adapter.delta_weight(module))


STOCK = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 5,
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
    },
    "regex patterns": {"r": 2, "rank_pattern": {r".*vision.*\.0\..*v_proj": 3, "^text_model.*q_proj": 1}},
    "rslora and patterns": {"r": 2, "use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 1}},
    "some layers": {"r": 2, "layers_to_transform": [1], "layers_pattern": "layers"},
    "other init": {"r": 2, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"r": 2, "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", list(STOCK))
def test_adapters_of_stock_peft_load_score_and_go_back(tmp_path: Path, name: str) -> None:
    base, copy_of_base, third = build("clip"), build("clip"), build("clip")
    peft_model = train_with_peft(base, tmp_path / "in", LoraConfig(target_modules=["q_proj", "v_proj"], **STOCK[name]))
    adapter = adapters.load_adapter(tmp_path / "in")
    layers = {n.removeprefix("base_model.model."): m for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)}
    assert set(adapter.factors) == set(layers)
    for module, layer in layers.items():
        torch.testing.assert_close(
            adapter.delta_weight(module), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7
        )
    with adapters.added(copy_of_base, adapter):
        assert torch.equal(output(copy_of_base), output(peft_model))
    adapters.save_adapter(tmp_path / "out", adapter)
    again = PeftModel.from_pretrained(third, tmp_path / "out")
    assert torch.equal(output(again), output(peft_model))
    assert again.peft_config["default"].lora_dropout == STOCK[name].get("lora_dropout", 0.0)


def test_fusing_stock_adapters_is_peft_s_exact_combination(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"]
    configs = {
        "first": LoraConfig(r=2, lora_alpha=3, target_modules=targets),
        "second": LoraConfig(r=3, lora_alpha=4, use_rslora=True, target_modules=targets),
    }
    peft_model = get_peft_model(build("clip"), configs["first"], adapter_name="first").eval()
    peft_model.add_adapter("second", configs["second"])
    perturb([parameter for name, parameter in peft_model.named_parameters() if ".lora_" in name])
    peft_model.save_pretrained(tmp_path)
    loaded = {task: adapters.load_adapter(tmp_path / task) for task in configs}
    fused = adapters.combine(loaded, {"*": {"first": 0.7, "second": 0.4}})
    peft_model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type="cat")
    for name, layer in peft_model.named_modules():
        if isinstance(layer, LoraLayer):
            expected = layer.get_delta_weight("both")
            got = fused.delta_weight(name.removeprefix("base_model.model."))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    adapters.save_adapter(tmp_path / "fused", fused)
    peft_model.set_adapter("both")
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(build("clip"), tmp_path / "fused")), output(peft_model), rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # PEFT's own conversion warns
def test_pissa_converted_by_peft_is_an_ordinary_adapter_and_unconverted_is_refused(tmp_path: Path) -> None:
    pissa = get_peft_model(build("clip"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")).eval()
    pissa.save_pretrained(tmp_path / "initial")
    rewrite(tmp_path / "initial", lambda config: config.update(init_lora_weights=True))
    perturb([parameter for name, parameter in pissa.named_parameters() if ".lora_" in name])
    expected = output(pissa)
    pissa.save_pretrained(tmp_path / "raw")
    with pytest.raises(InputError, match="init_lora_weights='pissa', which changed the base weights"):
        adapters.load_adapter(tmp_path / "raw")
    pissa.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    adapter = adapters.load_adapter(tmp_path / "converted")
    model = build("clip")
    with adapters.added(model, adapter):
        torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)


REFUSED = {
    "use_dora": (LoraConfig(use_dora=True, target_modules=["q_proj"]), "use_dora=True: DoRA rescales"),
    "lora_bias": (LoraConfig(lora_bias=True, target_modules=["q_proj"]), "lora_bias=True: biases inside the adapter"),
    "bias": (LoraConfig(bias="all", target_modules=["q_proj"]), "bias='all': biases are trained too"),
    "modules": (LoraConfig(modules_to_save=["visual_projection"], target_modules=["q_proj"]), "modules_to_save="),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "PEFT type 'IA3'; expected LORA"),
    "loha": (LoHaConfig(target_modules=["q_proj"]), "PEFT type 'LOHA'"),
    "vera": (VeraConfig(target_modules=["q_proj"]), "PEFT type 'VERA'"),
    "parameters": (LoraConfig(target_parameters=["fc1.weight"], target_modules=["q_proj"]), "target_parameters="),
    "replication": (LoraConfig(target_modules=["q_proj"]), "layer_replication=[[0, 1]]: layers are repeated"),
    "unknown": (LoraConfig(target_modules=["q_proj"]), "use_newlora=True: this setting is not known here"),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor:UserWarning")  # PEFT about its own lora_bias
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_low_rank_sum_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config, message = REFUSED[name]
    get_peft_model(build("clip"), copy.deepcopy(config)).save_pretrained(tmp_path)
    extra = {"replication": {"layer_replication": [[0, 1]]}, "unknown": {"use_newlora": True}}.get(name, {})
    rewrite(tmp_path, lambda config: config.update(extra))
    with pytest.raises(InputError, match=re.escape(message)):
        adapters.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("lora_magnitude_vector.weight", "DoRA's magnitudes beside lora_A and lora_B"),
        ("lora_B.bias", "trained biases beside"),
        ("lora_embedding_A", "LoRA on an embedding beside"),
        ("strange.weight", "has tensors beside lora_A and lora_B"),
    ],
)
def test_tensors_that_the_configuration_hides_are_refused(tmp_path: Path, extra: str, message: str) -> None:
    get_peft_model(build("clip"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"
    save_file(load_file(path) | {f"{name}.{extra}": torch.ones(32)}, path)
    with pytest.raises(InputError, match=re.escape(message)):
        adapters.load_adapter(tmp_path)


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config\.json in"):
        adapters.load_adapter(tmp_path)
    get_peft_model(build("clip"), LoraConfig(r=8, target_modules=["q_proj"])).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    rewrite(tmp_path, lambda config: config.update(r=4))
    with pytest.raises(InputError, match=r"says rank 4, the factors have \(8, 32\) and \(32, 8\)"):
        adapters.load_adapter(tmp_path)
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "lora_B" not in name}, weights)
    with pytest.raises(InputError, match=re.escape("expected matrices lora_A and lora_B, got {'A'")):
        adapters.load_adapter(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        adapters.load_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="has neither adapter_model"):
        adapters.load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        adapters.load_adapter(tmp_path)


def test_pickled_adapters_of_older_peft_load(tmp_path: Path) -> None:
    peft_model = train_with_peft(build("clip"), tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    model = build("clip")
    with adapters.added(model, adapters.load_adapter(tmp_path)):
        assert torch.equal(output(model), output(peft_model))


@pytest.mark.parametrize("names", [".default.weight", ".weight"])
def test_published_l_lora_adapters_use_their_stored_initial_values(tmp_path: Path, names: str) -> None:
    """Layers wrapped once more, factors among positional initial values, A drifted by weight decay."""
    model = build("clip")
    modules = adapters.match_targets(model, ["q_proj"], "vision_model")
    generator, tensors, expected = torch.Generator().manual_seed(0), {}, {}
    for module in modules:
        layer = model.get_submodule(module)
        lora_a0, lora_b = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
        name = f"base_model.model.{module}"
        tensors[f"{name}.model.lora_A{names}"], tensors[f"{name}.model.lora_B{names}"] = lora_a0 * 0.9, lora_b
        initial = [layer.weight, layer.bias, lora_a0, torch.zeros(32, 2)]
        tensors |= {f"{name}.params0_values.{i}": value.detach().clone() for i, value in enumerate(initial)}
        expected[module] = 16 / 2 * lora_b @ lora_a0
    save_file(tensors, tmp_path / "linearized_adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "openai/clip"}))
    adapter = adapters.load_adapter(tmp_path)
    assert (adapter.method, adapter.base_model) == ("l_lora", "openai/clip")
    assert list(adapter.factors) == modules
    for module in modules:
        torch.testing.assert_close(adapter.delta_weight(module), expected[module])
    with adapters.added(model, adapter):
        assert adapters.active(model) == "added"
    fused = adapters.combine({"x": adapter, "y": adapter}, {"*": {"x": 0.5, "y": 0.5}})
    assert set(fused.ranks.values()) == {2}

    save_file(
        {n: t for n, t in tensors.items() if not n.endswith("values.2")},
        tmp_path / "linearized_adapter_model.safetensors",
    )
    with pytest.raises(InputError, match=r"no params0_values of shape \(2, 32\), so A₀ is not known"):
        adapters.load_adapter(tmp_path)


def test_rank_patterns_tell_names_apart_that_end_alike(tmp_path: Path) -> None:
    model = nn.ModuleDict({"tower": nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}), "q": nn.Linear(4, 4)})
    torch.manual_seed(0)
    factors = {
        name: adapters.Factors(torch.randn(rank, 4), torch.randn(4, rank), lora_alpha=rank * 2)
        for name, rank in (("q", 1), ("tower.q", 3), ("tower.v", 3))
    }
    adapter = adapters.Adapter(factors)
    adapters.save_adapter(tmp_path, adapter)
    assert adapters.load_adapter(tmp_path).ranks == {"q": 1, "tower.q": 3, "tower.v": 3}
    peft_model = PeftModel.from_pretrained(model, tmp_path)
    for name in factors:
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("default"), adapter.delta_weight(name))


def test_mixed_scalings_are_written_under_one_flag(tmp_path: Path) -> None:
    factors = {
        name: adapters.Factors(torch.randn(3, 4), torch.randn(4, 3), lora_alpha=5, use_rslora=use_rslora)
        for name, use_rslora in (("a", True), ("b", False))
    }
    adapter = adapters.Adapter(factors)
    adapters.save_adapter(tmp_path, replace(adapter, base_model="x"))
    back = adapters.load_adapter(tmp_path)
    for name in factors:
        torch.testing.assert_close(back.delta_weight(name), adapter.delta_weight(name))


def test_an_adapter_that_an_earlier_version_started_from_another_b0_is_the_task_vector_that_peft_reads(
    tmp_path: Path,
) -> None:
    model = build("clip")
    adapters.inject(model, ["a"], method="l_lora", rank=4, target_modules=["q_proj"])
    perturb(adapters.trainable_parameters(model, "a"))
    adapter = adapters.extract(model, "a")
    adapters.save_adapter(tmp_path, adapter)
    own = json.loads((tmp_path / "fusionlab.json").read_text())
    own["lora_alpha"] = {module: [2.0, False] for module in adapter.factors}
    (tmp_path / "fusionlab.json").write_text(json.dumps(own))
    back = adapters.load_adapter(tmp_path)
    assert (back.method, back.a0_hash, back.seed) == ("lora", "", None)  # no shared A, and no A₀ for factor space
    assert all(torch.equal(back.delta_weight(module), adapter.delta_weight(module)) for module in adapter.factors)
