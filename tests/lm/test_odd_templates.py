"""Chat templates that fail, that are several, that need a system message, that write a date in their own way."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fusionlab import ChatTasks
from fusionlab.errors import InputError

from .conftest import CHATML
from .test_templates import chat_tasks, learnt_texts, messages

ONE = {"messages": messages([("user", "x"), ("assistant", "yes")])}
USER_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] }}{% elif m['role'] == 'assistant' "
    "%}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{{ '{}{}'.format('x') }}", "refuses it: "),
        ("{% for %}", "refuses it: Expected an expression"),
        ("{% for m in messages", "refuses it: "),
        ("abc {%", "refuses it: "),
        ("{% generation %}{{ x }}{% endgeneration %}{% if a", "refuses it: "),
        ("{{ messages[0]['content']['parts'][0]['text'] }}", "refuses it: "),
    ],
)
def test_whatever_a_template_raises_is_told_of_the_row(
    tokenizer: Any, tmp_path: Path, template: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        chat_tasks(tokenizer, template, tmp_path).encode("talk", ONE)


def test_an_answer_that_nothing_comes_before_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    row = {"messages": messages([("system", "x"), ("assistant", "yes")])}
    with pytest.raises(InputError, match="the chat template writes nothing before an answer"):
        chat_tasks(tokenizer, USER_ONLY, tmp_path).encode("talk", row)


def test_a_template_that_needs_a_system_message_is_asked_for_its_end_with_one(tokenizer: Any, tmp_path: Path) -> None:
    data = chat_tasks(tokenizer, NEEDS_SYSTEM, tmp_path)
    assert data._end_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    with pytest.raises(InputError, match="system first"):
        data.encode("talk", ONE)
    row = {"messages": messages([("system", "s"), ("user", "x"), ("assistant", "yes")])}
    assert learnt_texts(tokenizer, data.encode("talk", row)) == ["yes<|im_end|>"]


def with_templates(tokenizer: Any, templates: dict[str, str], folder: Path) -> ChatTasks:
    own = copy.deepcopy(tokenizer)
    own.chat_template = templates
    (folder / "rows.jsonl").write_text(json.dumps(ONE) + "\n")
    return ChatTasks([{"name": "talk", "path": str(folder / "rows.jsonl")}], tokenizer=own)


def test_of_several_templates_the_default_one_is_taken(tokenizer: Any, tmp_path: Path) -> None:
    data = with_templates(tokenizer, {"tool_use": "{{ 1 / 0 }}", "default": CHATML}, tmp_path)
    assert learnt_texts(tokenizer, data.encode("talk", ONE)) == ["yes<|im_end|>"]
    with pytest.raises(InputError, match=r"several chat templates and no default one: rag; give one as a file"):
        with_templates(tokenizer, {"rag": CHATML}, tmp_path).encode("talk", ONE)


def test_a_template_file_is_utf8_and_may_have_a_mark_and_lines_of_windows(tokenizer: Any, tmp_path: Path) -> None:
    data = chat_tasks(tokenizer, "", tmp_path)
    (tmp_path / "template.jinja").write_bytes(
        b"\xef\xbb\xbf" + ("{{ 'a' }}\nb" + CHATML).replace("\n", "\r\n").encode()
    )
    text = tokenizer.decode(data.encode("talk", ONE)["input_ids"], clean_up_tokenization_spaces=False)
    assert text.startswith("a\nb<|im_start|>user")
    other = chat_tasks(tokenizer, "", tmp_path)
    (tmp_path / "template.jinja").write_bytes("{{ 'ä' }}".encode("latin-1"))
    with pytest.raises(InputError, match=r"data\.chat_template_path: .*template\.jinja is not utf-8: line 1"):
        other.encode("talk", ONE)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ strftime_now('%d %B %Y') }}", "31 January 2026"),
        ("{% set form = '%Y-%m-%d' %}{{ strftime_now(form) + ' ' + strftime_now('%-d') }}", "2026-01-31 31"),
        ("{{ strftime_now(format='%H') }}", "00"),
        ("\n\n{{ strftime_now('%d') }}", "\n\n31"),
        ("  {% if true %}{{ strftime_now('%d') }}{% endif %}", "31"),
        ('{%- if strftime_now is defined %}{{ strftime_now("%d") }}{% endif %}', "31"),
    ],
)
def test_dates_are_those_of_stock_transformers_at_the_moment_given(
    tokenizer: Any, tmp_path: Path, written: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = chat_tasks(tokenizer, written + CHATML, tmp_path)
    text = tokenizer.decode(data.encode("talk", ONE)["input_ids"], clean_up_tokenization_spaces=False)
    assert text.startswith(f"{expected}<|im_start|>user")

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Then:
            return cls(2026, 1, 31)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Then)
    stock = tokenizer.apply_chat_template(ONE["messages"], chat_template=written + CHATML, tokenize=False)
    assert stock == text


def test_half_a_character_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = chat_tasks(tokenizer, CHATML, tmp_path)
    with pytest.raises(InputError, match=r"a text holds '\\ud800', half of a character"):
        data.encode("talk", {"prompt": "x \ud800:", "completion": "y"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x \\ud800"}', "line 1: a text holds"),
        ('{"prompt": "x", "id": "\\ud800"}', "line 1: a text holds"),
        ("[" * 100_000, "line 1 is not JSON: maximum recursion"),
    ],
)
def test_questions_that_cannot_be_read_are_refused_by_their_line(
    tokenizer: Any, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "asked.jsonl").write_text(line)
    data = chat_tasks(tokenizer, CHATML, tmp_path, prompts=str(tmp_path / "asked.jsonl"))
    with pytest.raises(InputError, match=message):
        data.predict_dataloader()


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_plain_questions_go_through_the_template_where_plain_rows_do(
    tokenizer: Any, tmp_path: Path, system: str | None
) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "a film?", "choices": ["yes", "no"]}))
    options = {"apply_chat_template": True, "system": system, "prompts": str(tmp_path / "asked.jsonl")}
    data = chat_tasks(tokenizer, CHATML, tmp_path, **options)
    (batch,) = data.predict_dataloader()
    learnt = data.encode("talk", {"prompt": "a film?", "completion": "yes"})
    assert batch["prompt_ids"][0].tolist() == learnt["prompt_ids"]
    assert [*learnt["prompt_ids"], *batch["choices"][0][0]] == learnt["input_ids"][:-1]


MARKED = (
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + "
    "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
)
AROUND = "{% for m in messages %}X{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
WITHIN = {
    "nothing": AROUND.replace("X", MARKED),
    "a macro": "{% macro say(m) %}" + MARKED + "{% endmacro %}" + AROUND.replace("X", "{{ say(m) }}"),
    "a set": AROUND.replace("X", "{%- set x -%}" + MARKED + "{% endset %}{{ x }}"),
    "a filter": AROUND.replace("X", "{% filter string %}" + MARKED + "{% endfilter %}"),
    "a comment": AROUND.replace("X", "{# {% generation %}{% endgeneration %} #}" + MARKED.replace(
        "{% generation %}", "").replace("{% endgeneration %}", "")),
}  # fmt: skip


@pytest.mark.parametrize("within", WITHIN)
def test_marks_are_followed_or_answers_found_without_them(tokenizer: Any, tmp_path: Path, within: str) -> None:
    turns = [("user", "hello there"), ("assistant", "one two three"), ("user", "go"), ("assistant", "four five six")]
    data = chat_tasks(tokenizer, WITHIN[within], tmp_path)
    found = learnt_texts(tokenizer, data.encode("talk", {"messages": messages(turns)}))
    assert found == ["one two three<|im_end|>", "four five six<|im_end|>"]


@pytest.mark.parametrize("answer", ["a<|endoftext|>", "<|im_end|>", "b c<|im_start|>", "a\n"])
def test_where_no_special_token_closes_answers_one_in_an_answer_does_not(
    tokenizer: Any, tmp_path: Path, answer: str
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = {"messages": messages([("user", "x"), ("assistant", answer), ("user", "y"), ("assistant", answer)])}
    found = learnt_texts(tokenizer, chat_tasks(tokenizer, template, tmp_path).encode("talk", row))
    assert found == [f"{answer}\n", f"{answer}\n"]


def test_arguments_that_a_call_does_not_have_are_not_learnt(tokenizer: Any, tmp_path: Path) -> None:
    """A table gives every call the arguments of all, without a value."""
    calls = "{{ '<|im_start|>assistant\n' + (m.tool_calls | tojson) + '<|im_end|>\n' }}"
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m.tool_calls %}" + calls + "{% else %}"
    ).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    rows = [
        {"messages": [
            {"role": "user", "content": f"q{row}"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        ]}
        for row, arguments in enumerate([{"zip": 5}, {"city": {"name": "x"}}, {"city": {"part": "y"}}, {"zip": 7}])
    ]  # fmt: skip
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ChatTasks([{"name": "talk", "path": str(tmp_path)}], tokenizer=own, cache_dir=str(tmp_path / "cache"))
    data.setup()
    samples = data.splits["talk"]["train"].samples
    for place, row in enumerate(rows):
        ids = data.encode("talk", row)["input_ids"]
        assert list(samples.input_ids[place]) == ids
        assert "null" not in tokenizer.decode(ids)
