"""Vocabularies that differ are refused with both numbers and what to do; tokens that the base lacks are named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from fusionlab.__main__ import main

ROWS = 16
TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOWER, vocab_size=ROWS, **more))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=ROWS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=ROWS, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TOWER, vocab_size=ROWS))


def paligemma_like() -> nn.Module:
    """A language model inside another: its configuration says the size below."""
    text = TOWER | {"vocab_size": ROWS, "model_type": "llama"}
    vision = TOWER | {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "t5": t5,
    "gpt2": gpt2,
    "bert": bert,
    "llava": paligemma_like,
}


def tokenizer(*more: str) -> transformers.PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    made.add_tokens(list(more))
    return made


def save(folder: Path, model: nn.Module, rows: int = ROWS, *tokens: str) -> None:
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer(*tokens).save_pretrained(folder)


def run(folder: Path, *flags: str) -> int:
    inputs = [f"--finetuned.{task}={folder / task}" for task in "ab" if (folder / task).is_dir()]
    arguments = ["--base", str(folder / "base"), *inputs, "--rule", "average", "--output", str(folder / "out"), *flags]
    return main(["fuse", *arguments])


def refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()  # transformers' progress
    for flags in ((), ("--dry_run",)):
        assert run(folder, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(message, error), error
    assert not (folder / "out").exists()


@pytest.mark.parametrize("rows", [20, 12])
@pytest.mark.parametrize("kind", MODELS)
def test_full_models_of_other_vocabularies_are_refused(kind: str, rows: int, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    save(tmp_path / "base", MODELS[kind]())
    save(tmp_path / "a", MODELS[kind]())
    save(tmp_path / "b", MODELS[kind](), rows)
    what = r"only the padding differs\. Resize one of them .* or say mismatched_tensors: base"
    refused(
        tmp_path, rf"fine-tuned 'b' has a vocabulary of {rows} rows, the base one of 16: [\w.]+.*; .*{what}", capsys
    )
    assert run(tmp_path, "--mismatched_tensors", "base") == 0
    capsys.readouterr()


def test_added_tokens_are_named(tmp_path: Path, capsys) -> None:
    save(tmp_path / "base", llama())
    save(tmp_path / "a", llama(), 18, "<tool>", "<end>")
    refused(
        tmp_path,
        r"vocabulary of 18 rows, the base one of 16: lm_head.weight, model.embed_tokens.weight; its tokenizer knows "
        r"2 tokens that the base's does not: <tool>, <end>\.",
        capsys,
    )


@pytest.mark.parametrize("where", ["full", "adapter"])
def test_tokens_in_rows_that_the_base_has_to_spare_are_said(where: str, tmp_path: Path, capsys) -> None:
    save(tmp_path / "base", llama())
    save(tmp_path / "a", llama(), ROWS, "<tool>")
    if where == "adapter":
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        (tmp_path / "a" / "model.safetensors").unlink()
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
            tmp_path / "a"
        )
    assert run(tmp_path) == 0
    note = "the tokenizer of 'a' knows 1 tokens that the base's, which is kept, does not: <tool>"
    assert note in capsys.readouterr().out
    assert note in json.loads((tmp_path / "out" / "fusion.json").read_text())["notes"]


def test_equal_tokens_in_other_bytes_are_no_difference_to_an_adapter(tmp_path: Path, capsys) -> None:
    save(tmp_path / "base", llama())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "a"
    )
    padded = tokenizer()
    padded._tokenizer.enable_truncation(7)
    padded.save_pretrained(tmp_path / "a")
    texts = {(tmp_path / name / "tokenizer.json").read_text() for name in ("base", "a")}
    assert len(texts) == 2
    assert run(tmp_path) == 0
    assert "tokenizer" not in capsys.readouterr().out


RESIZED: dict[str, dict[str, Any]] = {
    "saved by PEFT itself": {"target_modules": ["q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapted head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")
@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", RESIZED)
def test_adapters_of_resized_models_are_refused(kind: str, format: str, tmp_path: Path, capsys) -> None:
    save(tmp_path / "base", llama())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(19, mean_resizing=False)
    get_peft_model(model, LoraConfig(r=2, **RESIZED[kind])).save_pretrained(tmp_path / "a")
    tokenizer("<tool>").save_pretrained(tmp_path / "a")
    if format == "bin":
        torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
        (tmp_path / "a" / "adapter_model.safetensors").unlink()
    refused(
        tmp_path,
        r"adapter 'a' has a vocabulary of 19 rows, the base one of 16: [\w.]+.*; its tokenizer knows 1 tokens that "
        r"the base's does not: <tool>\. Merge it into the model that it was trained on, resized as there .*merge_and",
        capsys,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainable_token_indices": [3]},
            r"trainable_token_indices=\[3\]: token embeddings are trained too; merge it",
        ),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: whole modules are trained .*; merge it"),
    ],
)
def test_adapters_that_train_tokens_of_the_base_say_what_to_do(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys
) -> None:
    save(tmp_path / "base", llama())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **settings)).save_pretrained(tmp_path / "a")
    refused(tmp_path, message, capsys)
