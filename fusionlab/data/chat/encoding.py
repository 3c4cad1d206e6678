"""What is said as tokens: what the model reads, which of it is learnt, and the prompt of the last answer.

One maker for training, ranking and generation. A sample begins with the very tokens that scoring is given for its
prompt: text is cut where an answer begins wherever a token would span that border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fusionlab.backbones.tokenizers import Frame
from fusionlab.data.chat.cutting import Cutter, Span
from fusionlab.data.chat.rows import Conversation, Message, NothingToLearnError, Plain, Said, Text
from fusionlab.data.chat.template import Template
from fusionlab.errors import InputError

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Args:
        input_ids: what the model reads.
        labels: of the same length, -100 where nothing is learnt; a label belongs to its own position, the model is
            asked for it one position earlier.
        prompt_ids: what comes before the last answer, a prefix of ``input_ids``.
        num_tokens: of the sample before it was cut.
        answer_ids: the last answer with what closes it, whatever of it is learnt; empty for a bare text.
        num_closing: how many of these close it.
        num_opening: how many of these the template writes before the answer's content.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    num_tokens: int
    answer_ids: tuple[int, ...] = ()
    num_closing: int = 0
    num_opening: int = 0

    @property
    def num_learnt(self) -> int:
        """Tokens that are learnt; nothing comes before the first one, so that it never is."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class _Whole:
    """A sample as tokens before it is cut: what of them is learnt, how many are its prompt, its last answer."""

    ids: list[int]
    learnt: list[Span]
    prompt: int
    answer: tuple[int, ...] = ()
    num_closing: int = 0
    num_opening: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns what is said into tokens.

    Args:
        cutter: the model's tokenizer.
        template: the chat template, None for none.
        max_length: longer samples are cut at the end.
        completion_only_loss: learn a completion, as texts or as messages, not its prompt.
        assistant_only_loss: of messages that are learnt, learn the assistant's alone.
    """

    cutter: Cutter
    template: Template | None
    max_length: int
    completion_only_loss: bool = True
    assistant_only_loss: bool = True

    @property
    def frame(self) -> Frame:
        """What the template writes around the content of a generated answer."""
        if self.template is None:
            return Frame()
        return Frame(self.cutter.read(self.cutter.tokens(self.template.opening)).strip(), self.template.end_text)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token that ends a generated answer by the template; none where none does."""
        end = None if self.template is None else self.template.end_token
        return () if end is None else (end,)

    def encode(self, said: Said) -> Encoded:
        """The sample.

        Raises:
            NothingToLearnError: no learnt token is left within ``max_length``.
            InputError: the template fails on it, or writes it in a way that does not tell where answers begin and end.
        """
        if isinstance(said, Text):
            ids = self.cutter.ended(self.cutter.begun(self.cutter.tokens(said.text)), said.text)
            whole = _Whole(ids, [(0, len(ids))], 0)
        else:
            whole = self._plain(said) if isinstance(said, Plain) else self._chat(said)
        ids, cut = whole.ids, self.max_length
        labels = [IGNORED] * len(ids)
        for start, end in whole.learnt:
            labels[start:end] = ids[start:end]
        last = whole.answer, whole.num_closing, whole.num_opening
        encoded = Encoded(ids[:cut], labels[:cut], ids[: whole.prompt], len(ids), *last)
        if not encoded.num_learnt:
            raise NothingToLearnError(self._reason(whole.prompt, len(ids)))
        return encoded

    def encode_prompt(self, asked: Sequence[Message] | str, given: Mapping[str, Any] | None = None) -> list[int]:
        """The tokens of a question that waits for its answer: a text as it stands, or messages by the template.

        Args:
            asked: the question.
            given: what the template is given beside messages.

        Raises:
            InputError: as :meth:`encode`.
        """
        if isinstance(asked, str):
            return self.cutter.begun(self.cutter.tokens(asked))
        template = self._needed_template().reading(asked, given or {})
        text = template.write(asked, asking=True)
        begins = [template.begin_of(asked, position, text) for position in _answers(asked)]
        return self.cutter.cut(text, begins)[0]

    def _plain(self, said: Plain) -> _Whole:
        own = self.cutter.tokens(said.prompt)
        prompt = self.cutter.begun(own)
        if not prompt:
            raise InputError("the prompt is empty, so that nothing comes before the answer; give such rows as `text`")
        ids = prompt[: len(prompt) - len(own)] + self.cutter.continued(own, said.prompt, said.completion)
        ids = self.cutter.ended(ids, said.completion)
        first = len(prompt) if self.completion_only_loss else 0
        return _Whole(ids, [(first, len(ids))], len(prompt), tuple(ids[len(prompt) :]), 1)

    def _chat(self, said: Conversation) -> _Whole:
        messages = said.messages
        template = self._needed_template().reading(messages, said.given)
        text, marked = template.write_marked(messages) if template.has_marks else (template.write(messages), [])
        begins = {place: template.begin_of(messages, place, text) for place in _answers(messages)}
        ids, spans, counts = self.cutter.cut(text, list(begins.values()))
        first, last = said.completion if self.completion_only_loss else 0, max(begins)
        if self.assistant_only_loss:
            wanted = {place: begin for place, begin in begins.items() if place >= first}
            learnt_text = _learnt(template, messages, text, wanted, marked)
            learnt = [self.cutter.within(ids, spans, *place, template.closes) for place in learnt_text]
        else:
            begin = template.begin_of(messages, first, text) if first else 0
            learnt_text, learnt = [], [(sum(start < begin for start, _ in spans), len(ids))]
        if last == len(messages) - 1:
            answer = self._answer(template, text, begins[last], ids, spans, counts[-1])
            if template.is_open:
                ended = self.cutter.ended(ids, text)
                learnt = [(start, len(ended) if end == len(ids) else end) for start, end in learnt]
                ids, answer = ended, (tuple(ended[counts[-1] :]), 1, answer[2])
        elif learnt_text:  # as it stands there
            answer = self._answer(template, text[: learnt_text[-1][1]], begins[last], ids, spans, counts[-1])
        else:  # what comes after it is no part of it
            asked = messages[: last + 1]
            text = template.write(asked)
            places = [template.begin_of(asked, place, text) for place in begins]
            alone, its_spans, its_counts = self.cutter.cut(text, places)
            answer = self._answer(template, text, places[-1], alone, its_spans, its_counts[-1])
        return _Whole(ids, learnt, counts[-1], *answer)

    def _answer(
        self, template: Template, text: str, begin: int, ids: Sequence[int], spans: Sequence[Span], prompt: int
    ) -> tuple[tuple[int, ...], int, int]:
        """The tokens of the answer that ``text`` ends in with what closes it, how many of them do, how many open it."""
        own = slice(prompt, self.cutter.within(ids, spans, begin, len(text), template.closes)[1])
        closing = next((len(end) for end in (template.closing, template.end) if end and text.endswith(end)), 0)
        content = begin + len(template.opening) * text.startswith(template.opening, begin)
        num_closing = sum(start >= len(text) - closing for start, _ in spans[own])
        return tuple(ids[own]), num_closing, sum(stop <= content for _, stop in spans[own])

    def _needed_template(self) -> Template:
        if self.template is None:
            raise InputError("messages need a chat template, and the tokenizer has none; give chat_template_path")
        return self.template

    def _reason(self, prompt: int, total: int) -> str:
        if total > self.max_length:
            return (
                f"nothing of the completion is left at max_length {self.max_length}: its prompt has {prompt} tokens, "
                f"the whole {total}; raise max_length"
            )
        return "no token is left to learn"


def shared_opening(answers: Sequence[Encoded]) -> int:
    """How many tokens that the template writes before an answer's content all the answers begin with."""
    openings = [one.answer_ids[: one.num_opening] for one in answers]
    together = zip(*openings, strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, together))


def _learnt(
    template: Template, messages: Sequence[Message], text: str, begins: Mapping[int, int], marked: Sequence[Span]
) -> list[Span]:
    """The characters of the answers that begin at ``begins`` by their places, with what closes them."""
    if not template.has_marks:
        return [(begin, template.end_of(messages, place, text, begin)) for place, begin in begins.items()]
    first, end = min(begins.values()), template.end
    return [
        (_from_header_on(begins.values(), start, stop), stop + len(end) * text.startswith(end, stop))
        for start, stop in marked
        if stop > first
    ]


def _answers(messages: Sequence[Message]) -> list[int]:
    return [position for position, message in enumerate(messages) if message["role"] == "assistant"]


def _from_header_on(begins: Sequence[int], start: int, end: int) -> int:
    """Where marked characters begin to be an answer: not before its header ends."""
    return max([start, *(begin for begin in begins if start < begin < end)])
