"""What is said as tokens: what the model reads, which of it is learnt, and the prompt of the last answer.

One maker for training, ranking and generation. A sample begins with the very tokens that scoring is given for its
prompt: text is cut where an answer begins wherever a token would span that border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    num_tokens: int

    @property
    def num_learnt(self) -> int:
        """Tokens that are learnt; nothing comes before the first one, so that it never is."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoder:
    """Turns what is said into tokens.

    Args:
        cutter: the model's tokenizer.
        template: the chat template, None for none.
        max_length: longer samples are cut at the end.
        completion_only_loss: learn a completion, not its prompt.
        assistant_only_loss: learn the assistant's messages, not the others'.
    """

    cutter: Cutter
    template: Template | None
    max_length: int
    completion_only_loss: bool = True
    assistant_only_loss: bool = True

    def encode(self, said: Said) -> Encoded:
        """The sample.

        Raises:
            NothingToLearnError: no learnt token is left within ``max_length``.
            InputError: the template fails on it, or writes it in a way that does not tell where answers begin and end.
        """
        if isinstance(said, Text):
            ids = self.cutter.ended(self.cutter.begun(self.cutter.tokens(said.text)), said.text)
            learnt, prompt = [(0, len(ids))], 0
        elif isinstance(said, Plain):
            ids, learnt, prompt = self._plain(said)
        else:
            ids, learnt, prompt = self._chat(said)
        labels = [IGNORED] * len(ids)
        for start, end in learnt:
            labels[start:end] = ids[start:end]
        encoded = Encoded(ids[: self.max_length], labels[: self.max_length], ids[:prompt], len(ids))
        if not encoded.num_learnt:
            raise NothingToLearnError(self._reason(prompt, len(ids)))
        return encoded

    def encode_prompt(self, asked: Sequence[Message] | str) -> list[int]:
        """The tokens of a question that waits for its answer: a text as it stands, or messages by the template.

        Raises:
            InputError: as :meth:`encode`.
        """
        if isinstance(asked, str):
            return self.cutter.begun(self.cutter.tokens(asked))
        template = self._needed_template()
        text = template.write(asked, asking=True)
        begins = [template.begin_of(asked, position, text) for position in _answers(asked)]
        return self.cutter.cut(text, begins)[0]

    def _plain(self, said: Plain) -> tuple[list[int], list[Span], int]:
        own = self.cutter.tokens(said.prompt)
        prompt = self.cutter.begun(own)
        if not prompt:
            raise InputError("the prompt is empty, so that nothing comes before the answer; give such rows as `text`")
        ids = prompt[: len(prompt) - len(own)] + self.cutter.continued(own, said.prompt, said.completion)
        ids = self.cutter.ended(ids, said.completion)
        return ids, [(len(prompt) if self.completion_only_loss else 0, len(ids))], len(prompt)

    def _chat(self, said: Conversation) -> tuple[list[int], list[Span], int]:
        template, messages = self._needed_template(), said.messages
        template.check_tool_calls(messages)
        text, marked = template.write_marked(messages) if template.has_marks else (template.write(messages), [])
        answers = _answers(messages)
        begins = {position: template.begin_of(messages, position, text) for position in answers}
        ids, spans, counts = self.cutter.cut(text, list(begins.values()))
        if not self.assistant_only_loss:
            return ids, [(0, len(ids))], counts[-1]
        learnt = {position: begin for position, begin in begins.items() if position >= said.first_answer}
        if template.has_marks:
            first = min(learnt.values())
            characters = [(_from_header_on(begins.values(), start, end), end) for start, end in marked if end > first]
        else:
            characters = [(begin, template.end_of(messages, place, text, begin)) for place, begin in learnt.items()]
        return ids, [self.cutter.within(ids, spans, *place) for place in characters], counts[-1]

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


def _answers(messages: Sequence[Message]) -> list[int]:
    return [position for position, message in enumerate(messages) if message["role"] == "assistant"]


def _from_header_on(begins: Sequence[int], start: int, end: int) -> int:
    """Where marked characters begin to be an answer: not before its header ends."""
    return max([start, *(begin for begin in begins if start < begin < end)])
