"""Causal language models: instructions answered by ranked or generated answers, texts by their perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from fusionlab.adapters import base_state, enable_gradient_checkpointing
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.backbones.causal import ALL_LINEAR, CausalBackbone
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.backbones.label_words import check_words
from fusionlab.backbones.layout import to_disk
from fusionlab.backbones.positions import check_ids, check_positions
from fusionlab.backbones.tokenizers import Frame, generating
from fusionlab.errors import InputError
from fusionlab.evaluation.metrics import Accuracy, Perplexity, RankedAccuracy, ScoreCorrelation
from fusionlab.files import write_folder
from fusionlab.layout import BASE
from fusionlab.modules.answering import (
    Asked,
    Evaluation,
    Ranking,
    answered_row,
    check_answers,
    check_evaluation,
    check_generated,
    check_recomputed,
    is_generated,
)
from fusionlab.modules.applying import Linearized
from fusionlab.modules.base import FusionModule
from fusionlab.modules.language import causal_backbone
from fusionlab.tensors import save_state

IGNORED = -100


class CausalModule(FusionModule):
    """Fine-tunes a causal language model on instructions, and scores ranked, generated or whole texts.

    A task's loss is the mean over its learnt tokens in all micro-batches and processes of a step.

    Args:
        backbone: the embedded ``tiny-lm``, which is the default, a local folder or a hub id of a causal language model,
            or a GGUF file, which is dequantized and written to ``base/`` of the run.
        target_modules: names of the linear layers to adapt, or ``all-linear``, the default: all but the head.
        evaluation: how tasks with label words are scored: ``rank`` takes the one of the highest likelihood,
            ``generate`` compares the greedy answer; one for all tasks, or by task, ``rank`` where it is not named.
        ranking: what label words are ranked by: log p of the ``whole`` answer with what closes it, ``without_end``,
            or that of the latter divided by its tokens (``per_token``) or bytes (``per_byte``).
        max_new_tokens: length of a generated answer at most, in tokens.
        dtype: dtype of the frozen weights, ``float32`` or ``bfloat16``; adapters are float32.
        gradient_checkpointing: compute activations again in the backward pass of lora and l_lora: less memory.
        arguments: method, rank and the others of :class:`~fusionlab.modules.base.FusionModule`.
    """

    reads = "conversations"
    backbone: CausalBackbone
    default_backbone = "tiny-lm"
    task_type = "CAUSAL_LM"
    default_learning_rates: ClassVar[dict[str, float]] = {
        "lora": 2e-4, "l_lora": 1e-3, "tangent_lora": 1e-3, "tangent": 1e-4, "full": 2e-5,
    }  # fmt: skip

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
        target_modules: list[str] | str | None = None,
        evaluation: Evaluation | dict[str, Evaluation] = "rank",
        ranking: Ranking = "whole",
        max_new_tokens: int = 64,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        **arguments: Any,
    ) -> None:
        check_answers(ranking, max_new_tokens)
        if isinstance(target_modules, str):
            target_modules = None if target_modules == ALL_LINEAR else [target_modules]
        loaded = causal_backbone(backbone or self.default_backbone, dtype)
        super().__init__(loaded, target_modules=target_modules, **arguments)
        if gradient_checkpointing:
            check_recomputed(self.method)
            enable_gradient_checkpointing(self.base_model)
        self.evaluation, self.ranking, self.max_new_tokens = evaluation, ranking, max_new_tokens
        self.tasks: dict[str, Any] = {}
        self.trees: dict[str, AnswerTree] = {}

    def setup(self, stage: str) -> None:
        """Refuse float16 and tasks that cannot be scored before anything is written; then as every module does.

        Raises:
            InputError: the trainer's precision is float16, or as in :meth:`prepare_tasks`.
        """
        self.prepare_tasks(self.trainer.datamodule.tasks)
        if stage == "fit" and self.backbone.is_converted:
            self.backbone.name = self.backbone.loaded_from = str(self._converted)  # where adapters point
        super().setup(stage)

    @property
    def _converted(self) -> Path:
        return Path(self.trainer.default_root_dir) / BASE

    def on_fit_start(self) -> None:
        """As every module; a base that is on disk in another form only is written once."""
        super().on_fit_start()
        if self.backbone.is_converted and self.trainer.is_global_zero and not self._converted.is_dir():
            with write_folder(self._converted) as unfinished:
                self.backbone.save_files(unfinished)
                save_state(unfinished, to_disk(self.base_model, base_state(self.base_model)), {"format": "pt"})

    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Take the tasks' label words as tokens, on this device.

        Raises:
            InputError: label words of the same tokens, or that are longer than what is generated or read at once; an
                ``evaluation`` for no task, or packed samples that the architecture does not keep apart.
        """
        check_evaluation(self.evaluation, tasks)
        self.tasks = dict(tasks)
        self.trees = {}
        for name, task in tasks.items():
            if task.packed_length is not None:
                self.backbone.check_packing(task.packed_length)
            self._check_lengths(task)
            if task.label_words is None:
                continue
            end, unknown = self.backbone.tokenizer.eos_token_id, self.backbone.tokenizer.unk_token_id
            tree = AnswerTree.of(task.answer_ids, self.device, task.num_closing, task.num_opening)
            check_words(task.label_words, tree.words, end, -1 if unknown is None else unknown, name)
            self.trees[name] = tree

    def _check_lengths(self, task: Any) -> None:
        """Raise an InputError if a sample, or a prompt with its answer, is longer than the network reads or writes."""
        model, metric = self.backbone.model, self.metric_name(task.name)
        check_ids(model, task.largest_id, f"a sample of task {task.name!r}")
        check_positions(model, task.longest, f"a sample of task {task.name!r}")
        if metric == "accuracy":
            whole = task.longest_prompt + max(map(len, task.answer_ids)) - 1
            check_positions(model, whole, f"a prompt of task {task.name!r} with its longest label word")
        elif metric != "perplexity":
            whole = task.longest_prompt + self.max_new_tokens - 1
            check_positions(model, whole, f"a prompt of task {task.name!r} with its generated answer")
            answers = zip(task.answer_ids, task.num_closing, strict=True)
            check_generated(max((len(ids) - end for ids, end in answers), default=0), self.max_new_tokens, task.name)

    def on_predict_start(self) -> None:
        """As every module, after questions that are longer than the network reads are refused.

        Raises:
            InputError: one is.
        """
        asked = self.trainer.predict_dataloaders
        for question in asked.questions if isinstance(asked, Asked) else ():
            more = max(map(len, question.choices)) if question.choices else self.max_new_tokens
            check_positions(self.backbone.model, len(question.prompt_ids) + more - 1, "a prompt with its answer")
        super().on_predict_start()

    def metric_name(self, task: str) -> str:
        """What the task is scored by: that of its rows, or exact match where its label words are generated."""
        if self.tasks[task].kind != "ranked":
            return str(self.tasks[task].metric)
        return "exact_match" if is_generated(self.evaluation, task) else str(self.tasks[task].metric)

    def task_settings(self, task: str) -> dict[str, Any]:
        """Metric, and what label words are ranked by, or how answers are generated and read."""
        metric = self.metric_name(task)
        if metric == "perplexity":
            return {"metric": metric}
        if metric == "accuracy":
            return {"metric": metric, **self.ranking_settings(task)}
        ends = self.backbone.end_ids(self.tasks[task].end_ids)
        found = {"metric": metric, **generating(self.max_new_tokens, self.backbone.tokenizer), "end_ids": sorted(ends)}
        frame = self.tasks[task].frame
        return found | (frame._asdict() if frame.end_text or (frame.opening and metric != "exact_match") else {})

    def ranking_settings(self, task: str) -> dict[str, Any]:
        """What label words are ranked by, and their tokens in order."""
        if task not in self.trees:
            return {}
        words = list(self.tasks[task].label_words) if self.ranking == "per_byte" else None
        found = {"ranking": self.ranking, "answers": self.trees[task].answers, "words": words}
        return found if self.ranking == "whole" else found | {"before_end": self.trees[task].words}

    def loss(self, task: str, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy in float32 over the learnt tokens, divided by the batch's ``loss_tokens``.

        So the mean over the batches of an update is that of all its tokens; without them it is that of the batch's own.
        """
        losses, counts = self._token_losses(batch)
        return losses.sum() / batch.get("loss_tokens", counts.sum())

    def _token_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """−Σ log p of each row's learnt tokens in float32, and their number; shape ``(batch,)``."""
        labels = batch["labels"][:, 1:]
        learnt = labels != IGNORED
        columns = learnt.any(0).nonzero()[:, 0]
        call = partial(self.backbone.logits, batch["input_ids"], columns, batch.get("position_ids"))
        logits, wanted = self.output(call), labels[:, columns]
        losses = F.cross_entropy(logits.transpose(1, 2).float(), wanted, ignore_index=IGNORED, reduction="none")
        return losses.sum(1), learnt.sum(1)

    def scored_classes(self, task: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of the label words and the index of the right one.

        Raises:
            InputError: the task has no label words.
        """
        if task not in self.trees:
            raise InputError(f"task {task!r} has no label words to choose from; leave it out of the diagnostics' plane")
        return self.log_likelihoods(task, batch), batch["target"]

    def run_inputs(self, task: str, batch: dict[str, Any]) -> None:
        """Read the prompts, without their answers; whole texts where a text is all there is."""
        is_text = self.tasks[task].kind == "text"
        self.output(partial(self.backbone.logits, batch["input_ids" if is_text else "prompt_ids"], 1))

    def metrics(self, task: str) -> MetricCollection:
        """Accuracy with the number of near ties, exact match, correlations, or perplexity."""
        name = self.metric_name(task)
        if name == "accuracy":
            name += "" if self.ranking == "whole" else f"_{self.ranking}"
            metric: Any = RankedAccuracy(name)
        elif name == "exact_match":
            metric = Accuracy()
        else:
            metric = Perplexity() if name == "perplexity" else ScoreCorrelation(name)
        return MetricCollection({name: metric}).to(self.device)

    def score(self, task: str, batch: dict[str, Any], metrics: MetricCollection) -> None:
        """Rank the label words, generate and compare or read the answers, or measure the texts."""
        (metric,) = metrics.values()
        if isinstance(metric, RankedAccuracy):
            metric.update_scores(self.log_likelihoods(task, batch), batch["target"], batch["mask"])
        elif isinstance(metric, Perplexity):
            metric.update(*self._token_losses(batch), batch["index"], batch["mask"])
        elif isinstance(metric, ScoreCorrelation):
            frame = self.tasks[task].frame
            answers = [None if text is None else frame.content(text) for text in self.generate(task, batch)]
            metric.update_texts(answers, batch["target"], batch["index"], batch["mask"])
        else:
            answers = [None if text is None else text.strip() for text in self.generate(task, batch)]
            metric.update_texts(answers, [text.strip() for text in batch["answer"]], batch["mask"])

    def log_likelihoods(self, task: str, batch: dict[str, Any]) -> Tensor:
        """What the task's label words are ranked by, float32, shape ``(batch, num_words)``."""
        tree = self.trees[task]
        of_tokens = self.backbone.log_likelihoods(batch["prompt_ids"], batch["prompt_mask"], tree, self.output)
        return tree.ranked_by(of_tokens, self.ranking, self.tasks[task].label_words)

    @property
    def is_linearized(self) -> bool:
        """Whether the active weights act by the first order of the whole network, whose outputs have no cache."""
        return isinstance(self.application, Linearized)

    def generate(self, task: str, batch: dict[str, Any]) -> list[str | None]:
        """The greedy answers to the batch's prompts; where the network is linearized, by its linearized logits.

        An answer ends where the model, or the template by a special token, ends it. Where a template closes answers by
        text alone, its text ends before what closes it first; it is generated to its greatest length all the same.

        Returns:
            one text a prompt, with what the template writes before the content; None where the outputs are NaN.
        """
        return self._generated(batch, self.tasks[task].end_ids, self.tasks[task].frame)

    def _generated(self, batch: dict[str, Any], end_ids: tuple[int, ...], frame: Frame) -> list[str | None]:
        asked, ends = (batch["prompt_ids"], batch["prompt_mask"]), self.backbone.end_ids(end_ids)
        answers = self.backbone.generate(*asked, self.max_new_tokens, ends, self.output, cached=not self.is_linearized)
        return [None if ids is None else frame.answer(self.backbone.decode(ids)) for ids in answers]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Answer a batch of questions: by the best of their choices, or by a text of its own.

        Raises:
            InputError: the outputs for a question are NaN.
        """
        choices, texts = batch["choices"], []
        if not all(choices):
            texts = self._generated(batch, batch["end_ids"], batch["frame"])
        said = [self._chosen(batch, n) if given else {"answer": texts[n]} for n, given in enumerate(choices)]
        names = batch["answer_names"]
        return [answered_row(row, one, names) for row, one in zip(batch["row"], said, strict=True)]

    def _chosen(self, batch: dict[str, Any], place: int) -> dict[str, Any]:
        """The best of a question's choices, None where there is none, and the scores of all."""
        choices, *around = (batch[key][place] for key in ("choices", "num_closing", "num_opening"))
        tree = AnswerTree.of(choices, self.device, *around)
        ids, mask = (batch[key][place : place + 1] for key in ("prompt_ids", "prompt_mask"))
        of_tokens, words = self.backbone.log_likelihoods(ids, mask, tree, self.output), batch["row"][place]["choices"]
        scores = tree.ranked_by(of_tokens, self.ranking, words)[0]
        best = int(lowest_argmax(scores))
        answer = None if best < 0 else words[best]
        return {"answer": answer, "scores": [round(score, 5) for score in scores.tolist()]}
