"""Questions for ``predict``: a file of JSON rows, as batches that wait for their answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusionlab.data.chat.cutting import refuse_halves
from fusionlab.data.chat.encoding import Encoder
from fusionlab.data.chat.rows import Conversation, Message, Plain, read_question
from fusionlab.data.tables import lines_of
from fusionlab.data.tokens import Ragged
from fusionlab.errors import InputError

STDIN = "-"


@dataclass(frozen=True)
class Question:
    """A row and its tokens.

    Args:
        row: as the file has it.
        prompt_ids: what waits for an answer.
        choices: tokens of the answers to rank, each with what closes it; empty where one is generated.
        num_closing: how many tokens close each.
    """

    row: Mapping[str, Any]
    prompt_ids: list[int]
    choices: tuple[tuple[int, ...], ...] = ()
    num_closing: tuple[int, ...] = ()


def read_questions(path: str, encoder: Encoder, system: str | None, templates_plain: bool = False) -> list[Question]:
    """The questions of a file of JSON rows, ``-`` for the standard input; blank lines are left out.

    A row says ``messages``, ``prompt`` or ``instruction`` (and ``input``); with ``choices``, a list of texts, these are
    ranked, else an answer is generated. A prompt that is a text is put through the template where ``templates_plain``.

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
    prompt = encoder.encode_prompt(asked)
    if not prompt:
        raise InputError("the prompt is empty")
    if len(prompt) >= encoder.max_length:
        raise InputError(f"the prompt has {len(prompt)} tokens, max_length is {encoder.max_length}; raise it")
    choices = row.get("choices")
    if choices is None:
        return Question(row, prompt)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise InputError(f"choices must be a list of at least two texts, got {choices!r}")
    encoded = [encoder.encode(_answered(asked, choice)) for choice in choices]
    answers = tuple(one.answer_ids for one in encoded)
    if len(set(answers)) < len(answers):
        raise InputError(f"two of the choices {choices!r} are the same tokens")
    for choice, one in zip(choices, encoded, strict=True):
        if one.num_tokens > encoder.max_length:
            raise InputError(
                f"the prompt with its choice {choice!r} has {one.num_tokens} tokens, max_length is "
                f"{encoder.max_length}; raise it"
            )
    return Question(row, prompt, answers, tuple(one.num_closing for one in encoded))


def _answered(asked: tuple[Message, ...] | str, answer: str) -> Conversation | Plain:
    if isinstance(asked, str):
        return Plain(asked, answer)
    return Conversation((*asked, {"role": "assistant", "content": answer}), len(asked))


class PromptBatches:
    """Batches of questions in the order of the file.

    Args:
        questions: to answer.
        batch_size: questions in a batch.
        end_ids: tokens that end an answer beside those that the model itself says.
    """

    def __init__(self, questions: list[Question], batch_size: int, end_ids: tuple[int, ...]) -> None:
        self.questions, self.batch_size, self.end_ids = questions, batch_size, end_ids

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.questions) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``prompt_ids`` and ``prompt_mask`` padded on the left; ``row``, ``choices`` and ``num_closing`` of each;
        ``end_ids``."""
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
                "end_ids": self.end_ids,
            }
