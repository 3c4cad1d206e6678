"""What a user gives beside rows: a tokenizer in the place of the model's, and the date that templates write."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from datetime import date as day
from datetime import datetime, time
from pathlib import Path
from typing import Any

from fusionlab.backbones.tokenizers import read_tokenizer
from fusionlab.contracts import Tokenizing
from fusionlab.errors import InputError
from fusionlab.tensors import hub

_log = logging.getLogger(__name__)


def moment_of(date: str | None) -> datetime:
    """What templates take for now: the date, else today; at midnight where no time is said.

    Raises:
        InputError: it is no date.
    """
    if date is None:
        return datetime.combine(day.today(), time())
    try:
        return datetime.fromisoformat(date)
    except ValueError as error:
        raise InputError(f"data.date must be a date such as 2026-01-31, got {date!r}") from error


def given_tokenizer(given: Any, *, changes: bool) -> Any:
    """The tokenizer that was given: read from a folder or the hub, or loaded already.

    Args:
        given: folder, hub id, or tokenizer.
        changes: whether it is to be changed, so that one that is loaded is copied.

    Raises:
        InputError: none there.
    """
    if not isinstance(given, str | Path):
        return copy.deepcopy(given) if changes else given
    try:
        folder = hub.embedded(str(given)) or hub.resolve(str(given), weights=False)
    except InputError as error:
        raise InputError(f"data.tokenizer: {error}") from error
    return read_tokenizer({"pretrained_model_name_or_path": str(folder)}, f"data.tokenizer: {str(given)!r}")


def check_same_tokens(tokenizer: Any, backbone: Tokenizing, name: str) -> None:
    """Raise unless the tokenizer's tokens, and what ends an answer, are those that the model has ids for.

    Args:
        tokenizer: the one that was given.
        backbone: the model's.
        name: what the model is called.

    Raises:
        InputError: with both names, and what differs.
    """
    own, theirs = backbone.tokenizer.get_vocab(), tokenizer.get_vocab()
    same = own == theirs
    if same and tokenizer.eos_token_id == backbone.tokenizer.eos_token_id:
        return
    more = len({token for token, place in theirs.items() if own.get(token) != place})
    told = f"ends texts by {tokenizer.eos_token!r}, the model's by {backbone.tokenizer.eos_token!r}"
    if not same:
        told = f"has {len(theirs)} tokens, of which {more} have other ids than in the model's, which has {len(own)}"
    raise InputError(
        f"data.tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__!r} is not the tokenizer of the model "
        f"{name!r}: it {told}; leave data.tokenizer out, or give the model's with its template in chat_template_path"
    )


def check_needed(template: str | None, options: Mapping[str, Any]) -> None:
    """Raise if options are given that do nothing without a chat template, and there is none.

    Args:
        template: the one there is.
        options: by name.

    Raises:
        InputError: naming the first.
    """
    for name, value in options.items():
        if template is None and value:
            raise InputError(
                f"{name} needs a chat template, and the tokenizer has none; give chat_template_path, or leave it out"
            )


def warn_of_system(task: str, kind: str, table: Any, *, templates_plain: bool) -> None:
    """Say that a system message does nothing where a task's rows are texts, which go through no template.

    Args:
        task: its name.
        kind: of its rows.
        table: its rows, at least one.
        templates_plain: whether texts go through the template too.
    """
    if kind == "text" or (kind == "completion" and not templates_plain and isinstance(table[0]["prompt"], str)):
        more = "" if kind == "text" else ", or put them through the chat template (data.apply_chat_template)"
        _log.warning("data.system does nothing for task %r, whose rows are plain texts; leave it out%s", task, more)
