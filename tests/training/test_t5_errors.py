"""What a user can get wrong with T5: each one message that says what came and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

from fusionlab.backbones import load_backbone
from fusionlab.errors import InputError
from fusionlab.modules import T5Module

Folder = Callable[[str], Path]


@dataclass(frozen=True)
class TextTask:
    label_words: tuple[str, ...] | None
    metric: str = "accuracy"


def refuses(message: str) -> object:
    return pytest.raises(InputError, match=re.escape(message))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("good", ""), "label word '' of task 'cola' has no tokens"),
        (("  ", "bad"), "label word '  ' of task 'cola' has no tokens"),
        (("good", "b\u00e4d"), "label word 'b\u00e4d' of task 'cola' has a character that the tokenizer does not know"),
        (("good", " good"), "label words 'good' and ' good' of task 'cola' are the same tokens"),
    ],
)
def test_label_words_that_cannot_be_answers(t5_folder: Folder, words: tuple[str, ...], message: str) -> None:
    with refuses(message):
        T5Module(str(t5_folder("tied"))).prepare_tasks({"cola": TextTask(words)})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TextTask(("a", "b"), "spearman"), "metric 'spearman' does not fit task 'cola', whose target is label words"),
        (
            TextTask(("a", "b"), "f1"),
            "metric 'f1' does not fit task 'cola', whose target is label words; expected accuracy",
        ),
        (TextTask(None, "accuracy"), "metric 'accuracy' does not fit task 'cola', whose target is a numeric score"),
    ],
)
def test_metrics_that_do_not_fit(t5_folder: Folder, task: TextTask, message: str) -> None:
    with refuses(message):
        T5Module(str(t5_folder("tied"))).prepare_tasks({"cola": task})


def test_settings_of_the_evaluation(t5_folder: Folder) -> None:
    tasks = {"cola": TextTask(("acceptable", "unacceptable"))}
    with refuses("evaluation for unknown task 'colla'; did you mean 'cola'?"):
        T5Module(str(t5_folder("tied")), evaluation={"colla": "generate"}).prepare_tasks(tasks)
    with refuses("the longest label word of task 'cola' has 14 tokens, but max_new_tokens is 13"):
        T5Module(str(t5_folder("tied")), evaluation="generate", max_new_tokens=13).prepare_tasks(tasks)
    with refuses("max_new_tokens must be at least 1, got 0"):
        T5Module(str(t5_folder("tied")), max_new_tokens=0)


@pytest.mark.parametrize("dtype", ["float16", "fp16"])
def test_float16_is_refused_with_the_reason(t5_folder: Folder, dtype: str) -> None:
    with refuses(f"dtype '{dtype}': T5 overflows in float16"):
        T5Module(str(t5_folder("tied")), dtype=dtype)


def test_other_dtypes_are_refused(t5_folder: Folder) -> None:
    with refuses("dtype must be float32 or bfloat16, got 'int8'"):
        T5Module(str(t5_folder("tied")), dtype="int8")


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_float16_precision_is_refused_before_training(t5_folder: Folder, precision: str) -> None:
    module = T5Module(str(t5_folder("tied")))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.strategy._precision_plugin.precision = precision  # a CPU trainer takes no float16 itself
    with refuses(f"trainer.precision '{precision}': T5 overflows in float16"):
        module.setup("fit")


def test_models_that_are_no_encoder_decoder(t5_folder: Folder, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"is of type 'gpt2'; expected .* or 't5' \(an encoder-decoder\)"):
        T5Module(str(tmp_path / "gpt2"))
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=91)
    T5EncoderModel(config).save_pretrained(tmp_path / "encoder")
    with refuses("is a T5EncoderModel, which is not an encoder-decoder"):
        T5Module(str(tmp_path / "encoder"))


def test_a_clip_is_no_t5_and_has_no_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 8, "patch_size": 4}))
    model.save_pretrained(tmp_path)
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0}, all_special_tokens=[])
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda source, **_: tokenizer)
    with refuses("T5Module needs an encoder-decoder, a T5, and"):
        T5Module(str(tmp_path))
    with refuses("runs in float32, got dtype 'bfloat16'"):
        load_backbone(str(tmp_path), dtype="bfloat16")


def test_folders_that_are_not_whole(t5_folder: Folder, tmp_path: Path) -> None:
    whole = t5_folder("untied")
    for name in ("no weights", "no tokenizer", "fewer weights", "small vocabulary"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "no weights" / "model.safetensors").unlink()
    with refuses("could not be loaded: "):
        T5Module(str(tmp_path / "no weights"))
    for path in (tmp_path / "no tokenizer").glob("tokenizer*"):
        path.unlink()
    with refuses("has no tokenizer; put its tokenizer.json or spiece.model beside it"):
        T5Module(str(tmp_path / "no tokenizer"))
    weights = tmp_path / "fewer weights" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "EncDecAttention.q" not in name}
    save_file(kept, weights, {"format": "pt"})
    with refuses("lacks weights: decoder.block.0.layer.1.EncDecAttention.q.weight"):
        T5Module(str(tmp_path / "fewer weights"))
    config = tmp_path / "small vocabulary" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 50}))
    weights = tmp_path / "small vocabulary" / "model.safetensors"
    cut = {
        name: tensor[:50].clone() if tensor.shape[0] == 91 else tensor for name, tensor in load_file(weights).items()
    }
    save_file(cut, weights, {"format": "pt"})
    with refuses("has 87 tokens, its model only 50"):
        T5Module(str(tmp_path / "small vocabulary"))


def test_targets_that_match_nothing_are_named(t5_folder: Folder) -> None:
    with refuses("target module 'q_proj' matches no layer"):
        T5Module(str(t5_folder("tied")), target_modules=["q_proj", "v"]).add_adapters(["task"])


def test_no_gradient_reaches_the_base(t5_folder: Folder) -> None:
    module = T5Module(str(t5_folder("tied")))
    module.add_adapters(["task"])
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad) == sum(
        parameter.numel() for parameter in module.task_parameters["task"]
    )
    assert isinstance(module.task_parameters["task"][0], torch.nn.Parameter)
