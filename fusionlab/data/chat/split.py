"""The encoded samples of one split, as batches for training, ranking and generation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusionlab.data.chat.encoding import IGNORED
from fusionlab.data.chat.packing import best_fit
from fusionlab.data.tokens import Ragged
from fusionlab.samplers import Batch

NUM_SHAPES = 8
"""Batches of one split come in at most so many shapes."""


@dataclass(frozen=True)
class Samples:
    """Encoded samples.

    Args:
        input_ids: tokens of each sample.
        labels: of the same lengths, -100 where nothing is learnt.
        prompts: tokens of each prompt.
        answers: the last answer of each as the text of its tokens, without what closes it and special ones.
        targets: the label word's index (int64), the score (float32), or -1; shape ``(samples,)``.
    """

    input_ids: Ragged
    labels: Ragged
    prompts: Ragged
    answers: tuple[str, ...]
    targets: np.ndarray

    @property
    def version(self) -> str:
        """The first 16 hex digits of SHA-256 over all that is read, learnt and compared."""
        digest = hashlib.sha256()
        for ragged in (self.input_ids, self.labels, self.prompts):
            digest.update(np.ascontiguousarray(ragged.starts).tobytes() + np.ascontiguousarray(ragged.tokens).tobytes())
        digest.update("".join(f"{answer}\0" for answer in self.answers).encode() + self.targets.tobytes())
        return digest.hexdigest()[:16]

    @property
    def num_learnt(self) -> Tensor:
        """Learnt tokens of each sample, int64; nothing comes before a sample's first token, so it never counts."""
        learnt = np.asarray(self.labels.tokens) != IGNORED
        learnt[self.labels.starts[:-1]] = False
        return torch.from_numpy(np.add.reduceat(learnt, self.labels.starts[:-1]).astype(np.int64))


class ChatSplit:
    """One split of one task.

    Evaluation goes from the shortest to the longest prompt, in batches of at most :data:`NUM_SHAPES` shapes that
    follow from the whole split, so that a sample is always computed in the same company.

    Args:
        samples: encoded.
        fixed_shapes: whether batches have these few shapes; a training batch is as long as its longest sample.
    """

    def __init__(self, samples: Samples, *, fixed_shapes: bool) -> None:
        self.samples, self.data_version = samples, samples.version
        self.loss_counts = samples.num_learnt
        prompts, whole = samples.prompts.lengths, samples.input_ids.lengths
        order = np.lexsort((whole, prompts))
        self.evaluation_order = torch.from_numpy(order)
        self._lengths = (prompts, whole)
        if fixed_shapes:
            self._lengths = tuple(_longest_of_group(lengths, order) for lengths in (prompts, whole))

    @property
    def reading_version(self) -> str:
        """The data version: that of tokens, answers and targets."""
        return self.data_version

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples.answers)

    def batch(self, indices: Tensor) -> Batch:
        """The samples at ``indices``.

        Returns:
            int64 ``input_ids`` and ``labels`` of shape ``(batch, longest)``, padded on the right (labels by -100);
            ``prompt_ids`` and ``prompt_mask`` of shape ``(batch, longest prompt)``, padded on the left; ``target`` and
            ``index`` of shape ``(batch,)``; ``answer``, the last answers as texts. What is padding is told by its
            place: its tokens are those of id 0.
        """
        rows = indices.tolist()
        prompts, whole = (int(lengths[rows].max()) for lengths in self._lengths)
        lengths = torch.from_numpy(self.samples.prompts.lengths[rows])
        return {
            "input_ids": self.samples.input_ids.padded(rows, 0, length=whole),
            "labels": self.samples.labels.padded(rows, IGNORED, length=whole),
            "prompt_ids": self.samples.prompts.padded(rows, 0, length=prompts, left=True),
            "prompt_mask": torch.arange(prompts) >= prompts - lengths[:, None],
            "target": torch.from_numpy(self.samples.targets[rows]),
            "index": indices,
            "answer": [self.samples.answers[row] for row in rows],
        }


class PackedSplit:
    """Training samples of one task, several in a row of at most ``max_length`` tokens.

    Rows are filled longest sample first, each where it leaves the least room. ``position_ids`` begin anew with every
    sample (and with the padding), which is what keeps samples apart.

    Args:
        split: the samples.
        max_length: tokens of a row at most.
    """

    def __init__(self, split: ChatSplit, max_length: int) -> None:
        self.split, self.rows = split, best_fit(split.samples.input_ids.lengths.tolist(), max_length)
        self.data_version = split.data_version
        self.loss_counts = torch.stack([split.loss_counts[row].sum() for row in self.rows])
        self.evaluation_order = None

    @property
    def reading_version(self) -> str:
        """The data version: that of tokens, answers and targets."""
        return self.data_version

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        """The rows at ``indices``: ``input_ids``, ``labels``, ``position_ids`` and ``index``, padded on the right."""
        samples = self.split.samples
        ids, labels, positions = [], [], []
        for row in indices.tolist():
            members = self.rows[row]
            ids.append(np.concatenate([samples.input_ids[member] for member in members]))
            own = [np.array(samples.labels[member]) for member in members]
            for part in own:
                part[0] = IGNORED  # else the end of the sample before it would be asked for it
            labels.append(np.concatenate(own))
            positions.append(np.concatenate([np.arange(len(part)) for part in own]))
        longest = max(map(len, ids))
        for part, position in zip(ids, positions, strict=True):
            position.resize(longest, refcheck=False)
            position[len(part) :] = np.arange(longest - len(part))
        return {
            "input_ids": Ragged.of(ids).padded(range(len(ids)), 0),
            "labels": Ragged.of(labels).padded(range(len(ids)), IGNORED),
            "position_ids": torch.from_numpy(np.stack(positions)).long(),
            "index": indices,
        }


def _longest_of_group(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each sample the longest of its group, where the samples in ``order`` fall into groups of one size."""
    found = np.empty_like(lengths)
    for group in np.array_split(order, min(NUM_SHAPES, max(1, len(order)))):
        found[group] = lengths[group].max(initial=0)
    return found
