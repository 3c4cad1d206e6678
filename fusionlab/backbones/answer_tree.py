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
    """

    answers: tuple[tuple[int, ...], ...]
    inputs: Tensor
    word: Tensor
    depth: Tensor

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], device: torch.device | None = None) -> AnswerTree:
        """The tree of these answers, each of at least one token."""
        read = [(token, word, depth) for word, ids in enumerate(answers) for depth, token in enumerate(ids[:-1])]
        columns = torch.tensor(read, dtype=torch.int64, device=device).view(-1, 3).unbind(1)
        return cls(tuple(tuple(ids) for ids in answers), *columns)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each answer."""
        return tuple(map(len, self.answers))

    @property
    def num_columns(self) -> int:
        """Columns whose logits are needed: the prompt's last one, and one a token that is read."""
        return 1 + len(self.inputs)

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
        place = {(int(w), int(d)): 1 + i for i, (w, d) in enumerate(zip(self.word, self.depth, strict=True))}
        columns = [
            [0 if depth == 0 else place[word, depth - 1] for depth in range(len(ids))]
            for word, ids in enumerate(self.answers)
        ]
        logits = logits.float()
        normalizer = logits.logsumexp(dim=-1)
        found = []
        for ids, of_answer in zip(self.answers, columns, strict=True):
            where = torch.tensor(of_answer, device=logits.device)
            chosen = logits[:, where, torch.tensor(ids, device=logits.device)]
            found.append(F.pad(chosen - normalizer[:, where], (0, max(self.lengths) - len(ids))))
        return torch.stack(found, dim=1)

    def each_behind(self, prompt: Tensor) -> Tensor:
        """One row an answer: the prompt (int64, shape ``(len,)``) and the answer's tokens but the last, padded."""
        longest = max(self.lengths) - 1
        rows = [F.pad(prompt.new_tensor(ids[:-1]), (0, longest - len(ids) + 1)) for ids in self.answers]
        return torch.stack([torch.cat([prompt, row]) for row in rows])

    def log_likelihoods_apart(self, logits: Tensor) -> Tensor:
        """As :meth:`log_likelihoods` from logits of :meth:`each_behind`, shape ``(answers, longest, vocab)``."""
        of_tokens = logits.float().log_softmax(-1)
        found = [
            F.pad(own[range(len(ids)), list(ids)], (0, max(self.lengths) - len(ids)))
            for own, ids in zip(of_tokens, self.answers, strict=True)
        ]
        return torch.stack(found)
