"""What encoded rows are checked for: that all can be learnt, that answers are whole; and how they are shown."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from fusionlab.backbones.tokenizers import Frame
from fusionlab.data.chat.encoding import IGNORED
from fusionlab.data.chat.split import Samples
from fusionlab.data.chat.tables import EncodedTable
from fusionlab.errors import InputError, name_list

_log = logging.getLogger(__name__)


def report_rows(
    encoded: EncodedTable, numbers: np.ndarray, where: tuple[str, str], *, skips_empty: bool, max_length: int
) -> None:
    """Refuse rows that cannot be learnt, or count them; count those that were cut.

    Args:
        encoded: the rows.
        numbers: their numbers in the data.
        where: task and split.
        skips_empty: rows with nothing to learn are left out, unless all are.
        max_length: tokens of a sample at most.

    Raises:
        InputError: counting and naming the rows.
    """
    total = len(numbers)
    faults = [f"row {numbers[row]}: {reason}" for row, reason, empty in encoded.faults if not empty]
    empty = [f"row {numbers[row]}: {reason}" for row, reason, empty in encoded.faults if empty]
    if faults or len(empty) == total or (empty and not skips_empty):
        refused = [*faults, *(empty if not skips_empty or not faults else ())]
        hint = "mend them" if faults or len(empty) == total else "mend them, or leave them out (data.on_empty skip)"
        raise InputError(
            f"task {where[0]!r}: {len(refused)} of {total} rows of {where[1]} cannot be learnt (counted from 0): "
            f"{name_list(refused)}; {hint}"
        )
    if empty:
        _log.warning(
            "%d of %d rows of task %r (%s) have nothing to learn and were left out: %s",
            *(len(empty), total, *where, name_list(empty)),
        )
    if cut := encoded.num_cut:
        _log.warning(
            "%d of %d samples of task %r (%s) are longer than max_length %d and were cut; raise data.max_length",
            *(cut, total, *where, max_length),
        )


def check_words(
    samples: Samples, answers: Sequence[tuple[int, ...]], task: str, numbers: np.ndarray, max_length: int
) -> None:
    """Raise unless just the tokens that its label word is ranked by come after each sample's prompt.

    Args:
        samples: of a ranked task; of others ``answers`` is empty.
        answers: the tokens of each label word.
        task: its name.
        numbers: the samples' row numbers in the data.
        max_length: tokens of a sample at most.

    Raises:
        InputError: naming the row.
    """
    for row, target in enumerate(samples.targets.tolist() if answers else ()):
        prompt = len(samples.prompts[row])
        if tuple(samples.input_ids[row][prompt : prompt + len(answers[target])].tolist()) != answers[target]:
            raise InputError(
                f"task {task!r}: the answer of row {numbers[row]} is not whole within max_length {max_length} "
                f"({prompt} tokens of prompt); raise data.max_length"
            )


def check_prompts(samples: Samples, where: tuple[str, str], numbers: np.ndarray, max_length: int) -> None:
    """Raise if a prompt is longer than what is read of its sample: its answer would be scored, but is no part of it.

    Args:
        samples: whose last answers are scored.
        where: task and split.
        numbers: the samples' row numbers in the data.
        max_length: tokens of a sample at most.

    Raises:
        InputError: naming the rows.
    """
    lengths = samples.prompts.lengths.tolist()
    beyond = [f"row {numbers[row]}: its prompt has {length} tokens" for row, length in enumerate(lengths)
              if length >= max_length]  # fmt: skip
    if beyond:
        raise InputError(
            f"task {where[0]!r}: the last answer of {len(beyond)} of {len(lengths)} rows of {where[1]} begins beyond "
            f"max_length {max_length}, so that it cannot be scored (counted from 0): {name_list(beyond)}; raise "
            f"data.max_length, or split the conversations"
        )


def report_ends(samples: Samples, where: tuple[str, str], frame: Frame) -> None:
    """Count answers that hold the text which ends generated ones, so that none of these can be right.

    Args:
        samples: whose answers are compared with generated ones.
        where: task and split.
        frame: what the template writes around a generated answer.
    """
    held = sum(frame.answer(answer.rstrip()) != answer.rstrip() for answer in samples.answers)
    if held:
        _log.warning(
            "%d of %d answers of task %r (%s) hold %r, where generated ones end, as the chat template closes answers "
            "by no special token; they count as wrong. Use a template that does (data.chat_template_path)",
            *(held, len(samples.answers), *where, frame.end_text),
        )


def shown(samples: Samples, row: int, tokenizer: Any) -> str:
    """A sample as the model reads it, what is learnt between ⟦ and ⟧."""
    learnt = samples.labels[row] != IGNORED
    parts = []
    for is_learnt, group in groupby(zip(learnt, samples.input_ids[row], strict=True), key=itemgetter(0)):
        text = tokenizer.decode([int(token) for _, token in group], clean_up_tokenization_spaces=False)
        parts.append(f"⟦{text}⟧" if is_learnt else text)
    return "".join(parts)
