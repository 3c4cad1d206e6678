"""What an answer is, whatever of a row is learnt: its tokens, what closes it, and its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fusionlab import ChatTasks
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.errors import InputError

from .conftest import CHATML
from .test_templates import MARKED, chat_tasks, learnt_texts, messages

THINKING = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m['content'] + '<|im_end|>\\n' }}{% else %}",
).replace("{% endfor %}", "{% endif %}{% endfor %}")
PART_MARKED = MARKED.replace(
    "{% generation %}{{ '<|im_start|>assistant\\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
)
NO_HEADER = CHATML.partition("{% if add_generation_prompt %}")[0]
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
UNCLOSED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}assistant: "
UNCLOSED = UNCLOSED.replace("assistant: ", "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
TALK = [("user", "a film"), ("assistant", "one"), ("user", "and?"), ("assistant", "two")]
ROWS = [{"sentence": f"film {place} seen", "label": place % 2} for place in range(6)]
RANKED = {"input_columns": ["sentence"], "label_words": ["yes", "no"]}


def loaded(tokenizer: Any, folder: Path, rows: list[dict[str, Any]], task: dict[str, Any], **options: Any) -> ChatTasks:
    folder = folder / "tables"
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks: list[str | dict[str, Any]] = [{"name": "own", "path": str(folder), **task}]
    data = ChatTasks(tasks, tokenizer=tokenizer, cache_dir=str(folder.parent / "cache"), **options)
    data.setup()
    return data


def with_template(tokenizer: Any, template: str | None, *more: str) -> Any:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    own.add_tokens(list(more))
    return own


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHATML, {"assistant_only_loss": False}),
        (None, {"completion_only_loss": False}),
        (PART_MARKED, {}),
        (MARKED, {}),
    ],
    ids=["all messages", "prompts too", "marks without the end", "marks with the header"],
)
def test_label_words_are_ranked_by_the_answer_alone(
    tokenizer: Any, tmp_path: Path, template: str | None, options: dict[str, Any]
) -> None:
    own = with_template(tokenizer, template)
    task = loaded(own, tmp_path, ROWS, RANKED, **options).tasks["own"]
    assert [own.decode(answer) for answer in task.answer_ids] == ["yes<|im_end|>", "no<|im_end|>"]
    assert task.num_closing == (1, 1)


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"assistant_only_loss": False}, {"instruction": "a film", "choices": ["yes", "no"]}),
        ({"completion_only_loss": False}, {"prompt": "a film:", "choices": ["yes", "no"]}),
    ],
)
def test_choices_are_ranked_by_the_answer_alone(
    tokenizer: Any, tmp_path: Path, options: dict[str, Any], row: dict[str, Any]
) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    data = chat_tasks(tokenizer, CHATML, tmp_path, prompts=str(tmp_path / "asked.jsonl"), **options)
    (batch,) = data.predict_dataloader()
    assert [tokenizer.decode(ids) for ids in batch["choices"][0]] == ["yes<|im_end|>", "no<|im_end|>"]


def test_choices_that_are_not_whole_within_the_limit_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "x:", "choices": [" one two three", " yes"]}))
    data = chat_tasks(tokenizer, None, tmp_path, prompts=str(tmp_path / "asked.jsonl"), max_length=5)
    with pytest.raises(InputError, match=r"line 1: the prompt with its choice ' one two three' has \d+ tokens, max_l"):
        data.predict_dataloader()


@pytest.mark.parametrize(
    ("template", "closing"), [(CHATML, 1), (SPACED, 2), (UNCLOSED, 1)], ids=["end", "space and end", "none"]
)
def test_what_closes_an_answer_is_counted(tokenizer: Any, tmp_path: Path, template: str, closing: int) -> None:
    own = with_template(tokenizer, template)
    task = loaded(own, tmp_path, ROWS, RANKED).tasks["own"]
    assert task.num_closing == (closing, closing)
    tree = AnswerTree.of(task.answer_ids, None, task.num_closing)
    assert [own.decode(word).strip() for word in tree.words] == ["yes", "no"]


def test_words_without_their_ends_are_ranked_without_all_that_closes_them() -> None:
    tree = AnswerTree.of([(5, 6, 2), (7, 8, 2)], None, [2, 0])
    of_tokens = -torch.tensor([[[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]])
    for ranking, expected in (("whole", [-7, -7]), ("without_end", [-1, -7]), ("per_token", [-1, -7 / 3])):
        found = tree.ranked_by(of_tokens, ranking, ["a", "b"])
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


def test_generation_stops_at_the_end_and_not_at_what_a_template_puts_before_an_answer(
    tokenizer: Any, tmp_path: Path
) -> None:
    own = with_template(tokenizer, THINKING, "<think>", "</think>")
    rows = [{"messages": messages([("user", f"film {place}"), ("assistant", "yes")])} for place in range(3)]
    data = loaded(own, tmp_path, rows, {})
    assert own.decode(data.tasks["own"].end_ids) == "<|im_end|>"
    found = learnt_texts(own, data.encode("own", {"messages": messages(TALK)}))
    assert found == ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]
    answers = data.splits["own"]["test"].samples.answers
    assert set(answers) == {"<think>\n\n</think>\n\nyes"}  # what generating just what was learnt gives
    rows = [{"messages": [*row["messages"], {"role": "user", "content": "thanks"}]} for row in rows]
    assert set(loaded(own, tmp_path, rows, {}).splits["own"]["test"].samples.answers) == {"yes"}  # as it stands there


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"role": "user", "content": "x"}, r"rows of train cannot be learnt .*messages must be a list of"),
        (7, r"rows of train cannot be learnt .*messages must be a list of"),
        ([{"role": "user", "content": "x", "at": datetime(2026, 1, 2)}, {"role": "assistant", "content": "y"}], None),
    ],
    ids=["one", "a number", "with times"],
)
def test_splits_are_carved_whatever_messages_are(
    tokenizer: Any, tmp_path: Path, said: Any, message: str | None
) -> None:
    makes: dict[type, Callable[[int], Any]] = {
        int: lambda place: place,
        dict: lambda place: {**said, "content": f"x {place}"},
        list: lambda place: [{**said[0], "content": f"x {place}"}, *said[1:]],
    }
    rows = [{"messages": makes[type(said)](place)} for place in range(60)]
    Dataset.from_list(rows).to_parquet(tmp_path / "own.parquet")
    tasks: list[str | dict[str, Any]] = [{"name": "own", "path": str(tmp_path / "own.parquet")}]
    own = with_template(tokenizer, CHATML)
    data = ChatTasks(tasks, tokenizer=own, cache_dir=str(tmp_path / "cache"))
    if message is None:
        data.setup()
        assert sum(len(split) for split in data.splits["own"].values()) == 60
    else:
        with pytest.raises(InputError, match=message):
            data.setup("fit")


def test_a_row_of_which_a_template_marks_nothing_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    unmarked = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    for turns in (TALK, [*TALK, ("user", "bye")]):
        with pytest.raises(InputError, match="no token is left to learn"):
            chat_tasks(tokenizer, unmarked, tmp_path).encode("talk", {"messages": messages(turns)})


def test_an_end_that_is_no_token_is_no_part_of_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    own = with_template(tokenizer, CHATML.replace("<|im_end|>", "<end>"))
    rows = [{"messages": messages([("user", f"film {place}"), ("assistant", "yes")])} for place in range(3)]
    assert set(loaded(own, tmp_path, rows, {}).splits["own"]["test"].samples.answers) == {"yes"}


@pytest.mark.parametrize("completion", [" yes", " yes<|im_end|>"])
def test_an_answer_is_compared_without_its_end(tokenizer: Any, tmp_path: Path, completion: str) -> None:
    rows = [{"prompt": f"film {place}:", "completion": completion} for place in range(3)]
    data = loaded(tokenizer, tmp_path, rows, {})
    assert data.splits["own"]["test"].samples.answers == (" yes",) * 3


def test_marks_take_the_end_of_the_answer_along(tokenizer: Any, tmp_path: Path) -> None:
    data = chat_tasks(tokenizer, PART_MARKED, tmp_path)
    assert learnt_texts(tokenizer, data.encode("talk", {"messages": messages(TALK)})) == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]


def test_a_header_that_a_template_gives_no_prompt_is_part_of_prompts(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, said = chat_tasks(tokenizer, NO_HEADER, tmp_path), messages(TALK)
    encoded = data.encode("talk", {"messages": said})
    assert learnt_texts(tokenizer, encoded) == ["one<|im_end|>", "two<|im_end|>"]
    assert tokenizer.decode(encoded["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert encoded["prompt_ids"] == data.encoder.encode_prompt(said[:-1])
    assert caplog.text.count("not where one is asked for (add_generation_prompt)") == 1
    assert data._end_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_a_last_answer_beyond_the_limit_is_learnt_around_and_not_scored(tokenizer: Any, tmp_path: Path) -> None:
    said = messages([("user", "x"), ("assistant", "yes"), ("user", "film " * 30), ("assistant", "no")])
    row = {"messages": said}
    data = chat_tasks(tokenizer, CHATML, tmp_path, max_length=30)
    assert learnt_texts(tokenizer, data.encode("talk", row)) == ["yes<|im_end|>"]
    with pytest.raises(
        InputError, match=r"the last answer of 3 of 3 rows of \w+ begins beyond max_length 30, .* row 0"
    ):
        loaded(tokenizer, tmp_path, [row] * 3, {}, max_length=30)
    assert len(loaded(tokenizer, tmp_path, [row] * 3, {"metric": "perplexity"}, max_length=30).splits["own"]["test"])
