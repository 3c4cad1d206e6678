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


def with_templates(tokenizer: Any, templates: dict[str, str], folder: Path) -> ChatTasks:
    own = copy.deepcopy(tokenizer)
    own.chat_template = templates
    (folder / "rows.jsonl").write_text(json.dumps(ONE) + "\n")
    return ChatTasks([{"name": "talk", "path": str(folder / "rows.jsonl")}], tokenizer=own)


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
