"""Fused from files == fused in memory, bit for bit: every rule, on models that transformers saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from often import often
from safetensors.torch import load_file, save_file

from fusionlab import rules
from fusionlab.commands.fuse import main
from fusionlab.engine import fuse
from fusionlab.rules.config import known_rules

VOCABULARY = 1_100  # times 32 is more than one cut of 32,768 elements
TEXT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = TEXT | {"vocab_size": VOCABULARY, "num_key_value_heads": 2}
IMAGE = TEXT | {"image_size": 16, "patch_size": 8}
RULES: dict[str, Any] = {
    "average": {"class_path": "average", "init_args": {"weights": {"a": 1.0, "b": 2.0}}},
    "breadcrumbs": "breadcrumbs",
    "dare": {"class_path": "dare", "init_args": {"rule": "metagpt", "seed": 3}},
    "disjoint_mean": "disjoint_mean",
    "iso_c": "iso_c",
    "knots": "knots",
    "lines": {"class_path": "lines", "init_args": {"beta": 0.5}},
    "metagpt": "metagpt",
    "slerp": "slerp",
    "task_arithmetic": {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": 0.4}},
    "ties": "ties",
    "trim": {"class_path": "trim", "init_args": {"rule": "metagpt", "at_threshold": "first"}},
    "tsv_m": "tsv_m",
    "consensus": "consensus",
    "della": {"class_path": "della", "init_args": {"rule": "disjoint_mean"}},
    "iso_cts": "iso_cts",
    "karcher": "karcher",
    "localize_and_stitch": "localize_and_stitch",
    "model_stock": "model_stock",
    "nuslerp": "nuslerp",
    "passthrough": {"class_path": "passthrough", "init_args": {"scale": 0.9}},
    "sce": {"class_path": "sce", "init_args": {"density": 0.2}},
    "wudi": {"class_path": "wudi", "init_args": {"num_steps": 20}},
}


def llama(tied: bool) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).bfloat16()


def mistral() -> transformers.PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=8)).half()


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> transformers.PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5))


def clip() -> transformers.PreTrainedModel:
    text = TEXT | {"vocab_size": 99, "max_position_embeddings": 12}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24))


MODELS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], str]] = {
    "llama tied": (lambda: llama(True), "5GB"),
    "llama sharded": (lambda: llama(False), "60KB"),
    "mistral": (mistral, "5GB"),
    "t5 sharded": (t5, "60KB"),
    "vit": (vit, "5GB"),
    "clip": (clip, "5GB"),
}


@pytest.fixture(autouse=True)
def without_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of small folders are written here, which a disk takes long to sync; that they are is not the question."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Base and two fine-tuned models of a kind, each saved by transformers; made when first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            root = made[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            build, shard_size = MODELS[kind]
            torch.manual_seed(0)
            model = build()
            model.save_pretrained(root / "base", max_shard_size=shard_size)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for task in "ab":
                for parameter, original in zip(model.parameters(), list(model.parameters()), strict=True):
                    noise = 0.02 * torch.randn(parameter.shape)
                    parameter.data = (state_of(state, model, original).float() + noise).to(parameter.dtype)
                model.tie_weights()
                model.save_pretrained(root / task, max_shard_size=shard_size if task == "a" else "5GB")
        return made[kind]

    return folder


def state_of(state: dict, model: torch.nn.Module, parameter: torch.nn.Parameter) -> torch.Tensor:
    return next(state[name] for name, other in model.named_parameters() if other is parameter)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder, by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def inputs_of(config: transformers.PretrainedConfig) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[5, 7, 90]])
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    return {
        "t5": {"input_ids": tokens, "decoder_input_ids": tokens},
        "vit": {"pixel_values": images},
        "clip": {"input_ids": tokens, "pixel_values": images},
    }.get(config.model_type, {"input_ids": tokens})


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs_of(model.config))
    return output.logits_per_image if model.config.model_type == "clip" else output.logits


@pytest.mark.parametrize("kind", often(MODELS, "llama tied", "t5 sharded"))
def test_streamed_equals_in_memory(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    root = folders(kind)
    base, finetuned = read(root / "base"), {task: read(root / task) for task in "ab"}
    assert RULES.keys() == known_rules().keys()
    for name, rule in RULES.items():
        output = tmp_path / name
        recipe = {"base": str(root / "base"), "finetuned": {task: str(root / task) for task in "ab"}, "rule": rule}
        recipe |= {"output": str(output), "threads": 3, "max_shard_size": "70KB"}
        assert main(["--config", write(tmp_path, recipe)]) == 0
        expected = fuse(rules.from_config(rule), base, finetuned=finetuned, threads=1)
        streamed = read(output)
        assert streamed.keys() == base.keys(), name
        assert all(torch.equal(streamed[key], expected.state[key]) for key in base), name
        record = json.loads((output / "fusion.json").read_text())
        assert record["norms"] == expected.norms, name
        assert record["cosines"] == expected.cosines, name
        assert record["scaling_coefficients"] == expected.scaling_coefficients, name


@pytest.mark.parametrize("kind", MODELS)
def test_the_output_loads_with_from_pretrained(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    root, output = folders(kind), tmp_path / "fused"
    recipe = {"base": str(root / "base"), "finetuned": {task: str(root / task) for task in "ab"}, "output": str(output)}
    assert main(["--config", write(tmp_path, recipe)]) == 0
    model_class = MODELS[kind][0]().__class__
    fused, info = model_class.from_pretrained(output, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = fuse(rules.Metagpt(), read(root / "base"), finetuned={task: read(root / task) for task in "ab"}).state
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    save_file(state, by_hand / "model.safetensors", metadata={"format": "pt"})
    (by_hand / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
    expected = model_class.from_pretrained(by_hand, dtype="auto")
    assert torch.equal(logits(fused), logits(expected))
    assert not torch.equal(logits(fused), logits(model_class.from_pretrained(root / "base", dtype="auto")))


def write(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return str(path)
