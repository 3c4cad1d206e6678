"""What fusionlab writes has the user's permissions, and a run's models bring what their base's folder has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS, load_backbone
from fusionlab.fusion.folders import save_finetuned, save_fused
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules import Average, Ties


@pytest.fixture(params=[0o022, 0o002, 0o027, 0o077, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(folder: Path, umask: int) -> None:
    for path in (folder, *folder.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, path


@pytest.fixture(scope="module")
def trained() -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """A backbone, two adapters on it that need every kind of file, and its weights."""
    backbone = load_backbone("tiny-clip")
    adapters.inject(
        backbone.model, ["a", "b"], method="l_lora", rank=2, lora_alpha=3, target_modules=["q_proj"],
        scope="vision_model",
    )  # fmt: skip
    inputs = {task: adapters.extract(backbone.model, task) for task in "ab"}
    return backbone, inputs, {name: tensor.clone() for name, tensor in adapters.base_state(backbone.model).items()}


def test_files_have_the_user_s_umask(umask: int, trained: Any, tmp_path: Path) -> None:
    backbone, inputs, base = trained
    save_finetuned(tmp_path / "adapter", inputs["a"], backbone, {})
    save_fused(tmp_path / "fused", fuse_weights(Average(), base, inputs), backbone, {})
    shifted = {name: base[name] + torch.ones(()) for name in base if base[name].is_floating_point()}
    save_finetuned(tmp_path / "full", shifted, backbone, {})
    save_fused(tmp_path / "ties", fuse_weights(Ties(), base, {"a": shifted}), backbone, {})
    for name in ("adapter", "fused", "full", "ties"):
        check_modes(tmp_path / name, umask)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that its user alone may read, and two adapters by PEFT."""
    folder = tmp_path_factory.mktemp("stock")
    shutil.copytree(ASSETS / "tiny-t5", folder / "base")
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "base")
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    for task in "ab":
        peft_model.save_pretrained(folder / task)
    for path in (folder / "base").iterdir():
        path.chmod(0o400)  # the base's own permissions are not the output's
    return folder


def test_files_of_fuse_have_the_user_s_umask(umask: int, stock: Path, tmp_path: Path) -> None:
    for task in "ab":
        shutil.copytree(stock / task, tmp_path / task)
    flags = ["--base", str(stock / "base"), *(f"--finetuned.{task}={tmp_path / task}" for task in "ab")]
    for name, more in {"adapter": [], "cut": ["--rank", "1"], "full": ["--rule", "ties"]}.items():
        assert main(["fuse", *flags, *more, "--output", str(tmp_path / name)]) == 0
        check_modes(tmp_path / name, umask)
    assert ((tmp_path / "a" / "fusion_stats.json").stat().st_mode & 0o777) == 0o666 & ~umask


def clip(folder: Path) -> None:
    shutil.copytree(ASSETS / "tiny-clip", folder)


def clip_of_transformers_5(folder: Path) -> None:
    clip(folder)
    pixels = json.loads((folder / "preprocessor_config.json").read_text()) | {"resample": 2}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))


def t5(folder: Path) -> None:
    shutil.copytree(ASSETS / "tiny-t5", folder)
    (folder / "spiece.model").write_bytes(b"pieces")
    (folder / "added_tokens.json").write_text("{}")


def vit(folder: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(folder)


def llama(folder: Path) -> None:
    shutil.copytree(ASSETS / "tiny-t5", folder)
    (folder / "model.safetensors").unlink()
    vocab = len(transformers.AutoTokenizer.from_pretrained(folder))
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


PLACED = {"LICENSE": "terms", "NOTICE": "notice", "handler_config.json": "{}"}
BASES: dict[str, Callable[[Path], None]] = {
    "CLIP": clip, "CLIP of transformers 5": clip_of_transformers_5, "T5": t5, "ViT": vit, "Llama": llama
}  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
def test_a_run_s_models_bring_what_their_base_has(kind: str, tmp_path: Path) -> None:
    BASES[kind](tmp_path / "base")
    for name, content in PLACED.items():
        (tmp_path / "base" / name).write_text(content)
    for name in ("README.md", "model.onnx", "tf_model.h5", "open_clip_config.json", "pytorch_model.bin"):
        (tmp_path / "base" / name).write_text("stale")
    backbone = load_backbone(str(tmp_path / "base"))
    base = {name: tensor.clone() for name, tensor in adapters.base_state(backbone.model).items()}
    save_finetuned(tmp_path / "a", base, backbone, {})
    save_fused(tmp_path / "fused", fuse_weights(Average(), base, {"a": base}), backbone, {})
    own = {path.relative_to(tmp_path / "base").as_posix() for path in (tmp_path / "base").rglob("*") if path.is_file()}
    stale = {"model.onnx", "tf_model.h5", "open_clip_config.json", "pytorch_model.bin"}
    for name, record in (("a", "fusionlab.json"), ("fused", "fusion.json")):
        folder = tmp_path / name
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert own - stale <= there
        assert not there & stale
        assert "stale" not in (folder / "README.md").read_text()
        assert there - own <= {record, "generation_config.json", "special_tokens_map.json"}
        for file in (own - stale) - {
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer_config.json",
            "tokenizer.json",
        }:
            if file != "generation_config.json":
                assert (folder / file).read_bytes() == (tmp_path / "base" / file).read_bytes(), file
        again = load_backbone(str(folder))
        for key, value in adapters.base_state(again.model).items():
            assert torch.equal(value, base[key])
