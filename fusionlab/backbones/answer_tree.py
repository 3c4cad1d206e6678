"""Answers of a language model side by side behind one prompt: one pass over the prompt scores them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AnswerTree:
    """The tokens of a task's answers, each with what closes it.

    Each answer's tokens but its last one are read behind the prompt, at the positions that they would have if the
    answer stood there alone, and see the prompt and their own answer only. The first token of every answer is asked
    for at the prompt's last token.

    Args:
        answers: tokens of each answer.
        inputs: what is read, int64, shape ``(columns - 1,)``.
        word: the answer of each of them, int64, shape ``(columns - 1,)``.
        depth: its place in its answer, int64, shape ``(columns - 1,)``.
        tokens: what is asked for, padded by 0, int64, shape ``(answers, longest)``.
        columns: the column of the logits that each of them is asked for at, 0 behind an answer's end, of that shape.
        is_asked: False behind an answer's end, bool, of that shape.
        num_closing: how many tokens close each answer.
        num_opening: how many, the same of all, come before what tells one from another, such as a block of thinking
            that a template writes.
    """

    answers: tuple[tuple[int, ...], ...]
    inputs: Tensor
    word: Tensor
    depth: Tensor
    tokens: Tensor
    columns: Tensor
    is_asked: Tensor
    num_closing: tuple[int, ...]
    num_opening: int = 0

    @classmethod
    def of(
        cls,
        answers: Sequence[Sequence[int]],
        device: torch.device | None = None,
        num_closing: Sequence[int] | None = None,
        num_opening: int = 0,
    ) -> AnswerTree:
        """The tree of these answers, each of at least one token, of which one closes it where nothing else is said."""
        closing = (1,) * len(answers) if num_closing is None else tuple(num_closing)
        read = [(token, word, depth) for word, ids in enumerate(answers) for depth, token in enumerate(ids[:-1])]
        inputs, word, depth = torch.tensor(read, dtype=torch.int64).view(-1, 3).unbind(1)
        lengths = torch.tensor([len(ids) for ids in answers])
        place = torch.arange(int(lengths.max()))
        is_asked = place < lengths[:, None]
        first = 1 + (lengths - 1).cumsum(0) - (lengths - 1)  # of each answer's columns, behind the prompt's last one
        columns = torch.where(is_asked & (place > 0), first[:, None] + place - 1, 0)
        tokens = torch.zeros(is_asked.shape, dtype=torch.int64)
        tokens[is_asked] = torch.tensor([token for ids in answers for token in ids])
        parts = (inputs, word, depth, tokens, columns, is_asked)
        return cls(tuple(tuple(ids) for ids in answers), *(part.to(device) for part in parts), closing, num_opening)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each answer."""
        return tuple(map(len, self.answers))

    @property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """The answers without what closes and opens them."""
        parts = zip(self.answers, self.num_closing, strict=True)
        return tuple(ids[self.num_opening : len(ids) - closing] for ids, closing in parts)

    @property
    def num_columns(self) -> int:
        """Columns whose logits are needed: the prompt's last one, and one a token that is read."""
        return 1 + len(self.inputs)

    @property
    def num_read(self) -> int:
        """How many answers have tokens that are read, which are those of more than one token."""
        return sum(len(ids) > 1 for ids in self.answers)

    def behind(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that hold a prompt and all answers.

        Args:
            prompt_ids: int64, padded on the left, shape ``(batch, len)``.
            prompt_mask: bool, False on padding, shape ``(batch, len)``.

        Returns:
            input ids and positions, int64, shape ``(batch, len + columns - 1)``; and bool, shape ``(batch, len +
            columns - 1, len + columns - 1)``, what sees what.
        """
        batch, length = prompt_ids.shape
        inputs = torch.cat([prompt_ids, self.inputs.expand(batch, -1)], dim=1)
        lengths = prompt_mask.sum(1, keepdim=True)
        own = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        positions = torch.cat([own, lengths + self.depth], dim=1)
        word = torch.cat([self.word.new_full((length,), -1), self.word])
        causal = torch.ones(len(word), len(word), dtype=torch.bool, device=inputs.device).tril()
        related = (word[None, :] == -1) | (word[:, None] == word[None, :])
        real = torch.cat([prompt_mask, prompt_mask.new_ones(batch, len(self.inputs))], dim=1)
        visible = (causal & related)[None] & real[:, None, :]
        itself = torch.eye(len(word), dtype=torch.bool, device=inputs.device)  # padding sees something, else NaN
        return inputs, positions, visible | itself

    def log_likelihoods(self, logits: Tensor) -> Tensor:
        """log p of each token of each answer, in float32.

        Args:
            logits: of the last :attr:`num_columns` columns, shape ``(batch, columns, vocab)``.

        Returns:
            shape ``(batch, answers, longest)``, 0 behind an answer's end.
        """
        logits = logits.float()
        chosen = logits[:, self.columns, self.tokens] - logits.logsumexp(dim=-1)[:, self.columns]
        return chosen.masked_fill(~self.is_asked, 0)

    def ranked_by(self, of_tokens: Tensor, ranking: str, words: Sequence[str]) -> Tensor:
        """The answers' scores from log p of their tokens.

        Args:
            of_tokens: as of :meth:`log_likelihoods`.
            ranking: the sum of the ``whole`` answer, or :attr:`words` alone: their sum (``without_end``), divided by
                their tokens (``per_token``) or by the bytes of the texts (``per_byte``).
            words: the answers as texts.

        Returns:
            shape ``(batch, answers)``.
        """
        if ranking == "whole":
            return of_tokens.sum(2)
        place = torch.arange(of_tokens.shape[2], device=of_tokens.device)
        ends = torch.tensor([self.num_opening + len(word) for word in self.words], device=place.device)
        is_word = (place >= self.num_opening) & (place < ends[:, None])
        total = of_tokens.masked_fill(~is_word, 0).sum(2)
        if ranking == "without_end":
            return total
        texts = self.words if ranking == "per_token" else [word.encode() for word in words]
        return total / total.new_tensor([len(text) for text in texts])

    def each_behind(self, prompt: Tensor) -> Tensor:
        """One row an answer: the prompt (int64, shape ``(len,)``) and the answer's tokens but the last, padded."""
        longest = max(self.lengths) - 1
        rows = [F.pad(prompt.new_tensor(ids[:-1]), (0, longest - len(ids) + 1)) for ids in self.answers]
        return torch.stack([torch.cat([prompt, row]) for row in rows])

    def log_likelihoods_apart(self, logits: Tensor) -> Tensor:
        """As :meth:`log_likelihoods` from logits of :meth:`each_behind`, shape ``(answers, longest, vocab)``."""
        logits = logits.float()
        chosen = logits.gather(2, self.tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)
        return chosen.masked_fill(~self.is_asked, 0)
