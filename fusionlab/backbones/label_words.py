"""Label words as tokens, packed so that one decoder pass scores many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionlab.errors import InputError

# tokens that one decoder pass scores at most, so that its logits stay small beside the encoder
_PACK_TOKENS = 64
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """Some label words one after another.

    Args:
        inputs: decoder inputs, int64, shape ``(tokens,)``: each word begins with the start token.
        targets: the words' tokens with their end tokens, int64, shape ``(tokens,)``.
        visible: bool, shape ``(tokens, tokens)``: a token sees itself and the earlier ones of its own word.
        lengths: tokens of each word.
    """

    inputs: Tensor
    targets: Tensor
    visible: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Pack:
        """The same on ``device``."""
        return Pack(self.inputs.to(device), self.targets.to(device), self.visible.to(device), self.lengths)


@dataclass(frozen=True)
class Answers:
    """The label words of a task, in label order, in packs."""

    words: tuple[str, ...]
    packs: tuple[Pack, ...]

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest word, with its end token."""
        return max(length for pack in self.packs for length in pack.lengths)

    def to(self, device: torch.device) -> Answers:
        """The same on ``device``."""
        return Answers(self.words, tuple(pack.to(device) for pack in self.packs))


def pack_words(words: Sequence[str], tokens: Sequence[Tokens], *, start: int) -> Answers:
    """Fill packs with whole words, in order.

    Args:
        words: the label words.
        tokens: their tokens, each with its end token.
        start: the decoder's start token.
    """
    groups: list[list[Tokens]] = []
    for word in tokens:
        if not groups or sum(map(len, groups[-1])) + len(word) > _PACK_TOKENS:
            groups.append([])
        groups[-1].append(word)
    return Answers(tuple(words), tuple(_pack(group, start) for group in groups))


def _pack(words: Sequence[Tokens], start: int) -> Pack:
    lengths = tuple(len(word) for word in words)
    word_of = torch.repeat_interleave(torch.arange(len(words)), torch.tensor(lengths))
    return Pack(
        inputs=torch.tensor([token for word in words for token in (start, *word[:-1])]),
        targets=torch.tensor([token for word in words for token in word]),
        visible=(word_of[:, None] == word_of).tril(),
        lengths=lengths,
    )


def check_words(words: Sequence[str], tokens: Sequence[Tokens], end: int, unknown: int, task: str) -> None:
    """Raise unless each word can be told from the others and can be the answer.

    Args:
        words: the label words.
        tokens: their tokens, each with its end token.
        end: the end token.
        unknown: the token of unknown characters.
        task: the task's name, for the message.

    Raises:
        InputError: a word without a token, with a character that the tokenizer does not know, or equal in tokens to
            another.
    """
    seen: dict[Tokens, str] = {}
    for word, ids in zip(words, tokens, strict=True):
        if not [token for token in ids if token != end]:
            raise InputError(f"label word {word!r} of task {task!r} has no tokens; give a word with letters or digits")
        if unknown in ids:
            raise InputError(
                f"label word {word!r} of task {task!r} has a character that the tokenizer does not know, so that it "
                f"can never be the answer; give another word"
            )
        if ids in seen:
            raise InputError(
                f"label words {seen[ids]!r} and {word!r} of task {task!r} are the same tokens; give each class its own"
            )
        seen[ids] = word
