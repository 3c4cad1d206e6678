"""`fuse` says where its inputs have a chat template, or end their answers, otherwise than the base, whose files it
keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fusionlab.__main__ import main

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"


def model(folder: Path, **files: Any) -> Path:
    """A small full model with other files beside it."""
    folder.mkdir(parents=True)
    save_file({"layer.weight": torch.randn(4, 4)}, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9}
    files = {"config.json": config, "tokenizer_config.json": {}, **files}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def adapter(folder: Path, **files: Any) -> Path:
    """An adapter as TRL leaves one: the tokenizer beside it."""
    folder.mkdir(parents=True)
    factors = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(4, 2)}
    stored = {f"base_model.model.layer.{name}.weight": value for name, value in factors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layer"], "base_model_name_or_path": "x"}
    for name, content in {"adapter_config.json": said, **files}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def notes(tmp_path: Path, base: Path, *more: str, **inputs: Path) -> list[str]:
    given = [text for task, path in inputs.items() for text in (f"--finetuned.{task}", str(path))]
    argv = ["fuse", "--base", str(base), *given, "--rule", "average", "--output", str(tmp_path / "out"), *more]
    assert main(argv) == 0
    return json.loads((tmp_path / "out/fusion.json").read_text())["notes"]


Make = Callable[..., Path]
TEMPLATES: dict[str, tuple[Make, dict[str, Any]]] = {
    "a file": (model, {"chat_template.jinja": TEMPLATE}),
    "in the settings": (model, {"tokenizer_config.json": {"chat_template": TEMPLATE}}),
    "one of several": (
        model, {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}}
    ),
    "another file": (model, {"additional_chat_templates/rag.jinja": TEMPLATE}),
    "beside an adapter": (adapter, {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {}}),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_the_output_will_not_have_is_said(tmp_path: Path, case: str) -> None:
    make, files = TEMPLATES[case]
    base, more = model(tmp_path / "base"), ["--save", "weights"] if make is adapter else []
    found = notes(tmp_path, base, *more, a=make(tmp_path / "a", **files), b=model(tmp_path / "b"))
    assert [note for note in found if "made for" not in note] == [
        "the chat template of 'a' is not that of the base, which has none, and neither has the output; give "
        "chat_template: auto, a template or the file of one"
    ]


def test_nothing_is_said_of_one_template_or_of_one_that_is_given(tmp_path: Path) -> None:
    base = model(tmp_path / "base", **{"chat_template.jinja": TEMPLATE})
    same = model(tmp_path / "a", **{"tokenizer_config.json": {"chat_template": TEMPLATE}})
    assert notes(tmp_path / "1", base, a=same) == []
    none = model(tmp_path / "b")
    (told,) = notes(tmp_path / "2", base, b=none)
    assert told.startswith("the chat template of 'b' is not that of the base, which is kept;")
    assert notes(tmp_path / "3", base, "--chat_template", "auto", b=none) == []


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ids": (
        {"generation_config.json": {"eos_token_id": 2}}, {"generation_config.json": {"eos_token_id": [2, 0]}},
        "answers of 'a' end by [0, 2], unlike those of the base, which end by [2]; the output is as the base: put "
        "eos_token_id into its generation_config.json",
    ),
    "no ids": (
        {}, {"config.json": {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "eos_token_id": 2}},
        "answers of 'a' end by [2], unlike those of the base, which says none; the output is as the base: put "
        "eos_token_id into its generation_config.json",
    ),
    "token": (
        {"tokenizer_config.json": {"eos_token": "</s>"}},
        {"tokenizer_config.json": {"eos_token": {"content": "<end>"}}},
        "answers of 'a' end by <end>, unlike those of the base, which end by </s>; the output is as the base: put "
        "eos_token into its tokenizer_config.json, or for whole models give tokenizer: PATH",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_other_ends_of_answers_are_said(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs, told = ENDS[case]
    base = model(tmp_path / "base", **ours)
    assert notes(tmp_path, base, a=model(tmp_path / "a", **theirs), b=model(tmp_path / "b", **ours)) == [told]
    assert f"note: {told}" in capsys.readouterr().out
