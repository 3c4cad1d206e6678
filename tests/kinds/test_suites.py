"""Suites of tasks: what FusionBench's are, from sets of their layouts on a stand-in for the hub, or told missing."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hub_client import go_offline
from hub_server import Hub
from PIL import Image

import fusionlab
from fusionlab.__main__ import main
from fusionlab.data import ImageTasks, TextTasks
from fusionlab.data.suites import IMAGE_SUITES, TEXT_SUITES
from fusionlab.errors import InputError
from fusionlab.modules import T5Module

TA8 = ["sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]


def parquet(columns: dict[str, list[Any]], features: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(file)
    return file.getvalue()


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number * 7 % 256, number * 13 % 256, 90))


def images(
    hub: Hub,
    name: str,
    splits: dict[str, int],
    labels: Any,
    *,
    image: str = "image",
    label: str = "label",
    config: str = "",
    num_classes: int = 2,
    **more: Any,
) -> None:
    """A set of pictures on the hub, with its card where it has a configuration."""
    features = {image: datasets.Image(), label: labels, **{key: datasets.Value("int64") for key in more}}
    files = {}
    for start, (split, count) in enumerate(splits.items()):
        values = [number % num_classes for number in range(count)]
        values = [bool(value) for value in values] if labels == datasets.Value("bool") else values
        columns = {image: [picture(100 * start + n) for n in range(count)], label: values}
        files[f"{config or 'data'}/{split}-00000-of-00001.parquet"] = parquet(
            columns | {key: [0] * count for key in more}, features
        )
    if config:
        paths = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
        files["README.md"] = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{paths}---\n".encode()
    hub.add(name, files, "datasets")


def names_of(*names: str) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=list(names))


@pytest.fixture
def tall20(hub: Hub) -> Hub:
    """Sets of nine layouts, of 40 training pictures."""
    both = {"train": 40, "test": 6}
    images(hub, "tanganke/resisc45", both, names_of("baseball_diamond", "sea_ice"))
    images(hub, "ufldl-stanford/svhn", {**both, "extra": 3}, names_of(*map(str, range(10))), config="cropped_digits")
    images(hub, "uoft-cs/cifar100", both, names_of("cra", "apple"), image="img", label="fine_label", coarse_label=True)
    images(
        hub, "timm/oxford-iiit-pet", both, names_of("abyssinian", "american_bulldog"), image_id=True, label_cat_dog=True
    )
    images(hub, "clip-benchmark/wds_fer2013", both, datasets.Value("int64"), image="jpg", label="cls", num_classes=7)
    images(hub, "ethz/food101", {"train": 40, "validation": 7}, names_of("apple_pie", "baby_back_ribs"))
    images(hub, "1aurent/PatchCamelyon", {"train": 40, "valid": 5, "test": 6}, datasets.Value("bool"))
    images(hub, "zalando-datasets/fashion_mnist", both, names_of("T - shirt / top", "Trouser"))
    images(hub, "tanganke/kmnist", both, names_of(*map(str, range(10))), num_classes=10)
    return hub


SETS: dict[str, tuple[tuple[str, str], int]] = {
    "resisc45": (("baseball diamond", "sea ice"), 6),
    "svhn": (("0", "1"), 6),
    "cifar100": (("crab", "apple"), 6),
    "oxford_iiit_pet": (("abyssinian", "american_bulldog"), 6),
    "fer2013": (("angry", "disgusted"), 6),
    "food101": (("apple pie", "baby back ribs"), 7),
    "pcam": (("lymph node", "lymph node containing metastatic tumor tissue"), 6),
    "fashion_mnist": (("T - shirt / top", "Trouser"), 6),
    "kmnist": (("お", "き"), 6),
}


def test_sets_are_read_as_they_lie_on_the_hub(tall20: Hub, tmp_path: Path) -> None:
    data = ImageTasks(list(SETS), image_size=8, suite="tall20", cache_dir=str(tmp_path / "cache"))
    data.setup()
    assert data.task_names == list(SETS)
    for name, (classes, num_tested) in SETS.items():
        splits = data.splits[name]
        assert data.tasks[name].class_names[:2] == classes, name
        assert len(splits["test"]) == num_tested, name
        own = 5 if name == "pcam" else len(splits["validation"])  # where there is none, a tenth of training
        assert len(splits["validation"]) == own > 0, name
        assert len(splits["train"]) == (40 if name == "pcam" else 40 - own), name
    assert data.tasks["food101"].templates == ("a photo of {}, a type of food.",)


def test_what_the_suites_are() -> None:
    assert {name: len(of) for name, of in (IMAGE_SUITES | TEXT_SUITES).items()} == {
        "ta8": 8,
        "tall14": 14,
        "tall20": 20,
        "glue8": 8,
    }
    assert list(IMAGE_SUITES["ta8"]) == TA8
    assert list(IMAGE_SUITES["tall20"])[:14] == list(IMAGE_SUITES["tall14"])
    for of in (IMAGE_SUITES | TEXT_SUITES).values():
        assert len({(task.path, task.config) for task in of.values()}) == len(of)
    assert ImageTasks(suite="tall14").task_names == list(IMAGE_SUITES["tall14"])
    assert len(IMAGE_SUITES["tall14"]["oxford_flowers102"].class_names or ()) == 102
    assert len(IMAGE_SUITES["tall14"]["oxford_iiit_pet"].class_aliases or ()) == 37
    assert {name: task.label_words for name, task in TEXT_SUITES["glue8"].items()} == {
        "cola": ("unacceptable", "acceptable"),
        "mnli": ("entailment", "neutral", "contradiction"),
        **dict.fromkeys(("mrpc", "qqp"), ("no", "yes")),
        **dict.fromkeys(("qnli", "rte"), ("yes", "no")),
        "sst2": ("negative", "positive"),
        "stsb": None,
    }


def test_what_cannot_be_had_is_told_all_at_once(tall20: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    for number in range(30):
        (tmp_path / "mine" / "train" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "mine" / "train" / f"class {number % 2}" / f"{number}.png")
    go_offline(monkeypatch)
    tasks: list[Any] = [{"name": "mnist", "path": str(tmp_path / "mine")}, "sun397", "gtsrb"]
    data = ImageTasks(tasks, image_size=8, suite="ta8", cache_dir=str(tmp_path / "cache"))
    sets = "sun397 (tanganke/sun397), gtsrb (tanganke/gtsrb)"
    told = f"data.suite ta8: 2 of its sets are neither here nor to be had: {sets}."
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        data.setup("fit")
    assert "Give folders in their place, as data.tasks [{name: sun397, path: FOLDER}, ...]" in str(caught.value)
    assert data.tasks["mnist"].class_names == ("class 0", "class 1")
    with pytest.raises(InputError, match=r"data\.tasks: digits, cifar10 are not of the suite ta8"):
        ImageTasks(["mnist", "digits", "cifar10"], suite="ta8")
    with pytest.raises(InputError, match=r"data\.suite: no such suite 'ta9'; did you mean 'ta8'"):
        ImageTasks(suite="ta9")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data\.prompts: the suite glue8 has prompts of its own"):
        TextTasks(suite="glue8", prompts="natural")


def glue(hub: Hub) -> None:
    """Three of its configurations in one repository."""
    files, configs = {}, ""
    kinds = {
        "cola": ({"sentence": "good"}, names_of("unacceptable", "acceptable"), "validation"),
        "qnli": ({"question": "a", "sentence": "b"}, names_of("entailment", "not_entailment"), "validation"),
        "stsb": ({"sentence1": "a", "sentence2": "b"}, datasets.Value("float32"), "validation"),
    }
    for name, (cells, labels, test) in kinds.items():
        features = {**{key: datasets.Value("string") for key in cells}, "label": labels}
        configs += f"- config_name: {name}\n  data_files:\n"
        for split, count in (("train", 30), (test, 4)):
            columns = {key: [f"{value} {n}" for n in range(count)] for key, value in cells.items()}
            files[f"{name}/{split}-00000-of-00001.parquet"] = parquet(
                columns | {"label": [n % 2 for n in range(count)]}, features
            )
            configs += f"  - split: {split}\n    path: {name}/{split}-*\n"
    files["README.md"] = f"---\nconfigs:\n{configs}---\n".encode()
    hub.add("nyu-mll/glue", files, "datasets")


def test_texts_are_put_as_flan_t5_is_asked_and_answers_compared(hub: Hub, t5_folder: Any, tmp_path: Path) -> None:
    glue(hub)
    module = T5Module(str(t5_folder("untied")), max_new_tokens=20)
    data = TextTasks(["cola", "qnli", "stsb"], suite="glue8", cache_dir=str(tmp_path / "cache"))
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    data.setup()
    module.prepare_tasks(data.tasks)
    assert module.metric_names == {"cola": "exact_match", "qnli": "exact_match", "stsb": "spearman"}
    inputs = data.splits["qnli"]["test"].texts.inputs[0]  # type: ignore[attr-defined]
    assert inputs == (
        "Given the context: 'b 0', does the question 'a 0' have an answer based on the information provided? "
        "Answer with 'yes' or 'no'."
    )
    rows = {row["task"]: row for row in fusionlab.evaluate(module, data, split="test")}
    assert {name: row["metric"] for name, row in rows.items()} | {"stsb": "spearman"} == module.metric_names
    assert rows["cola"]["num_samples"] == 4


def test_a_command_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    argv = ["fit", "--data.suite", "ta8", "--data.tasks", "[dtd, svhn]", "--trainer.max_steps", "1"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert (
        "data.suite ta8: 2 of its sets are neither here nor to be had: dtd (tanganke/dtd), svhn"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
