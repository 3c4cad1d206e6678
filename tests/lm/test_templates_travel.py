"""The chat template and the tokenizer that were trained with lie beside what was trained, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusionlab.__main__ import main
from fusionlab.data import ChatTasks
from fusionlab.errors import InputError
from fusionlab.modules import CausalModule

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def write_rows(folder: Path, completion: str = " yes") -> None:
    rows = [{"prompt": f"film {i}:", "completion": completion} for i in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def fit(tokenizer: Any, causal_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "other.jinja").write_text("OTHER " + tokenizer.chat_template)
    write_rows(tmp_path)
    flags = [
        "--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--model.max_new_tokens", "2",
        "--data", "ChatTasks", "--data.cache_dir", str(tmp_path / "cache"),
        "--data.tasks", json.dumps([{"name": "a", "path": str(tmp_path / "a.jsonl")}]),
        "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false", "--fusion.rules", "[average]",
    ]  # fmt: skip

    def run(*more: str) -> Path:
        assert main(["fit", *flags, "--trainer.default_root_dir", str(tmp_path / "run"), *more]) == 0
        return tmp_path / "run"

    return run


def template_in(folder: Path) -> str | None:
    """The template that stock transformers finds."""
    found = AutoTokenizer.from_pretrained(folder).chat_template
    return None if found is None else found[:6]


def test_an_adapter_has_the_template_that_it_was_trained_with(
    fit: Callable[..., Path], causal_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    root = fit("--data.chat_template_path", str(tmp_path / "other.jinja"))
    for folder in (root / "adapters/a", root / "fused/average"):
        assert template_in(folder) == "OTHER "
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_folder("llama")), folder)


def test_an_adapter_of_the_base_s_own_template_holds_no_tokenizer(fit: Callable[..., Path]) -> None:
    root = fit()
    assert not list(root.glob("*/*/*token*"))
    assert not list(root.glob("*/*/chat_template.jinja"))


@pytest.mark.parametrize("more", [[], ["--data.tokenizer"]])
@pytest.mark.parametrize("given", ["none", "other.jinja"])
def test_whole_weights_have_the_template_that_they_were_trained_with(
    fit: Callable[..., Path], causal_folder: Callable[[str], Path], tmp_path: Path, given: str, more: list[str]
) -> None:
    path = given if given == "none" else str(tmp_path / given)
    own = [*more, str(causal_folder("llama"))] if more else []
    root = fit("--model.method", "full", "--data.chat_template_path", path, *own)
    for folder in (root / "finetuned/a", root / "fused/average"):
        assert template_in(folder) == (None if given == "none" else "OTHER ")


def other_tokenizer(words: int, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    built.train_from_iterator(["a film of other words altogether, which tells nothing of the first"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token=eos)


def test_the_tokenizer_of_another_model_is_refused(
    causal_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_tokenizer(300).save_pretrained(tmp_path / "other")
    write_rows(tmp_path)
    argv = [
        "fit", "--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--data", "ChatTasks",
        "--data.tasks", json.dumps([{"name": "a", "path": str(tmp_path / "a.jsonl")}]),
        "--data.tokenizer", str(tmp_path / "other"), "--trainer.default_root_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert f"{str(tmp_path / 'other')!r} is not the tokenizer of the model {str(causal_folder('llama'))!r}" in told
    assert not (tmp_path / "run/config.yaml").exists()


def test_ids_without_an_embedding_are_told_before_they_are_read(
    causal_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    write_rows(tmp_path, " <last>")
    tokenizer = other_tokenizer(300)
    tokenizer.add_tokens([f"<more{i}>" for i in range(100)] + ["<last>"])
    data = ChatTasks(
        [{"name": "a", "path": str(tmp_path / "a.jsonl")}], tokenizer=tokenizer, cache_dir=str(tmp_path / "cache")
    )
    data.setup()
    with pytest.raises(InputError, match=rf"a sample of task 'a' has the token {len(tokenizer) - 1}, and the model"):
        CausalModule(str(causal_folder("llama"))).prepare_tasks(data.tasks)


def test_a_system_message_needs_a_template(tmp_path: Path, caplog: pytest.LogCaptureFixture, tokenizer: Any) -> None:
    write_rows(tmp_path)
    given: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache"), "system": "Be brief."}
    tasks: list[str | dict] = [{"name": "a", "path": str(tmp_path / "a.jsonl")}]
    ChatTasks(tasks, **given).setup()
    assert "data.system does nothing for task 'a', whose rows are plain texts" in caplog.text
    caplog.clear()
    ChatTasks(tasks, **given, apply_chat_template=True).setup()
    assert "data.system" not in caplog.text
    with pytest.raises(InputError, match="system needs a chat template, and the tokenizer has none"):
        ChatTasks(tasks, **given, chat_template_path="none").setup()
