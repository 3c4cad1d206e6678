"""Tokenized samples: made once per content and tokenizer, memory-mapped, padded to the longest of a batch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionlab.backbones.tokenizers import tokenizer_fingerprint
from fusionlab.data.cache import cached_folder
from fusionlab.data.rendering import Texts
from fusionlab.samplers import Batch

_FORMAT = 2
"""Raise to drop every cache, after a change to tokenization or to the files below."""
_CHUNK = 4096
_IGNORED = -100


@dataclass(frozen=True)
class Ragged:
    """Token sequences of many lengths: all tokens one after another, and where each sequence begins (and the end)."""

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.starts) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.starts)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        """The sequences, in memory."""
        starts = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        tokens = np.fromiter((token for sequence in sequences for token in sequence), np.int32, count=int(starts[-1]))
        return cls(tokens, starts)

    def __getitem__(self, index: int) -> np.ndarray:
        """One sequence."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def padded(self, indices: Sequence[int], padding: int, *, length: int | None = None, left: bool = False) -> Tensor:
        """The sequences at ``indices``, int64 ``(len(indices), length)``.

        Args:
            indices: of the sequences.
            padding: fills what is left.
            length: the longest of them by default.
            left: pad on the left.
        """
        parts = [self[index] for index in indices]
        rows = np.full((len(parts), max(map(len, parts)) if length is None else length), padding, np.int64)
        for row, part in zip(rows, parts, strict=True):
            row[len(row) - len(part) if left else 0 :][: len(part)] = part
        return torch.from_numpy(rows)


class TextSplit:
    """The tokenized samples of one split.

    Evaluation goes from the shortest to the longest input, so that little of a batch is padding; batches are cut over
    the whole split, so that a sample is always computed in the same company.

    Args:
        texts: the samples.
        tokenizer: the model's tokenizer.
        max_tokens: longer inputs are cut at the end, their end token kept.
        cache: folder of all tasks' caches.
    """

    def __init__(self, texts: Texts, tokenizer: Any, max_tokens: int, cache: Path) -> None:
        self.texts = texts
        self.data_version = texts.version
        self.padding = int(tokenizer.pad_token_id)
        folder = _tokenized(texts, tokenizer, max_tokens, cache)
        self.inputs, self.answers = _ragged(folder, "inputs"), _ragged(folder, "answers")
        self.truncated_rows: list[int] = json.loads((folder / "index.json").read_text())["truncated_rows"]
        self.targets = torch.from_numpy(texts.targets)
        self.loss_counts = torch.from_numpy(self.answers.lengths.astype(np.int64))
        self.evaluation_order = torch.from_numpy(np.argsort(self.inputs.lengths, kind="stable"))

    @functools.cached_property
    def reading_version(self) -> str:
        """Short SHA-256 over the tokens that are read and answered, cut as they are, and the targets."""
        digest = hashlib.sha256(self.data_version.encode())
        for ragged in (self.inputs, self.answers):
            digest.update(np.ascontiguousarray(ragged.starts).tobytes() + np.ascontiguousarray(ragged.tokens).tobytes())
        digest.update(self.texts.targets.tobytes())
        return digest.hexdigest()[:16]

    @property
    def num_truncated(self) -> int:
        """Number of inputs that were cut."""
        return len(self.truncated_rows)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.texts)

    def batch(self, indices: Tensor) -> Batch:
        """Tokens padded to the longest of the batch.

        Returns:
            int64 ``input_ids`` and ``attention_mask`` of shape ``(batch, longest input)``, ``labels`` of shape
            ``(batch, longest answer)`` with -100 on padding, ``target`` (int64 label or float32 score) and ``index``
            of shape ``(batch,)``.
        """
        rows = indices.tolist()
        lengths = torch.from_numpy(self.inputs.lengths[rows])
        input_ids = self.inputs.padded(rows, self.padding)
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": self.answers.padded(rows, _IGNORED),
            "target": self.targets[indices],
            "index": indices,
        }


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int | None) -> tuple[list[list[int]], list[int]]:
    """Token ids with special tokens, and which texts were cut to ``max_tokens`` (before their end token)."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        ids += tokenizer(list(texts[start : start + _CHUNK]), verbose=False)["input_ids"]
    if max_tokens is None:
        return ids, []
    cut = []
    for row, tokens in enumerate(ids):
        if len(tokens) > max_tokens:
            end = tokens[-1:] if tokens[-1] == tokenizer.eos_token_id else []
            ids[row] = tokens[: max_tokens - len(end)] + end
            cut.append(row)
    return ids, cut


def _tokenized(texts: Texts, tokenizer: Any, max_tokens: int, cache: Path) -> Path:
    digest = hashlib.sha256(f"{_FORMAT}\0{max_tokens}\0{tokenizer_fingerprint(tokenizer)}\0".encode())
    for text in (*texts.inputs, *texts.answers):
        digest.update(f"{len(text)}\0{text}".encode())

    def write(folder: Path) -> None:
        inputs, truncated_rows = tokenize(tokenizer, texts.inputs, max_tokens)
        words = sorted(set(texts.answers))
        of_word = dict(zip(words, tokenize(tokenizer, words, None)[0], strict=True))
        _save(folder, "inputs", inputs)
        _save(folder, "answers", [of_word[answer] for answer in texts.answers])
        (folder / "index.json").write_text(json.dumps({"truncated_rows": truncated_rows}))

    return cached_folder(cache / "tokens" / digest.hexdigest()[:24], write)


def _save(folder: Path, name: str, sequences: Sequence[Sequence[int]]) -> None:
    ragged = Ragged.of(sequences)
    np.save(folder / f"{name}.npy", ragged.tokens)
    np.save(folder / f"{name}_starts.npy", ragged.starts)


def _ragged(folder: Path, name: str) -> Ragged:
    return Ragged(np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}_starts.npy"))
