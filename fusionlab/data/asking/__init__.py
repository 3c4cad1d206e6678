"""The embedded instruction tasks: asked on the spot about a small world, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusionlab.data.asking import questions
from fusionlab.data.asking.questions import Rng
from fusionlab.data.asking.words import COLOURS, COUNT_WORDS
from fusionlab.samplers import derive_seed

SPLIT_SIZES: dict[str, int] = {"test": 200, "validation": 100, "train": 1024}  # in the order of asking


@dataclass(frozen=True)
class AskedTask:
    """A task whose questions are asked on the spot.

    Args:
        name: the task's name.
        label_words: the answers to rank, in label order; None where an answer is generated.
        ask: makes a question for a label; or, where an answer is generated, a question and its answer.
    """

    name: str
    label_words: tuple[str, ...] | None
    ask: Callable[[Rng, int], str] | Callable[[Rng], tuple[str, str]]

    def rows(self, split: str) -> tuple[list[str], list[str], list[int]]:
        """Questions, answers, and labels (-1 where an answer is generated); always the same ones.

        No question comes twice, within a split or in two.
        """
        taken: set[str] = set()
        for name, size in SPLIT_SIZES.items():
            rng = np.random.default_rng(derive_seed("asked task", self.name, name))
            labels = rng.permutation(np.arange(size) % len(self.label_words or "x")).tolist()
            rows = [self._row(rng, label, taken) for label in labels]
            if name == split:
                break
        asked, answers = zip(*rows, strict=True)
        return list(asked), list(answers), labels if self.label_words else [-1] * len(labels)

    def _row(self, rng: Rng, label: int, taken: set[str]) -> tuple[str, str]:
        while True:
            if self.label_words is None:
                asked, answer = self.ask(rng)  # type: ignore[call-arg]
            else:
                asked, answer = self.ask(rng, label), self.label_words[label]  # type: ignore[call-arg]
            if asked not in taken:
                taken.add(asked)
                return asked, answer


ASKED_TASKS: dict[str, AskedTask] = {
    task.name: task
    for task in (
        AskedTask("sorting", None, questions.sorting),
        AskedTask("form", None, questions.form),
        AskedTask("counting", COUNT_WORDS, questions.counting),
        AskedTask("legs", tuple(str(2 * (label + 1)) for label in range(12)), questions.legs),
        AskedTask("mood", ("glad", "upset", "torn", "calm"), questions.mood),
        AskedTask("lookup", COLOURS, questions.lookup),
    )
}
