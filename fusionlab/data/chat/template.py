"""Chat templates: conversations as text, and where in it an answer begins and ends.

Both follow from how the template writes the conversation up to there, never from looking for a marker in the text.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionlab.data.chat.cutting import Cutter, Span
from fusionlab.data.chat.marks import has_marks
from fusionlab.data.chat.rows import Message
from fusionlab.data.tables import decoded
from fusionlab.errors import InputError, name_list

_EXAMPLES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "x"}],
    [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}],
)
"""Conversations that wait for an answer, one of which a template takes."""
_UNWRITTEN = "which the chat template does not write; leave such rows out, or use another one (chat_template_path)"
_log = logging.getLogger(__name__)
_DATE_PARTS = re.compile(r"(?<!\{)%-?[aAbBcdDFGHIjmMpSTuUVwWxXyYzZ]")


class Template:
    """A chat template.

    Args:
        source: in Jinja, as transformers runs it: in a sandbox.
        cutter: the tokenizer whose special tokens it writes.
        moment: what it takes for now where it writes the date.
    """

    def __init__(self, source: str, cutter: Cutter, moment: datetime) -> None:
        self.source, self.cutter = with_date(source, moment), cutter
        self.has_marks = has_marks(source)
        self._given: Mapping[str, Any] = {}

    def reading(self, messages: Sequence[Message], given: Mapping[str, Any]) -> Template:
        """The template as it writes these messages, given a row's ``tools`` and ``chat_template_kwargs`` beside them.

        Raises:
            InputError: it does not write the row's tools or tool calls, or does not read what the row names.
        """
        named = {name: value for name, value in given.items() if name != "tools"}
        if unread := [name for name in named if not re.search(rf"\b{re.escape(name)}\b", self.source)]:
            raise InputError(
                f"chat_template_kwargs names {name_list(unread)}, which the chat template does not read; leave it out, "
                f"or use another template (chat_template_path)"
            )
        template = self._given_these(given)
        if "tools" in given and template.write(messages) == self._given_these(named).write(messages):
            raise InputError(f"the row has tools, {_UNWRITTEN}")
        template._check_tool_calls(messages)
        return template

    def _given_these(self, given: Mapping[str, Any]) -> Template:
        if not given:
            return self
        other = copy.copy(self)
        other._given = given
        for found in ("_around", "_unasked_header", "end_token", "end"):  # without these values
            vars(other).pop(found, None)
        return other

    def write(self, messages: Sequence[Message], *, asking: bool = False) -> str:
        """The conversation as text; ``asking`` for an answer it ends in the header of one.

        Raises:
            InputError: the template fails on it.
        """
        text = self._render(messages, asking, marks=False)[0]
        return text + self._unasked_header if asking else text

    def write_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters between ``{% generation %}`` marks."""
        return self._render(messages, asking=False, marks=True)

    def _render(self, messages: Sequence[Message], asking: bool, marks: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise InputError("the conversation begins with an answer; nothing comes before it")
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                add_generation_prompt=asking,
                return_assistant_tokens_mask=marks,
                **{**self.cutter.tokenizer.special_tokens_map, **self._given},
            )
        except Exception as error:  # a template is a program, which can raise whatever it likes
            raise InputError(f"the chat template refuses it: {' '.join(str(error).split())}") from error
        return texts[0], spans[0] if marks else []

    @cached_property
    def _around(self) -> tuple[str, str, str | None]:
        """What is written before an answer and not where one is asked for, and what is written behind an answer.

        The former is the header of an answer where the template has one and takes no ``add_generation_prompt``, or
        what a last answer opens with, such as an empty block of thinking; one of both is empty. The latter is None
        where it is not known.
        """
        for asked in _EXAMPLES:
            try:
                before, header = (self._render(asked, asking, marks=False)[0] for asking in (False, True))
                said, other = (self.write([*asked, {"role": "assistant", "content": answer}]) for answer in "yz")
            except InputError:
                continue
            begin, end = said[: _common(said, other)], said[len(said) - _common(said[::-1], other[::-1]) :]
            if said == other or not begin.startswith(header):
                return "", "", None if said == other else end
            more = begin[len(header) :]
            return (more, "", end) if header == before and more.strip() else ("", more, end)
        return "", "", None

    @cached_property
    def _unasked_header(self) -> str:
        """The header of an answer that is not written where one is asked for, which is told."""
        header = self._around[0]
        if header and not self._given:
            _log.warning(
                "the chat template writes %r before an answer, but not where one is asked for (add_generation_prompt); "
                "prompts end in it here",
                header,
            )
        return header

    @property
    def opening(self) -> str:
        """What is written between the header of an answer that nothing comes after and its content."""
        return self._around[1]

    @property
    def closing(self) -> str:
        """What is written behind an answer that nothing comes after."""
        return self._around[2] or ""

    @property
    def is_open(self) -> bool:
        """Whether nothing at all is written there, so that an answer would never end."""
        return self._around[2] == ""

    @property
    def end_text(self) -> str:
        """The text that ends a generated answer where no special token does so before it; empty where none does."""
        before = self.closing.partition(self.end)[0] if self.closes else self.closing
        return before.strip() or ("" if self.closes else before)

    @cached_property
    def end_token(self) -> int | None:
        """The first special token that is written behind an answer; None where there is none."""
        return next((token for token in self.cutter.tokens(self.closing) if token in self.cutter.special), None)

    @property
    def closes(self) -> bool:
        """Whether a special token closes an answer; where none does, one that an answer holds itself is no end."""
        return self.end_token is not None

    @cached_property
    def end(self) -> str:
        """That token as text; empty where there is none."""
        return "" if self.end_token is None else self.cutter.tokenizer.decode([self.end_token])

    def begin_of(self, messages: Sequence[Message], position: int, text: str) -> int:
        """The character of ``text``, which is the whole conversation, at which the message in ``position`` begins.

        That of an answer begins behind its header.

        Raises:
            InputError: the template writes what comes before it in another way once the conversation goes on.
        """
        before = self.write(messages[:position], asking=messages[position]["role"] == "assistant")
        if not before:
            raise InputError("the chat template writes nothing before an answer, so that no prompt comes before it")
        if not text.startswith(before):
            raise InputError(
                f"the chat template writes what comes before message {position + 1} in another way once the "
                f"conversation goes on, so that the prompt of that answer is no part of the text; split the "
                f"conversation, or use another template (chat_template_path)"
            )
        return len(before)

    def end_of(self, messages: Sequence[Message], position: int, text: str, begin: int) -> int:
        """The character after what closes the answer in ``position``, which begins at ``begin``.

        Raises:
            InputError: the template writes the answer in another way once the conversation goes on.
        """
        through = self.write(messages[: position + 1])
        if text.startswith(through):
            return len(through)
        # some templates add to a last answer: then an earlier one ends where its turn is closed, before the place at
        # which two other messages after it would differ
        content = messages[position].get("content", "")
        following = [[*messages[: position + 1], {**messages[position + 1], "content": other}] for other in "xy"]
        first, second = (self.write(conversation) for conversation in following)
        follows = _common(first, second) if first != second else 0
        closed = text.rfind(self.end, begin, follows) if self.end else -1
        if closed < 0 or not content.strip() or not text.startswith((content, content.strip()), begin):
            raise InputError(
                f"the chat template writes message {position + 1} in another way once the conversation goes on, so "
                f"that it does not tell where that answer ends; split the conversation, or use a template with "
                f"{{% generation %}} marks (chat_template_path)"
            )
        return closed + len(self.end)

    def _check_tool_calls(self, messages: Sequence[Message]) -> None:
        if not any(message.get("tool_calls") for message in messages):
            return
        without = [{"content": ""} | message for message in messages]
        for message in without:
            message.pop("tool_calls", None)
        if self.write(messages) == self.write(without):
            raise InputError(f"a message has tool_calls, {_UNWRITTEN}")


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with that are the same."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def read_template(given: str) -> str | None:
    """The template in a file; None for ``none``.

    Raises:
        InputError: it is not utf-8.
    """
    if given == "none":
        return None
    return decoded(Path(given).expanduser().read_bytes(), f"data.chat_template_path: {given}").replace("\r\n", "\n")


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's chat template, its default one where there are several; None where there is none.

    Raises:
        InputError: there are several, and none is called so.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict) and "default" not in own:
        raise InputError(
            f"the tokenizer has several chat templates and no default one: {name_list(own)}; give one as a file "
            f"(chat_template_path)"
        )
    return tokenizer.get_chat_template() if own else None


def with_date(source: str, moment: datetime) -> str:
    """``source`` with a fixed date where it would write today's, so that all of a run's samples have one.

    Example:
        >>> with_date("{{ strftime_now('%Y') }}", datetime(2026, 1, 2)).split("in ")[1].split(".items")[0]
        "{'%Y': '2026'}"
    """
    if "strftime_now" not in source:
        return source
    known = {part: moment.strftime(part) for part in sorted(set(_DATE_PARTS.findall(source)))}
    return (
        "{%- macro strftime_now(format) -%}{%- set now = namespace(text=format) -%}"
        f"{{%- for part, value in {known!r}.items() -%}}{{%- set now.text = now.text.replace(part, value) -%}}"
        f"{{%- endfor -%}}{{{{ now.text }}}}{{%- endmacro %}}\n{source}"
    )
