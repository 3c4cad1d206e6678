"""A split is a folder or a table that is called one; every other name is a class or a mistake, and no row vanishes."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import datasets
import pytest
from task_files import WORDS, images, png, sizes, texts, tree

from fusionlab.data.rendering import TextSource
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError

SPLITS = {
    "capitals": ({"Train/a": 9, "Train/b": 9, "Test/a": 3, "Test/b": 3, "VAL/a": 2, "VAL/b": 2}, (18, 4, 6)),
    "other words": ({"training/a": 8, "training/b": 8, "dev/a": 2, "dev/b": 1, "testing/a": 2, "testing/b": 2},
                    (16, 3, 4)),
    "a class called train": ({"train/train": 8, "train/bus": 8, "test/train": 3, "test/bus": 2, "val/bus": 2,
                              "val/train": 1}, (16, 3, 5)),
    "classes that hold the words": ({"train/test-tube": 6, "train/train set": 6, "val/test-tube": 1, "val/train set": 1,
                                     "test/test-tube": 2, "test/train set": 2}, (12, 2, 4)),
    "below a folder": ({"data/train/a": 8, "data/train/b": 8, "data/valid/a": 2, "data/valid/b": 2, "data/test/a": 3,
                        "data/test/b": 3}, (16, 4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_folders_called_for_splits(tmp_path: Path, case: str) -> None:
    files, expected = SPLITS[case]
    data = images(tree(tmp_path / "set", **files))
    assert tuple(sizes(data)[split] for split in ("train", "validation", "test")) == expected
    classes = {folder.rpartition("/")[2] for folder in files}
    assert set(data.tasks["own"].class_names) == classes


NO_SPLITS = {
    "files that hold the words": (
        {"cat": ["crash-test-07.png", "train_1.png", "val.png"], "dog": ["test.png", "b.png"]}
    ),
    "a class called train": {"train": ["1.png", "2.png"], "bus": ["1.png"], "car": ["3.png"]},
    "a class called test": {"test": ["1.png", "2.png"], "control": ["1.png"]},
    "classes that hold the words": {"crash test": ["1.png"], "train-station": ["2.png"], "dev_board": ["3.png"]},
    "capitals and endings": {"A": ["1.PNG", "2.Png"], "B": ["3.png"]},
    "no ending": {"a": ["0001", "0002"], "b": ["x.image"]},
    "underscores": {"__background__": ["1.png"], "_b": ["2.png", "3.png"]},
}


@pytest.mark.parametrize("case", NO_SPLITS)
def test_every_image_of_a_folder_of_classes_is_used(tmp_path: Path, case: str) -> None:
    for folder, names in NO_SPLITS[case].items():
        (tmp_path / "set" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "set" / folder / name).write_bytes(png(zlib.crc32(f"{folder}/{name}".encode())))
    slices = {"train": "train[:1]", "test": "train[1:]"}
    data = images(tmp_path / "set", "test", **slices)
    source = data.splits["own"]["test"]
    assert len(source) + 1 == sum(map(len, NO_SPLITS[case].values()))
    assert len(data.tasks["own"].class_names) == len(NO_SPLITS[case])


def test_linked_folders_are_classes(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", dogs=4)
    tree(tmp_path / "set", cats=3)
    (tmp_path / "set/dogs").symlink_to(tmp_path / "elsewhere/dogs")
    data = images(tmp_path / "set", "test", train="train[:1]", test="train[1:]")
    assert (len(data.splits["own"]["test"]), data.tasks["own"].class_names) == (6, ("cats", "dogs"))


LOST = {
    "splits without classes": (
        {"train": 3, "test": 2},
        r"3 of 3 images in '.*train' lie in no folder",
    ),
    "one split without classes": (
        {"train/a": 3, "train/b": 3, "test": 2},
        r"2 of 2 images in '.*test' lie in no",
    ),
    "images beside classes": (
        {"a": 3, "b": 3, ".": 2},
        r"2 of 8 images in '.*set' lie in .*: 0\.png",
    ),
    "classes beside splits": (
        {"train/a": 2, "train/b": 2, "extra/a": 3},
        r"beside .* extra \(3 images\); move",
    ),
    "flat beside splits": (
        {"train/a": 2, "train/b": 2, "bus": 3},
        r"called for splits .* bus \(3 im",
    ),
    "deeper than a class": ({"a/young": 2, "a/old": 2, "b/young": 1}, r"5 of 5 images .*: a/old/0\.png"),
    "one split twice": (
        {"train/a": 2, "Training/a": 2, "test/a": 1},
        r"Training, train are all called train",
    ),
    "no images": ({"train": 0}, r"could not be read"),
}


@pytest.mark.parametrize("case", LOST)
def test_images_that_would_be_lost_are_counted_and_named(tmp_path: Path, case: str) -> None:
    files, message = LOST[case]
    with pytest.raises(InputError, match=message):
        images(tree(tmp_path / "set", **files))


def test_what_is_no_image_in_a_folder_of_classes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path / "set", **{"train/a": 9, "train/b": 9, "test/a": 1, "test/b": 1})
    (tmp_path / "set/test/a/notes.txt").write_text("x")
    (tmp_path / "set/test/a/.hidden").write_text("x")
    with caplog.at_level(logging.WARNING):
        images(tmp_path / "set", "test")
    assert "1 files in the folders of classes are no images: " in caplog.text
    assert "a/notes.txt" in caplog.text


def test_folders_of_other_names_serve_where_the_task_names_them(tmp_path: Path) -> None:
    tree(tmp_path / "set", **{"seen/a": 20, "seen/b": 20, "unseen/a": 2, "unseen/b": 2, "extra/a": 3})
    data = images(tmp_path / "set", train="seen", test="unseen")
    assert (sizes(data)["test"], sizes(data)["train"] + sizes(data)["validation"]) == (4, 40)


def write_tables(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"t{number}.{row},{row % 2}\n" for row in range(number + 2))
        (folder / name).write_text("text,label\n" + rows)
    return folder


TABLES = {
    "capitals": (("Train.csv", "TEST.csv"), {"train": 2, "test": 3}),
    "shards": (
        ("train-00000-of-00002.csv", "train-00001-of-00002.csv", "test-00000-of-00001.csv"),
        {"train": 5, "test": 4},
    ),
    "numbers": (("train1.csv", "train_2.csv", "val.csv", "test.csv"), None),
    "in a folder": (("data/train-0.csv", "data/test-0.csv"), {"train": 2, "test": 3}),
    "folders of splits": (("train/a.csv", "train/b.csv", "test/a.csv"), {"train": 5, "test": 4}),
    "one prefix": (("imdb_train.csv", "imdb_test.csv"), {"train": 2, "test": 3}),
    "words inside words": (("contest.csv", "trained.csv"), {"train": 5}),
    "other names": (("a.csv", "b.csv", "more/c.csv"), {"train": 9}),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables_called_for_splits(tmp_path: Path, case: str) -> None:
    names, expected = TABLES[case]
    source = TextSource(
        Task("own", path=str(write_tables(tmp_path / "set", *names)), **WORDS), None, tmp_path / "cache"
    )
    found = {split: len(rows) for split, rows in source.source.tables.items()}
    assert found == (expected or {"train": 5, "validation": 4, "test": 5})


LOST_TABLES = {
    "a name that contains one": (
        ("crash-test-07.csv", "roads.csv"),
        r"crash-test-07\.csv: a name that contains",
    ),
    "alone": (("crash-test.csv",), r"may mean it or not; say so: train: crash-test\.csv, or test: crash-test\.csv"),
    "beside split tables": (("train.csv", "test.csv", "more.csv"), r"tables beside those called for splits: more\.csv"),
    "some of them": (("data/train-0.csv", "data/notes.csv"), r"1 tables are called neither .*: data/notes\.csv"),
    "two of a split": (("train.csv", "training.csv"), r"train\.csv, training\.csv are all called train; leave one"),
    "two kinds": (("train.csv", "train.tsv"), r"train\.csv, train\.tsv are all called train; leave one"),
    "several kinds": (("a.csv", "b.tsv"), r"tables of several kinds \(\.csv, \.tsv\)"),
}


@pytest.mark.parametrize("case", LOST_TABLES)
def test_tables_that_would_be_lost_are_named(tmp_path: Path, case: str) -> None:
    names, message = LOST_TABLES[case]
    with pytest.raises(InputError, match=message):
        texts(write_tables(tmp_path / "set", *names))


def test_shards_of_other_columns_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path / "set", "train-0.csv")
    (tmp_path / "set/train-1.csv").write_text("txt,label\na,0\n")
    with pytest.raises(InputError, match=r"train-1\.csv has other columns than train-0\.csv: only one has text, txt"):
        texts(tmp_path / "set", "train")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_names_every_image(tmp_path: Path, suffix: str) -> None:
    tree(tmp_path / "set", **{"train": 30, "test": 4})
    for split, count in (("train", 30), ("test", 4)):
        rows = [{"file_name": f"{row}.png", "label": ("cat", "dog")[row % 2]} for row in range(count)]
        found = datasets.Dataset.from_list(rows)
        {"csv": found.to_csv, "jsonl": found.to_json, "parquet": found.to_parquet}[suffix](
            tmp_path / f"set/{split}/metadata.{suffix}"
        )
    data = images(tmp_path / "set")
    assert (sizes(data)["test"], data.splits["own"]["test"].labels.tolist()) == (4, [0, 1, 0, 1])
    (tmp_path / "set/test/extra.png").write_bytes(png(777))
    with pytest.raises(InputError, match=r"1 images are not in .*metadata.*: .*extra\.png; add or remove them"):
        images(tmp_path / "set")


def test_splits_that_a_data_card_declares(tmp_path: Path) -> None:
    write_tables(tmp_path / "set", "crash-test.csv", "roads.csv")
    configs = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: roads.csv}\n"
    (tmp_path / "set/README.md").write_text(f"---\n{configs}  - {{split: test, path: crash-test.csv}}\n---\n")
    assert len(texts(tmp_path / "set")) == 2


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "set"))
    assert texts(tmp_path / "set").targets.tolist() == [0, 1]


def test_a_broken_data_card_is_named(tmp_path: Path) -> None:
    write_tables(tmp_path / "set", "test.csv")
    (tmp_path / "set/README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(InputError, match=r"README\.md' is not YAML"):
        texts(tmp_path / "set")


@pytest.mark.parametrize("card", ["# A set\n", "---\nlicense: mit\n---\n", "---\n\nA rule, and text.\n", "--- no card"])
def test_a_card_that_declares_nothing_changes_nothing(tmp_path: Path, card: str) -> None:
    write_tables(tmp_path / "set", "train.csv", "test.csv")
    (tmp_path / "set/README.md").write_text(card)
    assert len(texts(tmp_path / "set")) == 3


def test_a_link_to_nowhere_is_an_image_that_does_not_decode(tmp_path: Path) -> None:
    tree(tmp_path / "set", **{"train/a": 1, "train/b": 1, "test/a": 2, "test/b": 2})
    (tmp_path / "set/test/a/dead.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"1 of 5 images of task 'own' \(test\) do not decode: .*dead\.png"):
        images(tmp_path / "set", "test")


@pytest.mark.parametrize(
    "names",
    [("labels.csv", "0.png", "1.png", "2.png"), ("labels.csv", "images/0.png", "images/1.png", "images/2.png")],
)
def test_a_table_beside_images_of_no_classes_says_what_they_are(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    for seed, name in enumerate(names[1:]):
        (tmp_path / "set" / name).write_bytes(png(seed))
    rows = "".join(f"{name},{'ab'[row % 2]}\n" for row, name in enumerate(names[1:]))
    (tmp_path / "set/labels.csv").write_text("image,label\n" + rows)
    data = images(tmp_path / "set", "test", train="train[:1]", test="train[1:]")
    assert data.splits["own"]["test"].labels.tolist() == [1, 0]


def test_a_banner_beside_tables_is_no_sample(tmp_path: Path) -> None:
    write_tables(tmp_path / "set", "a.csv", "b.csv")
    (tmp_path / "set/banner.png").write_bytes(png(0))
    assert len(texts(tmp_path / "set", "train", test="train[:1]", train="train[1:]")) + 1 == 5
