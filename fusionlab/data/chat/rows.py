"""Rows of instruction data as what is said: a conversation, a prompt with its completion, or a bare text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusionlab.errors import InputError, name_list

Message = dict[str, Any]
FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that each format needs, in the order in which they are looked for."""


class NothingToLearnError(InputError):
    """A row in which no token is left to learn; other faults of a row are plain :class:`InputError`."""


@dataclass(frozen=True)
class Conversation:
    """Messages, of which those from ``completion`` on complete the ones before them; 0 where nothing is a prompt.

    ``given`` is what the template is given beside them: the row's ``tools`` and ``chat_template_kwargs``.
    """

    messages: tuple[Message, ...]
    completion: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plain:
    """A prompt and its completion as they stand."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text that is learnt as a whole."""

    text: str


Said = Conversation | Plain | Text


def find_format(columns: Iterable[str]) -> str | None:
    """The first of :data:`FORMATS` whose columns are all there; None where there is none."""
    columns = set(columns)
    return next((name for name, needed in FORMATS.items() if columns.issuperset(needed)), None)


def read_row(row: Mapping[str, Any], kind: str, *, templated: bool, system: str | None, templates_plain: bool) -> Said:
    """What one row says.

    Args:
        row: the row by column.
        kind: one of :data:`FORMATS`.
        templated: whether there is a chat template that instructions can go through.
        system: put before conversations that begin otherwise; None for nothing.
        templates_plain: whether a plain prompt and completion go through the template too.

    Raises:
        InputError: the row is of another format, or a value is of another type than its column says.
        NothingToLearnError: the completion is empty or white space, or nobody answers.
    """
    said = _said(row, kind, templated, system, templates_plain)
    return replace(said, given=given_values(row)) if isinstance(said, Conversation) else said


def given_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives the template beside messages: ``tools``, and what ``chat_template_kwargs`` names.

    Either may be JSON text, which alone keeps what has no value: tables give each entry the keys of all.

    Raises:
        InputError: tools that are no list of mappings, or other arguments that are no mapping.
    """
    tools, named = (_parsed(row.get(column), column) for column in ("tools", "chat_template_kwargs"))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"tools must be a list of mappings, got {tools!r}")
    if named and not isinstance(named, Mapping):
        raise InputError(f"chat_template_kwargs must be a mapping, got {named!r}")
    return {**(named or {}), **({"tools": tools} if tools else {})}


def _parsed(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return _with_values(value)
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{column} is text, but no JSON: {error}") from error


def _said(row: Mapping[str, Any], kind: str, templated: bool, system: str | None, templates_plain: bool) -> Said:
    missing = [column for column in FORMATS[kind] if column not in row]
    others = [name for name in FORMATS if name != kind and all(row.get(column) is not None for column in FORMATS[name])]
    if missing or (others and all(row.get(column) is None for column in FORMATS[kind])):
        found = f"has the columns of {name_list(others)}" if others else f"lacks {name_list(missing)}"
        raise InputError(f"mixed formats: the task's rows are {kind!r}, and this one {found}; split them into tasks")
    if kind == "messages":
        return _conversation(_messages(row["messages"], "messages"), 0, system)
    if kind == "text":
        return Text(_string(row["text"], "text", "empty text"))
    if kind == "instruction":
        return _instruction(row, templated, system)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and (completion is None or isinstance(completion, str)):
        answer = _string(completion, "completion", "empty completion")
        if not templates_plain:
            return Plain(prompt, answer)
        return _conversation([_message("user", prompt), _message("assistant", answer)], 1, system)
    if completion is None or completion == []:
        raise NothingToLearnError("empty completion")
    said = [_message("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
    answers = (
        [_message("assistant", completion)] if isinstance(completion, str) else _messages(completion, "completion")
    )
    return _conversation([*said, *answers], len(said), system)


def answered(
    asked: Sequence[Message] | str, answer: str, given: Mapping[str, Any] | None = None
) -> Conversation | Plain:
    """A question, as messages or as text, with its answer."""
    if isinstance(asked, str):
        return Plain(asked, answer)
    return Conversation((*asked, _message("assistant", answer)), len(asked), given or {})


def question(content: str, templated: bool, system: str | None) -> tuple[Message, ...] | str:
    """A question that waits for its answer: as messages where there is a template, else as text with its newline."""
    if not templated:
        return f"{content}\n"
    return _with_system([_message("user", content)], system)


def read_question(
    row: Mapping[str, Any], *, templated: bool, system: str | None, templates_plain: bool
) -> tuple[Message, ...] | str:
    """What one row asks: its ``messages``, its ``prompt`` (a text, or messages), or its ``instruction``.

    Arguments as of :func:`read_row`.

    Raises:
        InputError: the row has none of them, or ends in an answer.
    """
    given = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if isinstance(given, str):
        return _with_system([_message("user", given)], system) if templates_plain else given
    if given is None:
        if row.get("instruction") is None:
            raise InputError("a row needs messages, a prompt or an instruction")
        return question(_asked(row), templated, system)
    messages = _messages(given, "messages")
    if messages[-1]["role"] == "assistant":
        raise InputError("the last message is the assistant's, so that nothing waits for an answer")
    return _with_system(messages, system)


def _instruction(row: Mapping[str, Any], templated: bool, system: str | None) -> Said:
    output = _string(row["output"], "output", "empty completion")
    return answered(question(_asked(row), templated, system), output)


def _asked(row: Mapping[str, Any]) -> str:
    """The instruction, and its input on a line of its own where there is one."""
    instruction, more = _string(row["instruction"], "instruction", "empty instruction"), row.get("input")
    if more is not None and not isinstance(more, str):
        raise InputError(f"input must be text or empty, got {more!r}")
    return f"{instruction}\n{more}" if more and more.strip() else instruction


def _conversation(messages: Sequence[Message], completion: int, system: str | None) -> Conversation:
    said = _with_system(messages, system)
    completion += (len(said) - len(messages)) * bool(completion)
    answers = [message for message in said[completion:] if message["role"] == "assistant"]
    if not answers:
        raise NothingToLearnError("no answer to learn: no message of the assistant")
    if any(not (message.get("content") or "").strip() and not message.get("tool_calls") for message in answers):
        raise NothingToLearnError("empty completion: a message of the assistant has no content")
    return Conversation(said, completion)


def _with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    if system is None or messages[0]["role"] in ("system", "developer"):  # two names of one
        return tuple(messages)
    return (_message("system", system), *messages)


def _messages(value: Any, column: str) -> list[Message]:
    """The messages of a row.

    Keys without a value are left out, also in tool calls: tables give each of them all. The arguments of a call keep
    theirs as JSON text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{column} must be a list of {{role, content}}, got {value!r}")
    messages = []
    for entry in value:
        if not isinstance(entry, Mapping):
            raise InputError(f"{column} must be a list of {{role, content}}, got the entry {entry!r}")
        message = _with_values(entry)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise InputError(f"a message of {column} has no role: {entry!r}")
        if isinstance(content, list):
            raise InputError(f"the content of a message ({role}) is a list of parts; only text can be learnt here")
        if content is not None and not isinstance(content, str):
            raise InputError(f"the content of a message ({role}) must be text, got {content!r}")
        if content is None and not message.get("tool_calls"):
            if role == "assistant":
                raise NothingToLearnError("empty completion: a message of the assistant has no content")
            raise InputError(f"a message of {column} ({role}) has no content")
        messages.append(message)
    return messages


def _with_values(value: Any) -> Any:
    """A mapping without the keys that have no value, at any depth."""
    if isinstance(value, Mapping):
        return {key: _with_values(within) for key, within in value.items() if within is not None}
    return [_with_values(within) for within in value] if isinstance(value, list) else value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(value: Any, column: str, empty: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{column} must be text, got {value!r}")
    if value is None or not value.strip():
        raise NothingToLearnError(empty)
    return value
