"""T5Module: training, evaluation by rank, by exact match and by score, fusion by every rule, and prediction."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import T5ForConditionalGeneration

from fusionlab import rules
from fusionlab.adapters import base_state
from fusionlab.callbacks import FusionCallback
from fusionlab.contracts import DataDefaults
from fusionlab.data.loader import StepLoader
from fusionlab.evaluation.scores import evaluate
from fusionlab.fusion.by_task import acting
from fusionlab.fusion.folders import save_fused
from fusionlab.fusion.making import fuse_weights
from fusionlab.modules import T5Module
from fusionlab.runs.loading import load_weights
from fusionlab.tensors import open_checkpoint, save_state

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@dataclass(frozen=True)
class TextTask:
    name: str
    label_words: tuple[str, ...] | None
    metric: str


class TextSplit:
    """Texts padded to the longest of a batch, as rows of a dictionary."""

    evaluation_order = None

    def __init__(self, tokenizer: Any, texts: Sequence[str], answers: Sequence[str], targets: Sequence[float]) -> None:
        self.tokenizer, self.texts, self.answers = tokenizer, texts, answers
        self.targets = torch.tensor(targets)
        self.data_version = self.reading_version = f"{len(texts)} texts"

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        texts = self.tokenizer([self.texts[i] for i in indices.tolist()], padding=True, return_tensors="pt")
        labels = self.tokenizer(
            [self.answers[i] for i in indices.tolist()], padding=True, return_tensors="pt"
        ).input_ids
        return {
            **texts,
            "labels": labels.masked_fill(labels == self.tokenizer.pad_token_id, -100),
            "target": self.targets[indices],
            "index": indices,
        }


class TextData(LightningDataModule, DataDefaults):
    """Two label tasks (good or bad in words, the same of another word) and a score, all easily learned."""

    batch_size, eval_batch_size = 16, 32

    def __init__(self, tokenizer: Any, num_samples: int = 48) -> None:
        super().__init__()
        words, other, values = ("positive", "negative"), ("same", "not_same"), (0.0, 2.5, 5.0)
        labels = [i % 2 for i in range(num_samples)]
        scores = [values[i % 3] for i in range(num_samples)]
        fillers = ["a " * (i % 5) + "xyz"[i % 3] for i in range(num_samples)]
        samples = (
            (TextTask("sentiment", words, "accuracy"), words, ("good", "bad"), labels),
            (TextTask("paraphrase", other, "accuracy"), other, ("the", "not"), labels),
        )
        self.tasks: dict[str, TextTask] = {}
        self.splits: dict[str, dict[str, TextSplit]] = {}
        for task, answers, cues, targets in samples:
            texts = [f"{filler} {cues[target]}" for filler, target in zip(fillers, targets, strict=True)]
            self._add(task, TextSplit(tokenizer, texts, [answers[target] for target in targets], targets))
        texts = [f"{filler} {score}" for filler, score in zip(fillers, scores, strict=True)]
        self._add(
            TextTask("similarity", None, "spearman"), TextSplit(tokenizer, texts, [str(s) for s in scores], scores)
        )

    def _add(self, task: TextTask, split: TextSplit) -> None:
        self.tasks[task.name] = task
        self.splits[task.name] = dict.fromkeys(("train", "validation", "test"), split)

    def train_dataloader(self) -> StepLoader:
        return StepLoader({name: self.splits[name]["train"] for name in self.tasks}, 16, seed=0)

    def val_dataloader(self) -> list[int]:
        return [0]

    def predict_dataloader(self) -> DataLoader:
        split = self.splits["sentiment"]["test"]
        batches = [{**split.batch(torch.arange(i, i + 4)), "text": split.texts[i : i + 4]} for i in (0, 4)]
        return DataLoader(batches, batch_size=None)


def prepared(folder: Path, **options: Any) -> tuple[T5Module, TextData]:
    module = T5Module(str(folder), rank=4, lora_alpha=8, **options).eval()
    data = TextData(module.backbone.tokenizer)
    module.prepare_tasks(data.tasks)
    return module, data


def perturb(module: T5Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameters in module.task_parameters.values():
        for parameter in parameters:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def trainer(root: Path, steps: int, **options: Any) -> Trainer:
    return Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, limit_val_batches=0, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def inputs_of(data: TextData) -> dict[str, Tensor]:
    batch = data.splits["paraphrase"]["test"].batch(torch.arange(5))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def values(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in rows}


def test_rank_accuracy_is_the_share_of_words_with_the_highest_likelihood(t5_folder: Callable[[str], Path]) -> None:
    module, data = prepared(t5_folder("untied"))
    scored = values(evaluate(module, data, ["sentiment", "paraphrase"], "test"))
    for name, task in data.tasks.items():
        if task.label_words is None:
            continue
        split, hits = data.splits[name]["test"], 0
        for index in range(len(split)):
            batch = split.batch(torch.tensor([index]))
            labels = [module.backbone.tokenizer(word, return_tensors="pt").input_ids for word in task.label_words]
            with torch.no_grad():
                losses = [module.loss(name, {**batch, "labels": label}) * label.shape[1] for label in labels]
            hits += losses.index(min(losses)) == split.targets[index]
        assert scored[name, "accuracy"] == hits / len(split)
    assert len(scored) == 2


def test_ties_go_to_the_lower_index(t5_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = prepared(t5_folder("tied"))
    monkeypatch.setattr(module, "log_likelihoods", lambda task, batch: torch.zeros(len(batch["target"]), 2))
    labels = data.splits["sentiment"]["test"].targets
    scored = values(evaluate(module, data, ["sentiment"], "test"))
    assert scored["sentiment", "accuracy"] == (labels == 0).double().mean().item()


def test_generated_answers_must_match_letter_by_letter(
    t5_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = prepared(t5_folder("tied"), evaluation={"paraphrase": "generate"})

    def answers(batch: dict[str, Tensor]) -> list[str]:
        return [("same", "not_same ")[i % 2] for i in batch["index"].tolist()]

    monkeypatch.setattr(module, "generate", answers)
    scored = values(evaluate(module, data, ["sentiment", "paraphrase"], "test"))
    assert scored["paraphrase", "exact_match"] == 0.5  # a blank too many in every second answer
    assert ("sentiment", "accuracy") in scored


def test_scores_are_read_from_answers_and_unparsable_ones_counted(
    t5_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = prepared(t5_folder("tied"))
    split = data.splits["similarity"]["test"]

    def answers(batch: dict[str, Tensor]) -> list[str]:
        return ["no score" if i in (0, 5) else f"{split.targets[i]:.1f}" for i in batch["index"].tolist()]

    monkeypatch.setattr(module, "generate", answers)
    scored = values(evaluate(module, data, ["similarity"], "test"))
    assert list(scored) == [("similarity", name) for name in ("spearman", "pearson", "unparsable")]
    assert scored["similarity", "unparsable"] == 2
    assert 0.5 < scored["similarity", "spearman"] < 1
    monkeypatch.setattr(module, "generate", lambda batch: ["?"] * len(batch["index"]))
    scored = values(evaluate(module, data, ["similarity"], "test"))
    assert list(scored.values()) == [0.0, 0.0, 48.0]


@pytest.fixture(scope="module")
def run(t5_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """A run folder of a fit over three tasks, its module, data and the base weights before."""
    root = tmp_path_factory.mktemp("run")
    module = T5Module(str(t5_folder("untied")), method="l_lora", rank=4, learning_rate=2e-2, max_new_tokens=6)
    before = {name: tensor.clone() for name, tensor in module.backbone.model.state_dict().items()}
    data = TextData(module.backbone.tokenizer)
    callback = FusionCallback(rules=["average", "metagpt", "ties"])
    trainer(root, 80, callbacks=[callback]).fit(module, datamodule=data)
    return root, module, data, before


def test_training_learns_every_task_and_keeps_the_base_bit_for_bit(run: tuple[Path, Any, Any, Any]) -> None:
    root, module, _, before = run
    assert module.injection.num_adapted_layers == 12
    after = module.backbone.model.state_dict()
    for name, tensor in before.items():
        kept = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[kept], tensor), name
    rows = json.loads((root / "results.json").read_text())["rows"]
    scored = {(row["model"], row["rule"], row["task"], row["metric"]): row["value"] for row in rows}
    for task, metric in (("sentiment", "accuracy"), ("paraphrase", "accuracy"), ("similarity", "spearman")):
        own = scored["finetuned", None, task, metric]
        assert own > 0.9
        assert own > scored["pretrained", None, task, metric]
        assert ("fused", "ties", task, metric) in scored
    assert all(row["normalized"] is None for row in rows if row["metric"] == "unparsable")


def test_exported_adapters_load_with_stock_peft(
    run: tuple[Path, Any, Any, Any], t5_folder: Callable[[str], Path]
) -> None:
    root, module, data, _ = run
    inputs = inputs_of(data)
    for folder, weights in (
        (root / "adapters" / "paraphrase", "paraphrase"),
        (root / "fused" / "metagpt", load_weights(root / "fused" / "metagpt").weights),
    ):
        base = T5ForConditionalGeneration.from_pretrained(t5_folder("untied")).eval()
        with torch.no_grad(), module.use(weights):
            expected = module.eval().backbone.logits(**inputs)
            got = PeftModel.from_pretrained(base, folder)(**inputs).logits
            # the same factors; the fused one rounds its sum over tasks once more
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "TaskArithmetic": {"scaling_coefficient": 0.3},
    "Lines": {"beta": 0.5},
    "Dare": {"rule": rules.Metagpt()},
    "Della": {"rule": rules.Metagpt()},
    "Trim": {"rule": rules.Average()},
}
RULES = [name for name in rules.__all__ if is_dataclass(getattr(rules, name)) and name != "Statistics"]


def acting_on(task: str, weights: Any, module: T5Module) -> Any:
    """The weights themselves, or the task's own of what needs to know the task."""
    [(own, _)] = acting(weights, [task], module)
    return own


@pytest.mark.parametrize("name", RULES)
def test_every_rule_fuses_t5_adapters(t5_folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    module, data = prepared(t5_folder("untied"), method="l_lora")
    module.add_adapters(["sentiment", "paraphrase"])
    perturb(module, 0.1)
    rule = getattr(rules, name)(**ARGUMENTS.get(name, {}))
    task_adapters = {task: module.finetuned(task) for task in module.task_parameters}
    fused = fuse_weights(rule, module, task_adapters)
    inputs = inputs_of(data)
    with torch.no_grad():
        pretrained = module.backbone.logits(**inputs)
        with module.use(acting_on("sentiment", fused.weights, module)):
            expected = module.backbone.logits(**inputs)
        assert (expected - pretrained).abs().max() > 1e-3
        assert torch.equal(module.backbone.logits(**inputs), pretrained)
        save_fused(tmp_path / "fused", fused, module.backbone, {"model": "fused", "rule": name})
        loaded = load_weights(tmp_path / "fused", module.base_model).weights
        with module.use(acting_on("sentiment", loaded, module)):
            assert torch.equal(module.backbone.logits(**inputs), expected)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_fused_model_loads_with_from_pretrained(t5_folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    module, data = prepared(t5_folder(kind), method="lora")
    module.add_adapters(["sentiment", "paraphrase"])
    perturb(module, 0.1)
    task_adapters = {task: module.finetuned(task) for task in module.task_parameters}
    fused = fuse_weights(rules.Ties(), module, task_adapters)
    save_fused(tmp_path, fused, module.backbone, {"model": "fused"})
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = inputs_of(data)
    with torch.no_grad(), module.use(fused.weights):
        assert torch.equal(loaded(**inputs).logits, module.backbone.logits(**inputs))
    assert (loaded.lm_head.weight is loaded.shared.weight) == (kind == "tied")
    again = T5Module(str(tmp_path))
    assert again.backbone.tokenizer.get_vocab() == module.backbone.tokenizer.get_vocab()
    names = set(open_checkpoint(tmp_path).tensors)
    assert names == set(open_checkpoint(t5_folder(kind)).tensors)  # tied tensors are stored once
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == (kind == "tied")


def test_tied_tensors_stored_under_all_their_names_load(t5_folder: Callable[[str], Path], tmp_path: Path) -> None:
    module = T5Module(str(t5_folder("tied")))
    state = {name: tensor.clone() for name, tensor in module.base_model.state_dict().items()}
    assert {"shared.weight", "lm_head.weight", "encoder.embed_tokens.weight"} <= set(state)
    module.backbone.save_files(tmp_path)
    save_state(tmp_path, state)
    weights = load_weights(tmp_path, module.base_model).weights
    assert set(weights) == set(base_state(module.base_model))


def test_predict_answers_texts_with_the_weights_given(
    run: tuple[Path, Any, Any, Any], t5_folder: Callable[[str], Path]
) -> None:
    root, trained, data, _ = run
    module = T5Module(str(t5_folder("untied")), weights=str(root / "adapters" / "sentiment"), max_new_tokens=16)
    predicted = [row for batch in trainer(root, 1).predict(module, datamodule=data) for row in batch]
    assert [row["text"] for row in predicted] == data.splits["sentiment"]["test"].texts[:8]
    with torch.no_grad(), trained.use("sentiment"):
        trained.max_new_tokens = 16
        expected = trained.eval().generate(data.splits["sentiment"]["test"].batch(torch.arange(8)))
    assert [row["answer"] for row in predicted] == expected
    assert {"positive", "negative"} <= set(expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_precision_trains_and_scores(t5_folder: Callable[[str], Path], tmp_path: Path, precision: Any) -> None:
    module = T5Module(str(t5_folder("untied")), rank=2, method="l_lora", max_new_tokens=4)
    data = TextData(module.backbone.tokenizer, num_samples=16)
    with torch.no_grad():
        batch = data.splits["sentiment"]["test"].batch(torch.arange(16))
        module.prepare_tasks(data.tasks)
        exact = module.eval().log_likelihoods("sentiment", batch)
    fit = trainer(tmp_path, 2, precision=precision, callbacks=[FusionCallback(rules=["average"])])
    fit.fit(module, datamodule=data)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 3 * (1 + 1 + 3)
    with torch.no_grad(), module.use(None), module.evaluation_context():
        scores = module.eval().log_likelihoods("sentiment", batch)
    assert scores.dtype == torch.float32
    # 8 bits of mantissa in sums of up to nine tokens of size 1 to 20
    torch.testing.assert_close(scores, exact, rtol=0.02, atol=0.5)
    assert not torch.equal(scores, exact)


# forward-mode differentiation scripts its decompositions on first use; torch warns about that itself
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["tangent_lora", "tangent", "full"])
def test_other_methods_train_fuse_and_load(t5_folder: Callable[[str], Path], tmp_path: Path, method: Any) -> None:
    module = T5Module(str(t5_folder("tied")), rank=2, method=method, max_new_tokens=3)
    data = TextData(module.backbone.tokenizer, num_samples=16)
    trainer(tmp_path, 2, callbacks=[FusionCallback(rules=["average"])]).fit(module, datamodule=data)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {(row["model"], row["rule"]) for row in rows} == {
        ("pretrained", None), ("finetuned", None), ("fused", "average")
    }  # fmt: skip
    folder = tmp_path / ("adapters" if method == "tangent_lora" else "finetuned") / "paraphrase"
    batch = data.splits["paraphrase"]["test"].batch(torch.arange(16))
    with torch.no_grad():
        expected = []
        for weights in (None, "paraphrase", load_weights(folder, module.base_model).weights):
            with module.use(weights):
                expected.append(module.eval().log_likelihoods("paraphrase", batch))
    assert torch.equal(expected[1], expected[2])
    assert not torch.equal(expected[0], expected[1])
    if method == "full":
        loaded = T5Module(str(folder)).eval()
        loaded.prepare_tasks(data.tasks)
        with torch.no_grad():
            # another kernel for parameters without gradient
            torch.testing.assert_close(loaded.log_likelihoods("paraphrase", batch), expected[1], rtol=1e-5, atol=1e-4)
