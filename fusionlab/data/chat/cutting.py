"""Texts as tokens that can be told apart at given characters: no token spans the border to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fusionlab.errors import InputError

Span = tuple[int, int]


class Cutter:
    """A tokenizer that adds nothing by itself and can cut a text at given places.

    Args:
        tokenizer: with offsets (a ``tokenizer.json``).

    Raises:
        InputError: a tokenizer without offsets or without an end token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {type(tokenizer).__name__} gives no offsets; use one with a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end token (eos_token), so that no answer would end; set one")
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self.begin = _begin(tokenizer)

    def tokens(self, text: str) -> list[int]:
        """The text's own tokens."""
        return list(self._called(text)["input_ids"])

    def read(self, ids: Sequence[int]) -> str:
        """The text of tokens as that of a generated answer is read: special ones left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def begun(self, ids: list[int]) -> list[int]:
        """``ids`` after what the tokenizer puts before a text, such as bos, once."""
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def ended(self, ids: list[int], text: str) -> list[int]:
        """``ids`` of ``text`` with the end token, once."""
        end = self.tokenizer.eos_token_id
        return ids if text.endswith(self.tokenizer.eos_token) and ids[-1:] == [end] else [*ids, end]

    def continued(self, ids: list[int], before: str, piece: str) -> list[int]:
        """``ids``, which are those of ``before``, and then the tokens of ``piece``.

        Raises:
            InputError: the tokenizer cannot begin where ``piece`` does.
        """
        joint = self.tokens(before + piece)
        return joint if joint[: len(ids)] == ids else ids + self._piece(ids, before, piece)[0]

    def cut(self, text: str, places: Sequence[int]) -> tuple[list[int], list[Span], list[int]]:
        """The tokens of ``text``, none across one of the ``places``, which are characters in order.

        The tokens up to a place do not depend on what comes after it.

        Returns:
            tokens, the characters of each, and at each place the number of tokens before it.

        Raises:
            InputError: the tokenizer cannot begin at a place.
        """
        ids: list[int] = []
        spans: list[Span] = []
        counts = []
        for part, (start, end) in enumerate(pairwise([0, *places, len(text)])):
            if part:
                counts.append(len(ids))
            joint, found = self._with_spans(text[:end])
            if joint[: len(ids)] != ids:
                own, found = self._piece(ids, text[:start], text[start:end])
                joint, found = ids + own, spans + [(start + a, start + b) for a, b in found]
            ids, spans = joint, found
        return ids, spans, counts

    def within(self, ids: Sequence[int], spans: Sequence[Span], start: int, end: int, closes: bool) -> Span:
        """The tokens that lie wholly between two characters, those of an answer.

        Args:
            ids: all tokens.
            spans: the characters of each.
            start: the first character.
            end: the character after the last.
            closes: whether a special token closes answers, after which white space is left out.
        """
        inside = [i for i, (first, last) in enumerate(spans) if first >= start and last <= end and last > first]
        if not inside:
            return 0, 0
        last = inside[-1]
        while closes and last > inside[0] and ids[last] not in self.special and self._is_blank(ids[last]):
            last -= 1
        return inside[0], (last if ids[last] in self.special else inside[-1]) + 1

    def _is_blank(self, token: int) -> bool:
        return not self.tokenizer.decode([token]).strip()

    def _piece(self, ids: list[int], before: str, piece: str) -> tuple[list[int], list[Span]]:
        """Tokens of ``piece`` by itself that read as it after ``ids``."""
        expected = self._decoded(ids) + piece
        own, spans = self._with_spans(piece)
        if self._decoded(ids + own) == expected:
            return own, spans
        anchor = self.tokens("\n")  # some tokenizers begin every text with a space of their own
        after, spans = self._with_spans("\n" + piece)
        own = after[len(anchor) :]
        if after[: len(anchor)] == anchor and self._decoded(ids + own) == expected:
            return own, [(max(0, a - 1), max(0, b - 1)) for a, b in spans[len(anchor) :]]
        raise InputError(
            f"a token spans the border between {before[-12:]!r} and {piece[:12]!r}, and the tokenizer cannot begin "
            f"there; end the prompt elsewhere, such as before a space"
        )

    def _with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        found = self._called(text, return_offsets_mapping=True)
        return list(found["input_ids"]), [(start, end) for start, end in found["offset_mapping"]]

    def _called(self, text: str, **more: bool) -> Any:
        try:
            return self.tokenizer(text, add_special_tokens=False, verbose=False, **more)
        except TypeError:  # what tokenizers make of a text that has no utf-8
            refuse_halves(text)
            raise

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def refuse_halves(text: str) -> None:
    """Raise if a text has no utf-8.

    Raises:
        InputError: it holds half of a character.
    """
    half = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)
    if half is not None:
        raise InputError(f"a text holds {half!r}, half of a character; mend or remove it")


def _begin(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    plain = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("x")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise InputError(f"the tokenizer {type(tokenizer).__name__} changes a text's tokens when it adds special ones")
