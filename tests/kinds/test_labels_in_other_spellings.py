"""A label is what it says, whichever way the file or the list spells it; and no row is trained on and scored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from task_files import images, png, table, texts, tree
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.modules.vit import nearest_mean_head

BOOL, TEXT, INTEGER = (datasets.Value(name) for name in ("bool", "string", "int64"))

SPELLINGS: dict[str, tuple[list[str], list[str]]] = {
    "truth of pandas": (["True", "False"], ["true", "false"]),
    "truth of Excel": (["TRUE", "FALSE"], ["True", "False"]),
    "signed": (["+1", "-1"], ["1", "-1"]),
    "padded with zeros": (["01", "00"], ["1", "0"]),
    "padded with blanks": ([" pos", "neg "], ["pos", "neg"]),
    "the other order": (["False", "True"], ["TRUE", "FALSE"]),
}


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_have_the_label_that_they_say(tmp_path: Path, case: str, suffix: str) -> None:
    values, words = SPELLINGS[case]
    file = tmp_path / f"set/test.{suffix}"
    file.parent.mkdir()
    rows = [{"text": f"row {number}", "label": value} for number, value in enumerate(values * 2)]
    lines = [json.dumps(row) for row in rows]
    if suffix == "csv":
        lines = ["text,label", *(f'{row["text"]},"{row["label"]}"' for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    found = texts(file, input_columns=["text"], label_words=words)
    said = [value.strip().casefold().lstrip("+0") for value in values * 2]
    assert [words[label].casefold().lstrip("+0") for label in found.targets.tolist()] == said


@pytest.mark.parametrize("words", [["True", "False"], ["false", "true"]])
def test_booleans_are_the_words_of_their_truth(tmp_path: Path, words: list[str]) -> None:
    folder = table(tmp_path / "set/test.parquet", {"text": ["a", "b", "c"], "label": [True, False, True]},
                   {"text": TEXT, "label": BOOL})  # fmt: skip
    found = texts(folder / "test.parquet", label_words=words)
    assert [words[label].casefold() for label in found.targets.tolist()] == ["true", "false", "true"]


def test_what_other_words_mean_by_true_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = table(tmp_path / "set/test.parquet", {"text": ["a", "b"], "label": [True, False]},
                   {"text": TEXT, "label": BOOL})  # fmt: skip
    with caplog.at_level(logging.WARNING):
        found = texts(folder / "test.parquet", label_words=["no", "yes"])
    assert found.targets.tolist() == [1, 0]
    assert "a label that is false is 'no', true is 'yes'" in caplog.text


def test_images_have_the_label_that_they_say(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", **{"train/true": 6, "train/false": 3, "val/true": 1, "test/true": 2, "test/false": 1})
    data = images(root, class_names=["False", "True"])
    labels = data.splits["own"]["test"].labels
    assert data.tasks["own"].class_names == ("False", "True")
    assert sorted(labels.tolist()) == [0, 1, 1]


def test_classes_that_a_list_renames_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path / "set", **{"train/cat": 6, "train/dog": 3, "val/cat": 1, "val/dog": 1})
    with caplog.at_level(logging.WARNING):
        images(root, class_names=["a dog", "a cat"])
    assert "rename the data's classes in their order: cat -> a dog, dog -> a cat" in caplog.text


def test_every_split_is_read_from_the_columns_of_training(tmp_path: Path) -> None:
    features = {"text": TEXT, "labels": INTEGER}
    table(tmp_path / "set/train.parquet", {"text": ["a", "b"], "labels": [0, 1]}, features)
    other = {"text": ["q", "r"], "labels": [1, 0], "label": [0, 1]}
    table(tmp_path / "set/test.parquet", other, {**features, "label": INTEGER})
    assert texts(tmp_path / "set").targets.tolist() == [1, 0]

    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    paths = {"path": [str(tmp_path / f"{number}.png") for number in (0, 1)], "label": ["x", "y"]}
    features = {"path": TEXT, "label": TEXT}
    table(tmp_path / "seen/train.parquet", paths, features)
    more = {**paths, "image": [str(tmp_path / "3.png")] * 2}
    table(tmp_path / "seen/test.parquet", more, {**features, "image": TEXT})
    samples = images(tmp_path / "seen", "test").splits["own"]["test"]
    assert not torch.equal(*samples.batch(torch.arange(2))["images"])


OVERLAPS = {
    "all and the end": {"train": "train", "test": "train[80%:]"},
    "two slices": {"train": "train[:90%]", "test": "train[50%:]"},
    "by number": {"train": "train[:15]", "validation": "train[14:]"},
    "from the end": {"train": "train[:-4]", "test": "train[-5:]"},
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_rows_that_are_trained_on_are_not_scored(tmp_path: Path, case: str) -> None:
    rows = [f"text {number},{number % 2}" for number in range(20)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    with pytest.raises(InputError, match=r"train 'train.*share \d+ of \d+ rows; give slices that are apart"):
        texts(tmp_path / "set", **OVERLAPS[case])
    apart = texts(tmp_path / "set", train="train[:-4]", validation="train[-4:-2]", test="train[-2:]")
    assert len(apart.targets) == 2


def test_one_file_is_not_training_and_test(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(InputError, match="share 2 of 2 rows"):
        texts(tmp_path / "set", train="all.csv", test="all.csv")


def test_a_class_without_images_takes_none_from_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(4, 6, generator=generator)
    labels = torch.arange(400) % 4
    features = centers[labels] + torch.randn(400, 6, generator=generator)

    def accuracy(head: tuple[Tensor, Tensor]) -> float:
        weight, bias = head
        return ((features @ weight.T + bias).argmax(1) == labels).float().mean().item()

    whole = nearest_mean_head(features, labels, 4)
    more: Any = nearest_mean_head(features, labels, 7)
    assert torch.equal(more[0][:4], whole[0])
    assert torch.equal(more[1][:4], whole[1])
    assert accuracy(more) == accuracy(whole) > 0.9
