"""Questions for ``predict``: a file of JSON rows, as batches that wait for their answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusionlab.backbones.tokenizers import Frame
from fusionlab.data.chat.cutting import refuse_halves
from fusionlab.data.chat.encoding import Encoder, shared_opening
from fusionlab.data.chat.rows import answered, given_values, read_question
from fusionlab.data.tables import lines_of
from fusionlab.data.tokens import Ragged
from fusionlab.errors import InputError

STDIN = "-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A row and its tokens.

    Args:
        row: as the file has it.
        prompt_ids: what waits for an answer.
        choices: tokens of the answers to rank, each with what closes it; empty where one is generated.
        num_closing: how many tokens close each.
        num_opening: how many the template writes before the content of all.
    """

    row: Mapping[str, Any]
    prompt_ids: list[int]
    choices: tuple[tuple[int, ...], ...] = ()
    num_closing: tuple[int, ...] = ()
    num_opening: int = 0


def read_questions(path: str, encoder: Encoder, system: str | None, templates_plain: bool = False) -> list[Question]:
    """The questions of a file of JSON rows, ``-`` for the standard input; blank lines are left out.

    A row says ``messages``, ``prompt`` or ``instruction`` (and ``input``); with ``choices``, a list of texts, these are
    ranked, else an answer is generated. A prompt that is a text is put through the template where ``templates_plain``.
    Messages may have ``tools`` and ``chat_template_kwargs`` beside them, as in training.

    Raises:
        InputError: a line that is no such row, by its number; no question at all; or a file that is not utf-8.
    """
    found = []
    for number, line in enumerate(lines_of(path, "data.prompts"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(f"expected a mapping, got {row!r}")
            found.append(_question(row, encoder, system, templates_plain))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"data.prompts: line {number} is not JSON: {error}") from error
        except InputError as error:
            raise InputError(f"data.prompts: line {number}: {error}") from error
    if not found:
        raise InputError(f"data.prompts: no question in {'the standard input' if path == STDIN else path!r}")
    return found


def _question(row: dict[str, Any], encoder: Encoder, system: str | None, templates_plain: bool) -> Question:
    refuse_halves(json.dumps(row, ensure_ascii=False))  # the row is written beside its answer
    templated = encoder.template is not None
    asked = read_question(row, templated=templated, system=system, templates_plain=templates_plain)
    given = given_values(row)
    prompt = encoder.encode_prompt(asked, given)
    if not prompt:
        raise InputError("the prompt is empty")
    if len(prompt) >= encoder.max_length:
        raise InputError(f"the prompt has {len(prompt)} tokens, max_length is {encoder.max_length}; raise it")
    choices = row.get("choices")
    if choices is None:
        return Question(row, prompt)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise InputError(f"choices must be a list of at least two texts, got {choices!r}")
    encoded = [encoder.encode(answered(asked, choice, given)) for choice in choices]
    answers = tuple(one.answer_ids for one in encoded)
    if len(set(answers)) < len(answers):
        raise InputError(f"two of the choices {choices!r} are the same tokens")
    for choice, one in zip(choices, encoded, strict=True):
        if one.num_tokens > encoder.max_length:
            raise InputError(
                f"the prompt with its choice {choice!r} has {one.num_tokens} tokens, max_length is "
                f"{encoder.max_length}; raise it"
            )
    return Question(row, prompt, answers, tuple(one.num_closing for one in encoded), shared_opening(encoded))


class PromptBatches:
    """Batches of questions in the order of the file.

    Args:
        questions: to answer.
        batch_size: questions in a batch.
        end_ids: tokens that end an answer beside those that the model itself says.
        frame: what the template writes around an answer.
    """

    def __init__(self, questions: list[Question], batch_size: int, end_ids: tuple[int, ...], frame: Frame) -> None:
        self.questions, self.batch_size, self.end_ids, self.frame = questions, batch_size, end_ids, frame
        self.answer_names = {name: _free_name(name, questions) for name in ("answer", "scores")}
        """What the columns of answers and of choices' scores are called: not as a column of the file."""

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.questions) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``prompt_ids`` and ``prompt_mask`` padded on the left; ``row``, ``choices``, ``num_closing`` and
        ``num_opening`` of each; ``end_ids``, ``frame`` and ``answer_names``."""
        for start in range(0, len(self.questions), self.batch_size):
            part = self.questions[start : start + self.batch_size]
            lengths = torch.tensor([len(question.prompt_ids) for question in part])
            longest = int(lengths.max())
            yield {
                "prompt_ids": Ragged.of([question.prompt_ids for question in part]).padded(
                    range(len(part)), 0, length=longest, left=True
                ),
                "prompt_mask": torch.arange(longest) >= longest - lengths[:, None],
                "row": [question.row for question in part],
                "choices": [question.choices for question in part],
                "num_closing": [question.num_closing for question in part],
                "num_opening": [question.num_opening for question in part],
                "end_ids": self.end_ids,
                "frame": self.frame,
                "answer_names": self.answer_names,
            }


def _free_name(name: str, questions: list[Question]) -> str:
    taken = {column for question in questions for column in question.row}
    free = name
    while free in taken:
        free = f"model_{free}"
    if free != name:
        _log.warning("data.prompts: the rows have %r of their own; what the model gives is written as %r", name, free)
    return free
