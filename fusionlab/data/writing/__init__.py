"""The embedded text tasks: GLUE's seven forms, written about a small world, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fusionlab.data.writing import forms
from fusionlab.data.writing.sentences import Rng
from fusionlab.errors import InputError, did_you_mean
from fusionlab.samplers import derive_seed

Split = Literal["train", "validation", "test"]
SPLIT_SIZES: dict[str, int] = {"test": 400, "validation": 160, "train": 1024}  # in the order of writing


@dataclass(frozen=True)
class WrittenTask:
    """A task whose texts are written on the spot.

    Args:
        name: the task's name.
        input_columns: the columns of an input.
        label_words: the answers in label order; None where the answer is a score.
        write: makes the texts of one sample of class ``label``, or, for a score, with the parts ``label`` in common.
    """

    name: str
    input_columns: tuple[str, ...]
    label_words: tuple[str, ...] | None
    write: Callable[[Rng, int], tuple[str, ...]]

    @property
    def template(self) -> str:
        """The text input with the columns in braces: the task's name, then each column's name and text."""
        return f"{self.name} " + " ".join(f"{column}: {{{column}}}" for column in self.input_columns)

    @property
    def target_column(self) -> str | None:
        """The name of the score; None where the answer is a label word."""
        return "score" if self.label_words is None else None

    @property
    def metric(self) -> str:
        """How answers are scored."""
        return "spearman" if self.label_words is None else "accuracy"

    def rows(self, split: Split) -> tuple[list[dict[str, str]], list[int] | list[float]]:
        """The inputs by column, and the labels (indices into ``label_words``) or the scores; always the same ones.

        No input comes twice, within a split or in two.

        Raises:
            InputError: ``split`` is none of train, validation and test.
        """
        if split not in get_args(Split):
            raise InputError(f"task {self.name!r} has no split {split!r}: {did_you_mean(split, get_args(Split))}")
        taken: set[tuple[str, ...]] = set()
        for name, size in SPLIT_SIZES.items():
            rng = np.random.default_rng(derive_seed("written task", self.name, name))
            labels = rng.permutation(np.arange(size) % (len(self.label_words or ()) or 1 << forms.PARTS))
            texts = []
            for label in labels.tolist():
                while (text := self.write(rng, label)) in taken:
                    pass
                taken.add(text)
                texts.append(text)
            if name == split:
                break
        rows = [dict(zip(self.input_columns, text, strict=True)) for text in texts]
        return rows, labels.tolist() if self.label_words else [
            forms.similarity_score(label) for label in labels.tolist()
        ]


_PAIR = ("sentence1", "sentence2")
WRITTEN_TASKS: dict[str, WrittenTask] = {
    task.name: task
    for task in (
        WrittenTask("acceptability", ("sentence",), ("unacceptable", "acceptable"), forms.acceptability),
        WrittenTask("sentiment", ("sentence",), ("negative", "positive"), forms.sentiment),
        WrittenTask("paraphrase", _PAIR, ("not_equivalent", "equivalent"), forms.paraphrase),
        WrittenTask("duplicate", ("question1", "question2"), ("not_duplicate", "duplicate"), forms.duplicate),
        WrittenTask("entailment", _PAIR, ("entailment", "not_entailment"), forms.entailment),
        WrittenTask(
            "inference", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), forms.inference
        ),
        WrittenTask("similarity", _PAIR, None, forms.similarity),
    )
}
