"""What a template writes around an answer's content is no part of what is read, parsed or divided by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionlab import CausalModule
from fusionlab.backbones.tokenizers import Frame

from .conftest import CHATML
from .test_answers import RANKED, SPACED, THINKING, UNCLOSED, loaded, with_template
from .test_templates import learnt_texts, messages

ALPACA = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
TEXTUAL = CHATML.replace("<|im_end|>", "<end>")
FRAMES = {
    "a special token": (CHATML, Frame()),
    "a space and a special token": (SPACED, Frame()),
    "no special token": (TEXTUAL, Frame("", "<end>")),
    "a text before one": (CHATML.replace("<|im_end|>", "<end><|im_end|>"), Frame("", "<end>")),
    "white space": (ALPACA, Frame("", "\n\n")),
    "nothing": (UNCLOSED, Frame()),
    "after thinking": (THINKING, Frame("<think>\n\n</think>")),
    "a text after thinking": (THINKING.replace("<|im_end|>", "<end>"), Frame("<think>\n\n</think>", "<end>")),
}
TALK = [{"messages": messages([("user", f"film {place}"), ("assistant", "yes")])} for place in range(3)]


def saying(module: CausalModule, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backbone generate these texts, in turn."""
    tokens = [module.backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    monkeypatch.setattr(module.backbone, "generate", lambda ids, *more, **options: tokens[: len(ids)])


@pytest.fixture(scope="module")
def module(causal_folder: Callable[[str], Path]) -> CausalModule:
    return CausalModule(str(causal_folder("llama")))


def scored(module: CausalModule, data: Any, said: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scores of the test split where each of its answers is generated as ``said`` makes it."""
    module.prepare_tasks(data.tasks)
    (batch,) = data.eval_batches("own", "test")
    saying(module, [said(answer) for answer in batch["answer"]], monkeypatch)
    metrics = module.metrics("own")
    module.score("own", batch, metrics)
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize("case", FRAMES)
def test_generated_answers_end_where_the_template_ends_them(
    case: str, tokenizer: Any, module: CausalModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, frame = FRAMES[case]
    data = loaded(with_template(tokenizer, template), tmp_path, TALK, {})
    assert data.tasks["own"].frame == frame
    on = frame.end_text and f"{frame.end_text}\nuser\nand so on{frame.end_text}"
    assert scored(module, data, lambda answer: answer + on, monkeypatch) == {"exact_match": 1}
    assert scored(module, data, lambda answer: answer + "!" + on, monkeypatch) == {"exact_match": 0}
    assert ("end_text" in module.task_settings("own")) == bool(frame.end_text)


@pytest.mark.parametrize("case", FRAMES)
@pytest.mark.parametrize("closed", [True, False])
def test_scores_are_read_without_what_is_around_them(
    case: str, closed: bool, tokenizer: Any, module: CausalModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, frame = FRAMES[case]
    rows = [{"text": f"film {place}", "score": place / 2} for place in range(5)]
    data = loaded(
        with_template(tokenizer, template), tmp_path, rows, {"input_columns": ["text"], "target_column": "score"}
    )
    found = scored(module, data, lambda answer: answer + frame.end_text * closed, monkeypatch)
    assert found["unparsable"] == 0
    assert found["spearman"] == pytest.approx(1)
    assert ("opening" in module.task_settings("own")) == bool(frame.opening or frame.end_text)


@pytest.mark.parametrize("ranking", ["without_end", "per_token", "per_byte"])
def test_words_are_divided_by_their_own_length(tokenizer: Any, tmp_path: Path, ranking: str) -> None:
    """Each token of an answer costs one: what a template writes around all words is not counted."""
    from fusionlab.backbones.answer_tree import AnswerTree

    rows = [{"sentence": f"film {place}", "label": place % 2} for place in range(4)]
    words = {**RANKED, "label_words": ["no", "five or six"]}
    found, plain = (
        loaded(with_template(tokenizer, template), tmp_path, rows, words).tasks["own"]
        for template in (THINKING, CHATML)
    )
    assert (found.num_opening > 5, plain.num_opening) == (True, 0)
    trees = [AnswerTree.of(task.answer_ids, None, task.num_closing, task.num_opening) for task in (found, plain)]
    assert trees[0].words == trees[1].words
    of_tokens = [-tree.is_asked.float()[None] for tree in trees]
    scores = [tree.ranked_by(each, ranking, words["label_words"]) for tree, each in zip(trees, of_tokens, strict=True)]
    assert scores[0].equal(scores[1])
    sizes = {"without_end": 1, "per_token": len(trees[0].words[1]), "per_byte": len("five or six")}
    assert scores[0][0, 1].item() == pytest.approx(-len(trees[0].words[1]) / sizes[ranking])


def test_a_word_of_white_space_is_no_answer_after_thinking_either(
    tokenizer: Any, module: CausalModule, tmp_path: Path
) -> None:
    from fusionlab.errors import InputError

    template = THINKING.replace("m['content'] + '<", "m['content'] | trim + '<")
    rows = [{"sentence": f"film {place}", "label": place % 2} for place in range(4)]
    data = loaded(with_template(tokenizer, template), tmp_path, rows, {**RANKED, "label_words": ["yes", " "]})
    with pytest.raises(InputError, match="label word ' ' of task 'own' has no tokens"):
        module.prepare_tasks(data.tasks)


@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": False}])
def test_where_a_template_closes_no_answer_the_end_token_does(
    tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    own = with_template(tokenizer, UNCLOSED)
    data = loaded(own, tmp_path, TALK, {}, **options)
    encoded = data.encode("own", TALK[0])
    assert learnt_texts(own, encoded) == ["yes<|im_end|>" if not options else "user: film 0assistant: yes<|im_end|>"]
    assert own.decode(encoded["input_ids"]).count("<|im_end|>") == 1
    ends = [*TALK[0]["messages"][:-1], {"role": "assistant", "content": "yes<|im_end|>"}]
    assert data.encode("own", {"messages": ends}) == encoded
    goes_on = {"messages": [*TALK[0]["messages"], {"role": "user", "content": "and?"}]}
    assert "<|im_end|>" not in own.decode(data.encode("own", goes_on)["input_ids"])
    assert set(data.splits["own"]["test"].samples.answers) == {"yes"}


@pytest.mark.parametrize("turns", [(), (("user", "and?"),)])
def test_references_are_without_an_end_of_text_wherever_they_stand(
    tokenizer: Any, tmp_path: Path, turns: tuple[tuple[str, str], ...]
) -> None:
    rows = [{"messages": [*row["messages"], *messages(list(turns))]} for row in TALK]
    data = loaded(with_template(tokenizer, TEXTUAL), tmp_path, rows, {})
    assert set(data.splits["own"]["test"].samples.answers) == {"yes"}


def test_answers_that_hold_what_ends_one_are_counted(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = ["yes", "yes\n\nno", "no\n"]
    rows = [{"messages": messages([("user", "x"), ("assistant", answer)])} for answer in said]
    with caplog.at_level(logging.WARNING):
        loaded(with_template(tokenizer, ALPACA), tmp_path, rows, {})
    assert r"1 of 3 answers of task 'own' (test) hold '\n\n', where generated ones end" in caplog.text


def test_only_what_is_asked_of_a_frame_is_left_out() -> None:
    frame = Frame("<think>\n\n</think>", "\n")
    assert frame.answer("<think>\n\n</think>\n\nyes\nno") == "<think>\n\n</think>\n\nyes"
    assert frame.content("<think>hm</think> yes") == "<think>hm</think> yes"
    assert Frame().answer("a\nb") == "a\nb"
