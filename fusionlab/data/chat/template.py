"""Chat templates: conversations as text, and where in it an answer begins and ends.

Both follow from how the template writes the conversation up to there, never from looking for a marker in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property

from fusionlab.data.chat.cutting import Cutter, Span
from fusionlab.data.chat.rows import Message
from fusionlab.errors import InputError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
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
        self.has_marks = _MARKS.search(source) is not None

    def write(self, messages: Sequence[Message], *, asking: bool = False) -> str:
        """The conversation as text; ``asking`` for an answer it ends in the header of one.

        Raises:
            InputError: the template fails on it.
        """
        return self._render(messages, asking, marks=False)[0]

    def write_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters between ``{% generation %}`` marks."""
        return self._render(messages, asking=False, marks=True)

    def _render(self, messages: Sequence[Message], asking: bool, marks: bool) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise InputError("the conversation begins with an answer; nothing comes before it")
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                add_generation_prompt=asking,
                return_assistant_tokens_mask=marks,
                **self.cutter.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"the chat template refuses it: {' '.join(str(error).split())}") from error
        return texts[0], spans[0] if marks else []

    @cached_property
    def end_token(self) -> int | None:
        """The special token that closes an answer; None where none does."""
        question: list[Message] = [{"role": "user", "content": "x"}]
        before = self.write(question, asking=True)
        whole = self.write([*question, {"role": "assistant", "content": "y"}])
        closing = self.cutter.tokens(whole[len(before) :]) if whole.startswith(before) else []
        return next((token for token in closing if token in self.cutter.special), None)

    def begin_of(self, messages: Sequence[Message], position: int, text: str) -> int:
        """The character of ``text``, which is the whole conversation, at which the answer in ``position`` begins.

        Raises:
            InputError: the template writes what comes before it in another way once the conversation goes on.
        """
        before = self.write(messages[:position], asking=True)
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
        follows = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)
        end = "" if self.end_token is None else self.cutter.tokenizer.decode([self.end_token])
        closed = text.rfind(end, begin, follows) if end else -1
        if closed < 0 or not content.strip() or not text.startswith((content, content.strip()), begin):
            raise InputError(
                f"the chat template writes message {position + 1} in another way once the conversation goes on, so "
                f"that it does not tell where that answer ends; split the conversation, or use a template with "
                f"{{% generation %}} marks (chat_template_path)"
            )
        return closed + len(end)

    def check_tool_calls(self, messages: Sequence[Message]) -> None:
        """Raise if a message has tool calls that the template does not write.

        Raises:
            InputError: it does.
        """
        if not any(message.get("tool_calls") for message in messages):
            return
        without = [{"content": ""} | message for message in messages]
        for message in without:
            message.pop("tool_calls", None)
        if self.write(messages) == self.write(without):
            raise InputError("a message has tool_calls, which the chat template does not write; leave such rows out")


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
