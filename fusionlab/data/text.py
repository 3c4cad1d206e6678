"""Text-to-text tasks, embedded or from a hub id or local files, as padded token batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fusionlab.contracts import as_tokenizing
from fusionlab.data.base import TaskData, check_embedded, check_positive, embedded, embedded_name, refuse_keys
from fusionlab.data.cache import cache_root
from fusionlab.data.known_tasks import NATURAL_PROMPTS, TEXT_TASKS
from fusionlab.data.rendering import Texts, TextSource, check_text_task
from fusionlab.data.sources import check_path
from fusionlab.data.splits import SplitName
from fusionlab.data.suites import TEXT_SUITES, check_within, tasks_of
from fusionlab.data.tables import lines_of
from fusionlab.data.tasks import Task, parse_tasks
from fusionlab.data.tokens import TextSplit, tokenize
from fusionlab.data.writing import WRITTEN_TASKS, WrittenTask
from fusionlab.errors import InputError, name_list

EMBEDDED_TEXT_TASKS = list(WRITTEN_TASKS)
_IMAGE_KEYS = ("image_column", "templates", "class_aliases")
_log = logging.getLogger(__name__)

Prompts = Literal["paper", "natural"]
Suite = Literal["glue8"]


@dataclass(frozen=True)
class TextTask:
    """What scoring needs of a task: the answers in label order (None for a score) and the metric."""

    name: str
    label_words: tuple[str, ...] | None
    metric: str
    template: str


class TextTasks(TaskData):
    """One loader over all tasks in training, exact batches of each task in evaluation.

    Args:
        tasks: names known to the package (GLUE's cola, mnli, mrpc, qqp, rte, sst2, stsb, and the embedded ones), or
            mappings ``{name, path, input_columns, template, label_words | target_column, metric}`` where path is a hub
            id, or a local folder or file of parquet, csv, tsv or json; all embedded tasks by default.
        batch_size: texts of each task in a training batch of one process.
        eval_batch_size: texts in an evaluation batch at most; those of a set are of one size.
        prompts: how GLUE's tasks are put: ``paper`` as in arXiv 2310.04742, ``natural`` as questions.
        max_tokens: longer inputs are cut, counted and reported.
        texts: file with one text a line, or ``-`` for the standard input, for ``predict``.
        suite: ``glue8``, the eight tasks as FusionBench puts them to Flan-T5, whose generated answers are compared
            letter by letter; ``tasks`` then takes some of them by name, or says where a copy is, ``{name, path}``.
        arguments: max_samples, cache_dir and seed, as of :class:`~fusionlab.data.base.TaskData`.
    """

    gives = "texts"

    def __init__(
        self,
        tasks: list[str | dict] | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        prompts: Prompts = "paper",
        max_tokens: int = 512,
        texts: str | None = None,
        suite: Suite | None = None,
        **arguments: Any,
    ) -> None:
        if prompts not in ("paper", "natural"):
            raise InputError(f"prompts must be 'paper' or 'natural', got {prompts!r}")
        known = {**TEXT_TASKS, **embedded(WRITTEN_TASKS)}
        if prompts == "natural":
            known = {**known, **{name: prompt.applied(known[name]) for name, prompt in NATURAL_PROMPTS.items()}}
        of_suite = tasks_of(suite, TEXT_SUITES)
        if of_suite and prompts != "paper":
            raise InputError(f"data.prompts: the suite {suite} has prompts of its own; leave {prompts!r} out")
        default = list(of_suite) or EMBEDDED_TEXT_TASKS
        super().__init__(
            parse_tasks(default if tasks is None else tasks, known | of_suite),
            batch_size,
            eval_batch_size,
            **arguments,
        )
        check_within(suite, self.definitions, of_suite)
        self.suite, self._known = suite, TEXT_TASKS | of_suite
        check_positive(max_tokens=max_tokens)
        for task in self.definitions.values():
            refuse_keys(task, _IMAGE_KEYS, "whose inputs are texts")
            written = embedded_name(task)
            if written is not None:
                check_embedded(task, written, WRITTEN_TASKS, usable=())
                continue
            check_text_task(task)
            check_path(task)
        if texts not in (None, "-") and not Path(str(texts)).expanduser().is_file():
            raise InputError(f"data.texts: no file {texts!r}")
        self.prompts, self.max_tokens, self.texts = prompts, max_tokens, texts

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs; nothing for ``predict``, which answers texts as they are."""
        if stage != "predict":
            super().setup(stage)

    def load_task(self, task: Task, splits: list[SplitName]) -> None:
        """Read the texts, and their tokens from the cache or into it."""
        cache = cache_root(self.cache_dir)
        written = embedded_name(task)
        if written is not None:
            self._add(task.name, WRITTEN_TASKS[written], splits, cache)
            return
        source = TextSource(task, self._known.get(task.name), cache / "datasets")
        metric = task.metric or ("spearman" if source.label_words is None else "accuracy")
        self.tasks[task.name] = TextTask(task.name, source.label_words, metric, source.template)
        for split in splits:
            self._add_split(task.name, split, source.texts(split), cache)

    def _add(self, name: str, written: WrittenTask, splits: list[SplitName], cache: Path) -> None:
        self.tasks[name] = TextTask(name, written.label_words, written.metric, written.template)
        for split in splits:
            rows, targets = written.rows(split)
            inputs = [written.template.format(**row) for row in rows]
            if written.label_words is None:
                answers, labels = [f"{score:.1f}" for score in targets], np.array(targets, np.float32)
            else:
                answers, labels = [written.label_words[int(label)] for label in targets], np.array(targets, np.int64)
            self._add_split(name, split, Texts(inputs, answers, labels), cache)

    def _add_split(self, name: str, split: SplitName, texts: Texts, cache: Path) -> None:
        chosen = self.chosen(np.arange(len(texts)), name, split)
        samples = TextSplit(texts[chosen], self._tokenizer(), self.max_tokens, cache)
        cut = [samples.texts.inputs[row] for row in samples.truncated_rows]
        self._report(name, split, cut, len(samples))
        self.loaded[name][split] = samples

    def loss_counts(self, splits: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tokens of each training sample's answer."""
        return {name: split.loss_counts for name, split in splits.items()}

    def predict_dataloader(self) -> PredictTexts:
        """Batches of the texts to answer.

        Raises:
            InputError: no ``texts`` given, or none in them.
        """
        if self.texts is None:
            raise InputError("predict needs --data.texts, a file with one text a line, or - for the standard input")
        texts = _texts(self.texts)
        if not texts:
            raise InputError(f"data.texts: no text in {'the standard input' if self.texts == '-' else self.texts!r}")
        return PredictTexts(texts, self._tokenizer(), self.eval_batch_size, self.max_tokens)

    def _tokenizer(self) -> Any:
        if self.trainer is None or self.trainer.lightning_module is None:
            raise RuntimeError("attach a trainer whose module has a backbone with a tokenizer before setup")
        return as_tokenizing(self.trainer.lightning_module.backbone).tokenizer

    def _report(self, task: str, split: str, cut: Sequence[str], num_samples: int) -> None:
        if cut:
            _log.warning(
                "%d of %d texts of task %r (%s) are longer than %d tokens and were cut; raise data.max_tokens: %s",
                *(len(cut), num_samples, task, split, self.max_tokens, _beginnings(cut)),
            )


def _texts(source: str) -> list[str]:
    """The lines of a file, or of the standard input, that hold a text; how many do not is logged."""
    lines = lines_of(source, "data.texts")
    empty = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        _log.warning("data.texts: %d of %d lines are empty and left out: %s", len(empty), len(lines), name_list(empty))
    return [line for line in lines if line.strip()]


def _beginnings(texts: Sequence[str]) -> str:
    return name_list(repr(f"{text[:40]}...") for text in texts)


class PredictTexts:
    """Batches ``{"input_ids", "attention_mask", "text"}`` of constant size, the last one padded with its first text.

    Args:
        texts: what to answer.
        tokenizer: the model's tokenizer.
        batch_size: texts in a batch.
        max_tokens: longer texts are cut.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, batch_size: int, max_tokens: int) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.batch_size, self.max_tokens = batch_size, max_tokens

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches in the order of the texts; ``text`` lists those that are no padding."""
        for start in range(0, len(self.texts), self.batch_size):
            texts = self.texts[start : start + self.batch_size]
            ids, cut = tokenize(self.tokenizer, texts, self.max_tokens)
            if cut:
                _log.warning(
                    "%d texts are longer than %d tokens and were cut; raise data.max_tokens: %s",
                    *(len(cut), self.max_tokens, _beginnings([texts[row] for row in cut])),
                )
            ids += [ids[0]] * (self.batch_size - len(ids))
            lengths = torch.tensor([len(tokens) for tokens in ids])
            input_ids = torch.full((len(ids), int(lengths.max())), int(self.tokenizer.pad_token_id))
            for row, tokens in zip(input_ids, ids, strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
            yield {"input_ids": input_ids, "attention_mask": mask, "text": list(texts)}
