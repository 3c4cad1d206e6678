"""Instruction data as tasks of a causal language model: conversations, completions, ranked answers, texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fusionlab.backbones.tokenizers import tokenizer_fingerprint
from fusionlab.contracts import Tokenizing, as_tokenizing, is_tokenizing
from fusionlab.data.asking import ASKED_TASKS
from fusionlab.data.base import TaskData, check_embedded, check_positive, embedded, embedded_name, refuse_keys
from fusionlab.data.cache import cache_root
from fusionlab.data.chat.checks import check_prompts, check_words, report_ends, report_rows, shown
from fusionlab.data.chat.cutting import Cutter
from fusionlab.data.chat.encoding import Encoder, shared_opening
from fusionlab.data.chat.given import check_needed, check_same_tokens, given_tokenizer, moment_of, warn_of_system
from fusionlab.data.chat.kinds import ChatTask, metric_of
from fusionlab.data.chat.prompts import STDIN, PromptBatches, read_questions
from fusionlab.data.chat.rows import Said, answered, find_format, question, read_row
from fusionlab.data.chat.sources import Source, is_ranked, open_source
from fusionlab.data.chat.split import ChatSplit, PackedSplit
from fusionlab.data.chat.tables import encode_table
from fusionlab.data.chat.template import Template, read_template, template_of
from fusionlab.data.known_tasks import TEXT_TASKS
from fusionlab.data.rendering import check_text_task
from fusionlab.data.sources import check_path
from fusionlab.data.splits import SplitName
from fusionlab.data.tasks import Task, parse_tasks
from fusionlab.errors import InputError, did_you_mean, name_list

_FORMAT = 7
"""Raise to drop every cache, after a change to encoding."""
_IMAGE_KEYS = ("image_column", "templates", "class_aliases")
EMBEDDED_CHAT_TASKS: list[str | dict] = list(ASKED_TASKS)
_KNOWN = {**TEXT_TASKS, **embedded(ASKED_TASKS)}

OnEmpty = Literal["error", "skip"]


class ChatTasks(TaskData):
    """One loader over all tasks in training, exact batches of each task in evaluation.

    The columns of a task's rows say what they are: ``messages``; ``prompt`` and ``completion``, texts or messages;
    ``instruction``, ``input`` and ``output``; ``text``. A task that says ``input_columns`` or ``template`` is ranked
    (``label_words``, or the classes of its label column) or answered by a number (``target_column``), which is written
    with one decimal. ``tools`` and ``chat_template_kwargs`` beside messages go to the chat template. An answer ends
    where the template closes it, by a special token or by its text; where it writes nothing, the tokenizer's end token
    is learnt behind the last answer.

    Args:
        tasks: names known to the package (GLUE's cola, mnli, mrpc, qqp, rte, sst2, stsb, and the embedded ones, which
            are the default), or mappings ``{name, path}`` where path is a hub id, or a local folder or file of
            parquet, csv, tsv or json; with ``input_columns``, ``template``, ``label_words`` or ``target_column`` for a
            ranked task or a score.
        batch_size: samples (rows of packed samples) of each task in a training batch of one process.
        eval_batch_size: samples in an evaluation batch at most; those of a set are of one size.
        max_length: tokens of a sample at most; longer ones are cut at the end, counted and reported. Perplexity is that
            of what is left.
        packing: train on several samples in a row, kept apart by their positions.
        completion_only_loss: learn completions, also as messages or through the template, not their prompts.
        assistant_only_loss: of the messages that are learnt, learn the assistant's alone.
        apply_chat_template: also put plain-text prompts (of ``predict`` too) and completions through the chat template.
        chat_template_path: file of a chat template in the place of the tokenizer's own, or ``none`` for none; the
            tokenizer is saved with it, beside adapters too.
        system: system message of conversations that have none of their own; it needs a chat template.
        on_empty: rows with nothing to learn are an ``error``, or left out and counted (``skip``).
        date: the date that a template writes where it asks for today's, such as 2026-01-31; by default that of the
            run, which is the day on which it is begun.
        prompts: file of questions for ``predict``, one JSON row a line; the column that is added, ``answer``, is
            called ``model_answer`` where the rows have one of their own (and ``scores`` alike).
        tokenizer: folder or hub id of the tokenizer, or one that is loaded, of the same tokens as the model's, which is
            the default.
        arguments: max_samples, cache_dir and seed, as of :class:`~fusionlab.data.base.TaskData`.
    """

    gives = "conversations"

    def __init__(
        self,
        tasks: list[str | dict] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 32,
        max_length: int = 1024,
        packing: bool = False,
        completion_only_loss: bool = True,
        assistant_only_loss: bool = True,
        apply_chat_template: bool = False,
        chat_template_path: str | None = None,
        system: str | None = None,
        on_empty: OnEmpty = "error",
        date: str | None = None,
        prompts: str | None = None,
        tokenizer: Any = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            parse_tasks(EMBEDDED_CHAT_TASKS if tasks is None else tasks, _KNOWN),
            batch_size,
            eval_batch_size,
            **arguments,
        )
        check_positive(max_length=max_length)
        for task in self.definitions.values():
            refuse_keys(task, _IMAGE_KEYS, "whose inputs are texts")
            if (asked := embedded_name(task)) is not None:
                check_embedded(task, asked, ASKED_TASKS, usable=())
                continue
            if is_ranked(task):
                check_text_task(task)
            else:
                refuse_keys(task, ("label_words", "class_names", "label_column"), "which has no input_columns")
            check_path(task)
        if on_empty not in ("error", "skip"):
            raise InputError(f"on_empty must be 'error' or 'skip', got {on_empty!r}")
        for what, path, word in (("chat_template_path", chat_template_path, "none"), ("prompts", prompts, STDIN)):
            if path is not None and path != word and not Path(path).expanduser().is_file():
                raise InputError(f"data.{what}: no file {path!r}")
        self.max_length, self.packing, self.system = max_length, packing, system
        self.completion_only_loss, self.assistant_only_loss = completion_only_loss, assistant_only_loss
        self.apply_chat_template, self.chat_template_path = apply_chat_template, chat_template_path
        self.on_empty, self.prompts = on_empty, prompts
        self.moment = moment_of(date)
        self._given_tokenizer = tokenizer
        self._sources: dict[str, Source] = {}

    # what a row becomes

    def encode(self, task: str, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """What the model reads of a raw row, and what it learns of it: the function behind training and scoring.

        Args:
            task: name of the task.
            row: the row by column, as the data have it.

        Returns:
            ``input_ids``; ``labels`` of the same length, -100 where nothing is learnt, each label at the position of
            its own token; ``prompt_ids``, what ranking and generation are given for the last answer.

        Raises:
            InputError: no such task; the row is of another format, or nothing of it is left to learn.
        """
        if task not in self.definitions:
            raise InputError(f"no task {task!r}; {did_you_mean(task, self.definitions)}")
        encoded = self.encoder.encode(self._said(self.definitions[task], row))
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "prompt_ids": encoded.prompt_ids}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, or its copy where another chat template comes in; else the module's."""
        if self._given_tokenizer is not None:
            given = given_tokenizer(self._given_tokenizer, changes=self.chat_template_path is not None)
            if self._read_by is not None:
                check_same_tokens(given, *self._read_by)
            return given
        if self.trainer is None or self.trainer.lightning_module is None:
            raise RuntimeError("give tokenizer, or attach a trainer whose module has a backbone with a tokenizer")
        return as_tokenizing(self.trainer.lightning_module.backbone).tokenizer

    @property
    def _read_by(self) -> tuple[Tokenizing, str] | None:
        """The backbone of the attached module and its name, where it has a tokenizer."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return None if module is None or not is_tokenizing(module.backbone) else (module.backbone, module.backbone.name)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns rows into tokens; the chat template that does goes with the module's tokenizer from here on."""
        if self.chat_template_path is not None:
            self.tokenizer.chat_template = read_template(self.chat_template_path)
        if self._given_tokenizer is not None and self._read_by is not None:
            self._read_by[0].tokenizer.chat_template = self.tokenizer.chat_template
        source = template_of(self.tokenizer)
        check_needed(source, {"system": self.system, "apply_chat_template": self.apply_chat_template})
        cutter = Cutter(self.tokenizer)
        template = None if source is None else Template(source, cutter, self.moment)
        return Encoder(cutter, template, self.max_length, self.completion_only_loss, self.assistant_only_loss)

    @property
    def _end_ids(self) -> tuple[int, ...]:
        return self.encoder.end_ids

    def _said(self, task: Task, row: Mapping[str, Any]) -> Said:
        """What a raw row says; the kind of instruction data that was not read yet is told by the row itself."""
        if is_ranked(task) or embedded_name(task) is not None or task.name in self._sources:
            source = self._source(task)
            return self._read(source.kind, source.row(row))
        kind = find_format(row)
        if kind is None:
            raise InputError(f"a row of task {task.name!r} has the columns of no format: {name_list(row)}")
        return self._read(kind, row)

    def _answered(self, content: str, answer: str) -> Said:
        return answered(question(content, self.encoder.template is not None, self.system), answer)

    def shown_samples(self, task: str) -> list[str]:
        """The first two training samples as the model reads them, what is learnt between ⟦ and ⟧."""
        split = self.splits[task]["train"]
        samples = split.split.samples if isinstance(split, PackedSplit) else split.samples
        return [shown(samples, row, self.tokenizer) for row in range(min(2, len(samples.answers)))]

    def loss_counts(self, splits: Mapping[str, Any]) -> dict[str, Tensor]:
        """Learnt tokens of each training sample, or row of packed ones."""
        return {name: split.loss_counts for name, split in splits.items()}

    def predict_dataloader(self) -> PromptBatches:
        """Batches of the questions to answer.

        Raises:
            InputError: no ``prompts`` given, or a line of them is no question.
        """
        if self.prompts is None:
            raise InputError("predict needs --data.prompts, a file of one JSON row a line, or - for the standard input")
        questions = read_questions(self.prompts, self.encoder, self.system, self.apply_chat_template)
        return PromptBatches(questions, self.eval_batch_size, self._end_ids, self.encoder.frame)

    # loading

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs; nothing for ``predict``, which answers questions as they are."""
        if stage != "predict":
            super().setup(stage)

    def load_task(self, task: Task, splits: list[SplitName]) -> None:
        """Read the rows, and their tokens from the cache or into it.

        Raises:
            InputError: the data cannot be read, or rows cannot be encoded; the message counts and names them.
        """
        source = self._source(task)
        self.tasks[task.name] = self._task(task, source)
        for split in splits:
            self.loaded[task.name][split] = self._split_of(task.name, source, split)

    def _source(self, task: Task) -> Source:
        if task.name not in self._sources:
            self._sources[task.name] = open_source(task, cache_root(self.cache_dir) / "datasets")
        return self._sources[task.name]

    def _task(self, task: Task, source: Source) -> ChatTask:
        words = source.label_words
        encoded = [self.encoder.encode(self._answered("x", word)) for word in words or ()]
        answers, closing = (tuple(getattr(each, name) for each in encoded) for name in ("answer_ids", "num_closing"))
        packed, metric = self.max_length if self.packing else None, metric_of(task, source.kind)
        made = ChatTask(task.name, source.kind, metric, words, answers, closing, self._end_ids, packed)
        return replace(made, num_opening=shared_opening(encoded), frame=self.encoder.frame)

    def _split_of(self, task: str, source: Source, split: SplitName) -> ChatSplit | PackedSplit:
        table, numbers, targets = source.table(split)
        if self.system is not None and split == "train":
            warn_of_system(task, source.kind, table, templates_plain=self.apply_chat_template)
        chosen = self.chosen(np.arange(len(numbers)), task, split)
        key = f"{self.fingerprint()}\0{source.kind}"
        cache = cache_root(self.cache_dir) / "chat"
        read = partial(self._read, source.kind)
        encoded = encode_table(table.select(chosen), read, self.encoder, key, cache)
        numbers = numbers[chosen]
        report_rows(encoded, numbers, (task, split), skips_empty=self.on_empty == "skip", max_length=self.max_length)
        samples, kept = encoded.samples(targets[chosen])
        check_words(samples, self.tasks[task].answer_ids, task, numbers[kept], self.max_length)
        if split != "train" and self.tasks[task].metric != "perplexity":
            check_prompts(samples, (task, split), numbers[kept], self.max_length)
            report_ends(samples, (task, split), self.tasks[task].frame)
        asked = samples.prompts.lengths.tolist() if split != "train" else []  # training prompts are not answered
        largest = int(samples.input_ids.tokens.max(initial=0))
        self.tasks[task] = self.tasks[task].with_lengths(samples.input_ids.lengths.tolist(), asked, largest)
        made = ChatSplit(samples, fixed_shapes=split != "train")
        return PackedSplit(made, self.max_length) if self.packing and split == "train" else made

    def _read(self, kind: str, row: Mapping[str, Any]) -> Said:
        if kind in ("ranked", "score", "asked"):
            return self._answered(row["question"], row["answer"])
        templated = self.encoder.template is not None
        return read_row(row, kind, templated=templated, system=self.system, templates_plain=self.apply_chat_template)

    def fingerprint(self) -> str:
        """Short SHA-256 over all that decides how rows become tokens."""
        options = {
            "format": _FORMAT,
            "template": None if self.encoder.template is None else self.encoder.template.source,
            "system": self.system,
            "max_length": self.max_length,
            "completion_only_loss": self.completion_only_loss,
            "assistant_only_loss": self.assistant_only_loss,
            "apply_chat_template": self.apply_chat_template,
        }
        text = json.dumps(options, sort_keys=True) + tokenizer_fingerprint(self.tokenizer)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
