"""T5 text-to-text tasks: label words ranked by likelihood, or answers generated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection

from fusionlab.backbones import load_backbone
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.backbones.label_words import Answers
from fusionlab.backbones.settings import function_settings
from fusionlab.backbones.t5 import NO_FLOAT16, T5Backbone
from fusionlab.backbones.tokenizers import generating
from fusionlab.errors import InputError
from fusionlab.evaluation.metrics import Accuracy, ScoreCorrelation
from fusionlab.modules.answering import Evaluation, check_evaluation, check_generated, is_generated
from fusionlab.modules.applying import Linearized
from fusionlab.modules.base import FusionModule

LABEL_METRICS, SCORE_METRICS = ("accuracy", "exact_match"), ("spearman", "pearson")


class T5Module(FusionModule):
    """Fine-tunes T5's attention in encoder, decoder and cross-attention on text-to-text tasks.

    While training, T5's own dropout (``dropout_rate`` of its configuration) acts as well as that of the adapters.

    Args:
        backbone: an embedded name, a local folder or a hub id of a T5, T5 v1.1 or flan-T5; ``tiny-t5`` by default.
        evaluation: how tasks with label words are scored: ``rank`` takes the word of the highest likelihood
            (accuracy), ``generate`` compares the greedy answer letter by letter (exact_match); one for all tasks, or
            by task, ``rank`` where a task is not named.
        max_new_tokens: length of a generated answer at most, in tokens.
        dtype: dtype of the frozen weights, ``float32`` or ``bfloat16``; adapters are float32.
        arguments: method, rank and the others of :class:`~fusionlab.modules.base.FusionModule`.
    """

    reads = "texts"
    backbone: T5Backbone
    default_backbone = "tiny-t5"
    default_learning_rates: ClassVar[dict[str, float]] = {
        "lora": 5e-3, "l_lora": 1e-2, "tangent_lora": 1e-2, "tangent": 1e-3, "full": 1e-3,
    }  # fmt: skip

    def __init__(
        self,
        backbone: str | None = None,
        evaluation: Evaluation | dict[str, Evaluation] = "rank",
        max_new_tokens: int = 16,
        dtype: str = "float32",
        **arguments: Any,
    ) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        super().__init__(_load(backbone or self.default_backbone, dtype), **arguments)
        self.evaluation, self.max_new_tokens = evaluation, max_new_tokens
        self.metric_names: dict[str, str] = {}
        self.answers: dict[str, Answers] = {}

    def setup(self, stage: str) -> None:
        """Refuse float16 and tasks that cannot be scored before anything is written; then as every module does.

        Raises:
            InputError: the trainer's precision is float16, or as in :meth:`prepare_tasks`.
        """
        if str(self.trainer.precision).startswith(("16", "transformer-engine-float16")):
            raise InputError(f"trainer.precision {self.trainer.precision!r}: {NO_FLOAT16} (bf16-mixed, bf16-true, 32)")
        self.prepare_tasks(self.trainer.datamodule.tasks)
        super().setup(stage)

    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Choose each task's metric and tokenize its label words, on this device.

        Raises:
            InputError: a metric that does not fit its task, a label word that cannot be scored or answered, or an
                ``evaluation`` for no task.
        """
        check_evaluation(self.evaluation, tasks)
        for name, task in tasks.items():
            self.metric_names[name] = self._metric_name(name, task)
            self.answers.pop(name, None)  # of another task that was called so
            if task.label_words is None:
                continue
            answers = self.backbone.answers(task.label_words, name)
            if self.metric_names[name] == "exact_match":
                check_generated(max(answers.lengths), self.max_new_tokens, name)
            self.answers[name] = answers.to(self.device)

    def _metric_name(self, name: str, task: Any) -> str:
        fitting = SCORE_METRICS if task.label_words is None else LABEL_METRICS
        if task.metric not in fitting:
            kind = "a numeric score" if task.label_words is None else "label words"
            raise InputError(
                f"metric {task.metric!r} does not fit task {name!r}, whose target is {kind}; "
                f"expected {' or '.join(fitting)}"
            )
        generated = task.label_words is not None and is_generated(self.evaluation, name)
        return "exact_match" if generated else task.metric

    def task_settings(self, task: str) -> dict[str, Any]:
        """Metric, and the tokens of the label words that are ranked, or how answers are generated and read."""
        metric = self.metric_names[task]
        if metric == "accuracy":
            return {"metric": metric, **self.ranking_settings(task)}
        generation = function_settings(self.base_model.generation_config.to_dict())
        return {"metric": metric, **generating(self.max_new_tokens, self.backbone.tokenizer), "generation": generation}

    def ranking_settings(self, task: str) -> dict[str, Any]:
        """The tokens of the label words, in order."""
        answers = self.answers.get(task)
        return {} if answers is None else {"answers": [answers.targets.tolist(), list(answers.lengths)]}

    def loss(self, task: str, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy in float32 over the target tokens of the batch, padding (-100) aside, divided by its number.

        The number is the batch's ``loss_tokens``, where it has one: a share of those of all batches of an update.
        """
        logits, labels = self.output(partial(self.backbone.logits, *_inputs(batch), batch["labels"])), batch["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return loss / batch.get("loss_tokens", (labels != -100).sum())

    def scored_classes(self, task: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of the label words and the index of the right one.

        Raises:
            InputError: the task has no label words.
        """
        if task not in self.answers:
            raise InputError(f"task {task!r} has no label words to choose from; leave it out of the diagnostics' plane")
        return self.log_likelihoods(task, batch), batch["target"]

    def run_inputs(self, task: str, batch: dict[str, Any]) -> None:
        """Encode the texts, and decode all label words, or where there are none what an answer begins with."""
        if task in self.answers:
            self.log_likelihoods(task, batch)
        else:
            self.output(partial(self.backbone.first_logits, *_inputs(batch)))

    def metrics(self, task: str) -> MetricCollection:
        """Accuracy, exact match, or the correlations of the scores with the number of unparsable answers."""
        name = self.metric_names[task]
        metric = Accuracy() if name in LABEL_METRICS else ScoreCorrelation(name)
        return MetricCollection({name: metric}).to(self.device)

    def score(self, task: str, batch: dict[str, Any], metrics: MetricCollection) -> None:
        """Rank the label words (ties go to the lower index), or generate and compare or read the answers."""
        (metric,) = metrics.values()
        if self.metric_names[task] == "accuracy":
            metric.update(lowest_argmax(self.log_likelihoods(task, batch)), batch["target"], batch["mask"])
        elif isinstance(metric, ScoreCorrelation):
            metric.update_texts(self.generate(batch), batch["target"], batch["index"], batch["mask"])
        else:
            metric.update_texts(self.generate(batch), self.backbone.decode(batch["labels"]), batch["mask"])

    def log_likelihoods(self, task: str, batch: dict[str, Any]) -> Tensor:
        """log p(word | text) of the task's label words, float32, shape ``(batch, num_words)``."""
        return self.backbone.log_likelihoods(*_inputs(batch), self.answers[task], self.output)

    def generate(self, batch: dict[str, Any]) -> list[str]:
        """The greedy answer to each text of the batch; where the network is linearized, by its linearized logits."""
        inputs = *_inputs(batch), self.max_new_tokens
        if isinstance(self.application, Linearized):
            return self.backbone.decode(self.backbone.generate_by_logits(*inputs, self.output))
        return self.backbone.decode(self.output(partial(self.backbone.generate, *inputs)))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Answer a batch of texts."""
        answers = self.generate(batch)  # more than texts where the batch is padded
        return [{"text": text, "answer": answer} for text, answer in zip(batch["text"], answers, strict=False)]


def _inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def _load(backbone: str, dtype: str) -> T5Backbone:
    loaded = load_backbone(backbone, dtype=dtype, causal=False)
    if not isinstance(loaded, T5Backbone):
        raise InputError(
            f"T5Module needs an encoder-decoder, a T5, and {backbone!r} is a {type(loaded.model).__name__}; "
            f"give a T5, T5 v1.1 or flan-T5"
        )
    return loaded
