"""A row's ``tools`` and ``chat_template_kwargs`` reach the template, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusionlab import ChatTasks
from fusionlab.data.chat.rows import given_values
from fusionlab.errors import InputError

from .conftest import CHATML
from .test_templates import chat_tasks, learnt_texts, messages

TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML
THINKS = CHATML.replace(
    "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n' + ('' if thinks else '<think></think>') }}"
).replace(
    "m['content'] +",
    "('<think></think>' if loop.last and m['role'] == 'assistant' and not thinks else '') + m['content'] +",
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ONE = messages([("user", "x"), ("assistant", "yes")])
ROWS = {
    "messages": {"messages": ONE},
    "a completion": {"prompt": ONE[:1], "completion": ONE[1:]},
    "an instruction": {"instruction": "x", "output": "yes"},
}


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """The question of a row."""
    kept = {key: value for key, value in row.items() if key not in ("completion", "output")}
    return {**kept, **({"messages": row["messages"][:-1]} if "messages" in row else {})}


def prompts_of(tokenizer: Any, template: str, folder: Path, row: dict[str, Any]) -> list[int]:
    (folder / "asked.jsonl").write_text(json.dumps(row))
    (batch,) = chat_tasks(tokenizer, template, folder, prompts=str(folder / "asked.jsonl")).predict_dataloader()
    return list(batch["prompt_ids"][0].tolist())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["a list", "text"])
def test_tools_are_written_in_training_and_predict(tokenizer: Any, tmp_path: Path, kind: str, tools: Any) -> None:
    row = ROWS[kind] | {"tools": tools}
    encoded = chat_tasks(tokenizer, TOOLS, tmp_path).encode("talk", row)
    stock = tokenizer.apply_chat_template(ONE, tools=[TOOL], chat_template=TOOLS, tokenize=False)
    assert tokenizer.decode(encoded["input_ids"]) == stock
    assert learnt_texts(tokenizer, encoded) == ["yes<|im_end|>"]
    assert prompts_of(tokenizer, TOOLS, tmp_path, asked(row)) == encoded["prompt_ids"]


@pytest.mark.parametrize("thinks", [True, False])
def test_named_values_are_what_a_row_says(tokenizer: Any, tmp_path: Path, thinks: bool) -> None:
    row = {"messages": ONE, "chat_template_kwargs": {"thinks": thinks}}
    data = chat_tasks(tokenizer, THINKS, tmp_path)
    encoded = data.encode("talk", row)
    stock = tokenizer.apply_chat_template(ONE, chat_template=THINKS, tokenize=False, thinks=thinks)
    assert tokenizer.decode(encoded["input_ids"]) == stock
    assert learnt_texts(tokenizer, encoded) == ["yes<|im_end|>"]
    assert prompts_of(tokenizer, THINKS, tmp_path, asked(row)) == encoded["prompt_ids"]
    assert (data.encode("talk", {"messages": ONE}) == encoded) is not thinks  # one row leaves another as it is


def test_what_closes_an_answer_is_found_under_the_values_of_its_row(tokenizer: Any, tmp_path: Path) -> None:
    template = CHATML.replace("m['content'] + '<|im_end|>\\n'", "m['content'] + ('' if bare else '<|im_end|>\\n')")
    assert "bare" in template
    data = chat_tasks(tokenizer, template, tmp_path)
    assert learnt_texts(tokenizer, data.encode("talk", {"messages": ONE})) == ["yes<|im_end|>"]
    bare = {"messages": ONE, "chat_template_kwargs": {"bare": True}}
    encoded = data.encode("talk", bare)
    assert learnt_texts(tokenizer, encoded) == ["yes<|im_end|>"]
    assert tokenizer.decode(encoded["input_ids"]).endswith("xassistant\nyes<|im_end|>".replace("xa", "x<|im_start|>a"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": [TOOL]}, "the row has tools, which the chat template does not write; leave such rows out"),
    "no list": ({"tools": TOOL}, r"tools must be a list of mappings, got \{"),
    "no JSON": ({"tools": "[f"}, "tools is text, but no JSON: "),
    "names": ({"chat_template_kwargs": {"thinks": True}}, "chat_template_kwargs names thinks, which the chat template"),
    "no mapping": ({"chat_template_kwargs": [1]}, r"chat_template_kwargs must be a mapping, got \[1\]"),
    "calls": (
        {"messages": [*ONE, {"role": "assistant", "content": "", "tool_calls": [CALL]}, *messages([("tool", "4")])]},
        "a message has tool_calls, which the chat template does not write",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", ["fit", "predict"])
def test_what_a_template_does_not_write_is_refused(tokenizer: Any, tmp_path: Path, case: str, where: str) -> None:
    more, message = REFUSED[case]
    row = {"messages": ONE, **more}
    question = row if case == "calls" else asked(row)
    with pytest.raises(InputError, match=message):
        prompts_of(tokenizer, CHATML, tmp_path, question) if where == "predict" else chat_tasks(
            tokenizer, CHATML, tmp_path
        ).encode("talk", row)


@pytest.mark.parametrize("more", [{}, {"tools": None}, {"tools": []}, {"tools": " "}, {"chat_template_kwargs": {}},
                                  {"chat_template_kwargs": {"thinks": None}}])  # fmt: skip
def test_nothing_is_given_where_there_is_no_value(tokenizer: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    assert given_values(more) == {}
    data = chat_tasks(tokenizer, CHATML, tmp_path)
    assert data.encode("talk", {"messages": ONE, **more}) == data.encode("talk", {"messages": ONE})


def test_only_text_keeps_what_has_no_value() -> None:
    tool = {"name": "f", "default": None}
    assert given_values({"tools": [tool]}) == {"tools": [{"name": "f"}]}
    assert given_values({"tools": json.dumps([tool])}) == {"tools": [tool]}


def test_tools_of_tables_are_read(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": ONE, "tools": [TOOL] if place else None} for place in range(3)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = TOOLS
    data = ChatTasks([{"name": "own", "path": str(tmp_path)}], tokenizer=own, cache_dir=str(tmp_path / "cache"))
    data.setup()
    samples = data.splits["own"]["test"].samples
    assert ["name" in own.decode(samples.input_ids[row]) for row in range(3)] == [False, True, True]
