"""What cannot be learnt or scored: one message, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def talk(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = talk(("user", "a film"), ("assistant", "yes"))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
ROWS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no template": (GOOD, ["none"], "messages need a chat template, and the tokenizer has none"),
    "system": (talk(("system", "s"), ("user", "x"), ("assistant", "y")), [], "System role not supported"),
    "order": (talk(("user", "x"), ("user", "z"), ("assistant", "y")), [], "roles must alternate"),
    "two answers": (talk(("user", "x"), ("assistant", "z"), ("assistant", "y")), [], "roles must alternate"),
    "unknown role": (talk(("narrator", "x"), ("assistant", "y")), [], "roles must alternate"),
    "nobody answers": (talk(("user", "x")), [], "no message of the assistant"),
    "begins with an answer": (talk(("assistant", "y")), [], "cannot be learnt (counted from 0): row 0"),
    "empty answer": (talk(("user", "x"), ("assistant", "")), [], "empty completion"),
    "parts": (
        talk(("user", [{"type": "text", "text": "x"}]), ("assistant", "y")),
        [],
        "the values of 'messages' are of several kinds",
    ),
    "tool calls": ({"messages": [*GOOD["messages"], {"role": "user", "content": "z"}, CALL]}, [], "tool_calls"),
    "empty completion": ({"prompt": "x:", "completion": ""}, [], "empty completion"),
    "null completion": ({"prompt": "x:", "completion": None}, [], "empty completion"),
    "empty text": ({"text": ""}, [], "empty text"),
    "empty output": ({"instruction": "x", "output": ""}, [], "empty completion"),
    "long prompt": ({"prompt": "x " * 40, "completion": "y"}, [], "its prompt has 80 tokens, the whole 82"),
    "mixed": ({"messages": None, "text": "x"}, [], "mixed formats"),
}


def _good(like: dict[str, Any], place: int) -> dict[str, Any]:
    """A row of the same columns that can be learnt."""
    said = talk(("user", f"film {place}"), ("assistant", "yes"))
    return {key: f"film {place}" if key != "messages" else said["messages"] for key in like}


def fit(folder: Path, model: Path, task: dict[str, Any], *more: str) -> int:
    argv = ["fit", "--model", "CausalModule", "--model.backbone", str(model), "--data", "ChatTasks"]
    argv += ["--data.tasks", json.dumps([task]), "--data.cache_dir", str(folder / "cache"), "--data.max_length", "48"]
    argv += ["--trainer.max_steps", "1", "--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]
    return main([*argv, *more, "--trainer.default_root_dir", str(folder / "run")])


def written(folder: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "own", "path": str(folder / "own.jsonl"), **more}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_cannot_be_learnt_end_a_fit_before_it_begins(
    causal_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    row, template, message = ROWS[kind]
    (tmp_path / "strict.jinja").write_text(STRICT)
    rows = [*[row] * 3, *(_good(row, place) for place in range(60))]
    given = template or [str(tmp_path / "strict.jinja")]
    task = written(tmp_path, rows)
    assert fit(tmp_path, causal_folder("llama"), task, "--data.chat_template_path", *given) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "fusionlab: task 'own': " in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["yes", " yes"], "label words 'yes' and ' yes' of task 'own' are the same tokens"),
        (["yes\n", "yes"], "are the same tokens"),
        (["no", "yes", "no "], "label words 'no' and 'no ' of task 'own' are the same tokens"),
        (["yes", "yes"], "yes"),
        (["yes", " "], "has no tokens"),
    ],
    ids=repr,
)
def test_label_words_that_cannot_be_told_apart_are_refused(
    causal_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    (tmp_path / "strict.jinja").write_text(STRICT)
    rows = [{"sentence": f"film {i}", "label": i % len(words)} for i in range(60)]
    task = written(tmp_path, rows, input_columns=["sentence"], label_words=words)
    more = ["--data.chat_template_path", str(tmp_path / "strict.jinja")]
    assert fit(tmp_path, causal_folder("llama"), task, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lacks", ["eos", "pad"])
def test_a_tokenizer_without_an_end_is_refused_and_without_padding_it_trains(
    causal_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], lacks: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(causal_folder("llama"), model)
    for file in model.glob("*token*.json"):
        content = json.loads(file.read_text())
        content.pop(f"{lacks}_token", None)
        file.write_text(json.dumps(content))
    task = written(tmp_path, [{"prompt": f"film {i}:", "completion": " one"} for i in range(60)])
    code = fit(tmp_path, model, task)
    if lacks == "pad":
        assert code == 0
        assert (tmp_path / "run" / "results.json").is_file()
    else:
        assert code == 2
        assert "the tokenizer has no end token (eos_token)" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
