"""Label words as tokens, side by side so that one decoder pass scores them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusionlab.errors import InputError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """The label words of a task one after another, so that one decoder pass scores them all.

    Args:
        words: the words, in label order.
        inputs: decoder inputs, int64, shape ``(tokens,)``: each word begins with the start token.
        targets: the words' tokens with their end tokens, int64, shape ``(tokens,)``.
        visible: bool, shape ``(tokens, tokens)``: a token sees itself and the earlier ones of its own word.
        lengths: tokens of each word.
    """

    words: tuple[str, ...]
    inputs: Tensor
    targets: Tensor
    visible: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Answers:
        """The same on ``device``."""
        inputs, targets, visible = (tensor.to(device) for tensor in (self.inputs, self.targets, self.visible))
        return replace(self, inputs=inputs, targets=targets, visible=visible)

    def log_likelihoods(self, logits: Tensor) -> Tensor:
        """log p of each word, summed over its tokens and its end token, in float32.

        Args:
            logits: of :attr:`targets`, shape ``(batch, tokens, vocab)``.

        Returns:
            shape ``(batch, num_words)``.
        """
        logits = logits.float()
        chosen = logits.gather(2, self.targets.expand(len(logits), -1)[..., None])[..., 0]
        of_tokens = chosen - logits.logsumexp(dim=-1)
        return torch.stack([part.sum(dim=1) for part in of_tokens.split(self.lengths, dim=1)], dim=1)


def side_by_side(words: Sequence[str], tokens: Sequence[Tokens], *, start: int) -> Answers:
    """Put words one after another.

    Args:
        words: the label words.
        tokens: their tokens, each with its end token.
        start: the decoder's start token.
    """
    lengths = tuple(len(word) for word in tokens)
    word_of = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(lengths))
    return Answers(
        words=tuple(words),
        inputs=torch.tensor([token for word in tokens for token in (start, *word[:-1])]),
        targets=torch.tensor([token for word in tokens for token in word]),
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
