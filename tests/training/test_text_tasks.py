"""Text tasks: how rows become texts, answers and targets, how they are tokenized, cached and batched."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from fusionlab.data.known_tasks import NATURAL_PROMPTS, TEXT_TASKS
from fusionlab.data.text import TextTasks
from fusionlab.data.tokens import tokenizer_fingerprint
from fusionlab.data.writing import WRITTEN_TASKS
from fusionlab.errors import InputError
from fusionlab.evaluation.scores import evaluate
from fusionlab.modules.t5 import T5Module

GLUE = Path(__file__).parents[2] / "../shared/data/glue"
real = pytest.mark.skipif(not GLUE.exists(), reason="the real GLUE sets are not here")
WORDS = ("negative", "positive")
ROWS = [{"review": f"a good sentence {number} " + "x " * (number % 7), "label": number % 2} for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer(t5_folder: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(t5_folder("tied"))


def attached(data: TextTasks, tokenizer: Any) -> TextTasks:
    """The data with as much of a trainer as it needs."""
    module = SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer))
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    return data


def write(path: Path, rows: list[dict], features: datasets.Features | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=features)
    kind = path.suffix[1:]
    if kind == "parquet":
        table.to_parquet(path)
    elif kind in ("json", "jsonl"):
        table.to_json(path)
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",")
    return path


def load(tmp_path: Path, tokenizer: Any, task: dict | str, stage: str | None = None, **options) -> TextTasks:
    task = {"name": "own", "path": str(tmp_path / "set"), **task} if isinstance(task, dict) else task
    data = attached(TextTasks([task], cache_dir=str(tmp_path / "cache"), **options), tokenizer)
    data.setup(stage)
    return data


def reviews(tmp_path: Path, tokenizer: Any, stage: str | None = None, rows: list[dict] = ROWS, **options) -> TextTasks:
    write(tmp_path / "set/train.parquet", rows)
    write(tmp_path / "set/test.parquet", rows[:13])
    task = {"input_columns": ["review"], "label_words": list(WORDS), **options.pop("task", {})}
    return load(tmp_path, tokenizer, task, stage, **options)


# GLUE as in the paper


FORMATS = {
    "cola": ("cola sentence: {sentence}", ("unacceptable", "acceptable")),
    "mnli": ("mnli hypothesis: {hypothesis} premise: {premise}", ("entailment", "neutral", "contradiction")),
    "mrpc": ("mrpc sentence1: {sentence1} sentence2: {sentence2}", ("not_equivalent", "equivalent")),
    "qqp": ("qqp question1: {question1} question2: {question2}", ("not_duplicate", "duplicate")),
    "rte": ("rte sentence1: {sentence1} sentence2: {sentence2}", ("entailment", "not_entailment")),
    "sst2": ("sst2 sentence: {sentence}", ("negative", "positive")),
    "stsb": ("stsb sentence1: {sentence1} sentence2: {sentence2}", None),
}


@real
@pytest.mark.parametrize("name", FORMATS)
def test_glue_reads_and_answers_as_in_the_paper(tmp_path: Path, tokenizer: Any, name: str) -> None:
    template, words = FORMATS[name]
    data = load(tmp_path, tokenizer, {"name": name, "path": str(GLUE / name)}, "test", max_samples=50)
    rows = datasets.Dataset.from_parquet(str(GLUE / name / "validation.parquet"), cache_dir=str(tmp_path / "raw"))
    expected = {template.format(**row): f"{row['label']:.1f}" if words is None else words[row["label"]] for row in rows}
    texts = data.splits[name]["test"].texts
    assert len(texts) == 50
    assert all(expected[text] == answer for text, answer in zip(texts.inputs, texts.answers, strict=True))
    assert data.tasks[name].label_words == words
    assert data.tasks[name].metric == ("accuracy" if words else "spearman")


@real
def test_glue_is_tested_on_its_validation_set_and_validated_on_a_tenth_of_training(
    tmp_path: Path, tokenizer: Any
) -> None:
    data = load(tmp_path, tokenizer, {"name": "rte", "path": str(GLUE / "rte")})
    rows = datasets.Dataset.from_parquet(str(GLUE / "rte/train.parquet"), cache_dir=str(tmp_path / "raw"))
    digests = [hashlib.sha256(f"{row['sentence1']}\0{row['sentence2']}".encode()).hexdigest() for row in rows]
    kept = [index for index, digest in enumerate(digests) if int(digest[:8], 16) % 10 == 0]
    splits = {split: samples.texts for split, samples in data.splits["rte"].items()}
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [len(rows) - len(kept), len(kept), 277]
    expected = [FORMATS["rte"][0].format(**rows[index]) for index in kept]
    assert list(splits["validation"].inputs) == expected


def test_all_seven_are_known_and_can_be_put_as_questions() -> None:
    assert set(TEXT_TASKS) == set(NATURAL_PROMPTS) == set(FORMATS)
    for name, task in TEXT_TASKS.items():
        assert (task.template, task.label_words) == FORMATS[name]
        assert (task.path, task.config) == ("nyu-mll/glue", name)
        assert len(NATURAL_PROMPTS[name].label_words or ()) == len(task.label_words or ())


def test_natural_prompts_answer_by_class_name(tmp_path: Path, tokenizer: Any) -> None:
    classes = datasets.ClassLabel(names=["not_entailment", "entailment"])  # not the hub's order
    features = {name: datasets.Value("string") for name in ("sentence1", "sentence2")} | {"label": classes}
    rows = [{"sentence1": "A", "sentence2": "B", "label": 0}, {"sentence1": "C", "sentence2": "D", "label": 1}]
    write(tmp_path / "set/validation.parquet", rows, datasets.Features(features))
    texts = load(tmp_path, tokenizer, {"name": "rte"}, "test", prompts="natural").splits["rte"]["test"].texts
    assert list(texts.answers) == ["no", "yes"]
    assert texts.inputs[0] == 'Given that "A" Does it follow that "B"? Answer yes or no.'
    texts = load(tmp_path, tokenizer, {"name": "rte"}, "test").splits["rte"]["test"].texts
    assert list(texts.answers) == ["not_entailment", "entailment"]


# tasks of one's own


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_files_of_every_kind(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path = write(tmp_path / f"reviews.{suffix}", ROWS)
    task = {"path": str(path), "template": "review {label}: {review}", "label_words": list(WORDS)}
    data = load(tmp_path, tokenizer, task)
    texts = [text for samples in data.splits["own"].values() for text in samples.texts.inputs]
    assert sorted(texts) == sorted(f"review {row['label']}: {row['review']}" for row in ROWS)


def test_columns_without_a_template_are_named(tmp_path: Path, tokenizer: Any) -> None:
    data = reviews(tmp_path, tokenizer, "test")
    assert data.splits["own"]["test"].texts.inputs[0] == f"own review: {ROWS[0]['review']}"
    assert data.tasks["own"].label_words == WORDS


def test_a_missing_split_is_a_tenth_of_training_by_a_hash_of_the_input_columns(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"a": f"a {number}", "b": f"b {number}", "label": number % 2} for number in range(100)]
    path = write(tmp_path / "all.csv", rows)
    task = {"path": str(path), "input_columns": ["a", "b"], "template": "{b} {a}", "label_words": list(WORDS)}
    data = load(tmp_path, tokenizer, task)
    remainders = [int(hashlib.sha256(f"{row['a']}\0{row['b']}".encode()).hexdigest()[:8], 16) % 10 for row in rows]
    for split, wanted in {"validation": {0}, "test": {1}, "train": set(range(2, 10))}.items():
        kept = [f"{row['b']} {row['a']}" for row, number in zip(rows, remainders, strict=True) if number in wanted]
        assert list(data.splits["own"][split].texts.inputs) == kept


def test_labels_by_name_take_the_order_of_the_label_words(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a", "label": "positive"}, {"text": "b", "label": "negative"}]
    write(tmp_path / "set/test.csv", rows)
    task = {"input_columns": ["text"], "label_words": ["positive", "negative"]}
    samples = load(tmp_path, tokenizer, task, "test").splits["own"]["test"]
    assert (samples.targets.tolist(), list(samples.texts.answers)) == ([0, 1], ["positive", "negative"])


def test_class_names_with_words_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set/test.csv", [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}])
    task = {"input_columns": ["text"], "class_names": ["neg", "pos"], "label_words": ["bad", "good"]}
    samples = load(tmp_path, tokenizer, task, "test").splits["own"]["test"]
    assert (samples.targets.tolist(), list(samples.texts.answers)) == ([1, 0], ["good", "bad"])


def test_class_names_are_the_label_words_where_none_are_given(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set/test.csv", [{"text": "a", "label": "is_good"}, {"text": "b", "label": "is_bad"}])
    data = load(tmp_path, tokenizer, {"input_columns": ["text"]}, "test")
    assert data.tasks["own"].label_words == ("is_bad", "is_good")


def test_scores_are_answered_with_one_decimal(tmp_path: Path, tokenizer: Any) -> None:
    scores = [0.0, 2.5, 3.84999, 5.0]
    write(tmp_path / "set/test.parquet", [{"a": "x", "score": score} for score in scores])
    data = load(tmp_path, tokenizer, {"input_columns": ["a"], "target_column": "score"}, "test")
    samples = data.splits["own"]["test"]
    assert list(samples.texts.answers) == ["0.0", "2.5", "3.8", "5.0"]
    assert samples.batch(torch.arange(4))["target"].tolist() == torch.tensor(scores, dtype=torch.float32).tolist()
    assert (data.tasks["own"].label_words, data.tasks["own"].metric) == (None, "spearman")


# tokens and batches


def test_a_batch_is_the_tokenizer_s_own_padded(tmp_path: Path, tokenizer: Any) -> None:
    samples = reviews(tmp_path, tokenizer, "fit").splits["own"]["train"]
    indices = torch.tensor([7, 0, 7, 3])
    batch = samples.batch(indices)
    texts = [samples.texts.inputs[index] for index in indices]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].equal(expected["input_ids"])
    assert batch["attention_mask"].equal(expected["attention_mask"])
    answers = tokenizer([samples.texts.answers[index] for index in indices], padding=True, return_tensors="pt")
    labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
    assert batch["labels"].equal(labels)
    assert batch["target"].tolist() == [WORDS.index(samples.texts.answers[index]) for index in indices]
    assert batch["index"].equal(indices)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_shorter_answers_are_padded_with_what_the_loss_ignores(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "set/test.csv", [{"t": "a", "label": "no"}, {"t": "b", "label": "certainly"}])
    data = load(tmp_path, tokenizer, {"input_columns": ["t"]}, "test")
    labels = data.splits["own"]["test"].batch(torch.arange(2))["labels"]
    short, long = (len(tokenizer(word)["input_ids"]) for word in ("no", "certainly"))
    assert (labels == -100).sum(dim=1).tolist() == [long - short, 0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_goes_from_short_to_long_in_batches_of_one_size(
    tmp_path: Path, tokenizer: Any, world_size: int
) -> None:
    data = reviews(tmp_path, tokenizer, "test", eval_batch_size=4)
    ranks = [list(data.eval_batches("own", "test", rank=rank, world_size=world_size)) for rank in range(world_size)]
    batches = [batch for turn in range(4) for rank in ranks for batch in rank[turn : turn + 1]]
    assert len(batches) == data.num_eval_batches("own", "test") == 4
    assert all(len(batch["input_ids"]) == 4 for batch in batches)
    lengths = torch.cat([batch["attention_mask"].sum(dim=1)[batch["mask"]] for batch in batches])
    assert lengths.tolist() == sorted(lengths.tolist())
    assert sorted(torch.cat([batch["index"][batch["mask"]] for batch in batches]).tolist()) == list(range(13))
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(dim=1).max() for batch in batches)


def test_a_second_run_tokenizes_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reviews(tmp_path, tokenizer)
    monkeypatch.setattr("fusionlab.data.tokens.tokenize", pytest.fail)
    second = reviews(tmp_path, tokenizer)
    for split, samples in first.splits["own"].items():
        batch, again = (data.splits["own"][split].batch(torch.arange(len(samples))) for data in (first, second))
        assert all(batch[name].equal(again[name]) for name in batch)


def test_other_texts_or_another_tokenizer_are_tokenized_anew(tmp_path: Path, tokenizer: Any) -> None:
    before = reviews(tmp_path, tokenizer, "test").splits["own"]["test"]
    changed = [{**row, "review": f"{row['review']} ."} for row in ROWS]
    after = reviews(tmp_path, tokenizer, "test", rows=changed).splits["own"]["test"]
    assert before.data_version != after.data_version
    assert (after.inputs.lengths > before.inputs.lengths).all()
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.add_tokens(["good sentence"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    short = reviews(tmp_path, other, "test", rows=changed).splits["own"]["test"]
    assert short.data_version == after.data_version
    assert (short.inputs.lengths < after.inputs.lengths).all()


def test_long_texts_are_cut_counted_and_reported(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = reviews(tmp_path, tokenizer, "test").splits["own"]["test"]
    limit = int(whole.inputs.lengths.max()) - 2
    expected = int((whole.inputs.lengths > limit).sum())
    assert 0 < expected < 13
    assert not caplog.records
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        samples = reviews(tmp_path, tokenizer, "test", max_tokens=limit).splits["own"]["test"]
        assert samples.num_truncated == expected
        assert f"{expected} of 13 texts of task 'own' (test) are longer than {limit} tokens and were cut" in caplog.text
    longest = int(whole.inputs.lengths.argmax())
    kept, full = (split.batch(torch.tensor([longest]))["input_ids"][0].tolist() for split in (samples, whole))
    assert kept == full[: limit - 1] + full[-1:]


def test_the_data_version_is_that_of_texts_and_answers(tmp_path: Path, tokenizer: Any) -> None:
    samples = reviews(tmp_path, tokenizer, "test").splits["own"]["test"]
    pairs = zip(samples.texts.inputs, samples.texts.answers, strict=True)
    digest = hashlib.sha256("".join(f"{text}\0{answer}\0" for text, answer in pairs).encode())
    assert samples.data_version == digest.hexdigest()[:16]


def test_max_samples_is_a_fixed_choice(tmp_path: Path, tokenizer: Any) -> None:
    first, second = (reviews(tmp_path, tokenizer, "fit", max_samples=6, seed=seed) for seed in (0, 1))
    texts = first.splits["own"]["train"].texts
    assert len(texts) == 6
    assert list(texts.inputs) == list(second.splits["own"]["train"].texts.inputs)


# together with a module, and predict


def test_a_t5_trains_and_is_scored_on_them(tmp_path: Path, t5_folder: Callable[[str], Path]) -> None:
    write(tmp_path / "set/train.parquet", ROWS)
    scores = [{"review": row["review"], "score": 2.5 * row["label"]} for row in ROWS]
    write(tmp_path / "scored/train.parquet", scores)
    tasks = [
        {"name": "own", "path": str(tmp_path / "set"), "input_columns": ["review"], "label_words": list(WORDS)},
        {
            "name": "scored",
            "path": str(tmp_path / "scored"),
            "input_columns": ["review"],
            "target_column": "score",
        },
    ]
    data = TextTasks(tasks, batch_size=4, eval_batch_size=8, cache_dir=str(tmp_path / "cache"))
    module = T5Module(str(t5_folder("tied")), rank=2, max_new_tokens=4)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=2,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    rows = evaluate(module, data, split="validation")
    assert [(row["task"], row["metric"]) for row in rows[:2]] == [("own", "accuracy"), ("scored", "spearman")]
    assert rows[0]["num_samples"] == len(data.splits["own"]["validation"])


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_predict_reads_one_text_a_line(
    tmp_path: Path, tokenizer: Any, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["the good", "a bad sentence is not positive", "x"]
    (tmp_path / "texts.txt").write_text("\n\n".join(lines) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    texts = str(tmp_path / "texts.txt") if source == "file" else "-"
    data = attached(TextTasks(["cola"], eval_batch_size=2, texts=texts), tokenizer)
    batches = list(data.predict_dataloader())
    assert [batch["text"] for batch in batches] == [lines[:2], lines[2:]]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    expected = tokenizer(lines[:2], padding=True, return_tensors="pt")
    assert batches[0]["input_ids"].equal(expected["input_ids"])
    assert batches[0]["attention_mask"].equal(expected["attention_mask"])


def test_predict_needs_texts(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"predict needs --data\.texts"):
        attached(TextTasks(["cola"]), tokenizer).predict_dataloader()
    with pytest.raises(InputError, match=r"data\.texts: no file '.*nowhere\.txt'"):
        TextTasks(["cola"], texts=str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"data\.texts: no text in '.*empty\.txt'"):
        attached(TextTasks(["cola"], texts=str(tmp_path / "empty.txt")), tokenizer).predict_dataloader()


def test_the_embedded_tasks_are_the_default(tmp_path: Path, tokenizer: Any) -> None:
    data = attached(TextTasks(cache_dir=str(tmp_path)), tokenizer)
    data.setup("test")
    assert list(data.tasks) == list(WRITTEN_TASKS)
    assert data.tasks["inference"].label_words == ("entailment", "neutral", "contradiction")
    similarity = data.splits["similarity"]["test"]
    assert len(similarity) == 400
    batch = similarity.batch(torch.tensor([0, 1]))
    rows, scores = WRITTEN_TASKS["similarity"].rows("test")
    assert batch["target"].tolist() == pytest.approx(scores[:2])
    read = tokenizer(WRITTEN_TASKS["similarity"].template.format(**rows[0]))["input_ids"]
    assert batch["input_ids"][0, : len(read)].tolist() == read


def test_an_embedded_task_takes_no_other_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metric does nothing in task 'own', which is embedded"):
        TextTasks([{"name": "own", "path": "embedded:sentiment", "metric": "spearman"}])
    with pytest.raises(InputError, match="no embedded task 'sentimnt'; did you mean 'sentiment'"):
        TextTasks([{"name": "own", "path": "embedded:sentimnt"}])
