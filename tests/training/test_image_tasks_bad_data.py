"""Data that bites: odd images are converted as stated, and every mistake in the data has its one message."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fusionlab.data.images import ImageTasks
from fusionlab.data.pixels import decode
from fusionlab.errors import InputError


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)))


def image_folder(folder: Path, **classes: int) -> Path:
    """``train`` with that many images of each class, ``test`` with two of each."""
    for number, (name, size) in enumerate(classes.items()):
        for split, count in (("train", size), ("test", 2)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                seed = 1000 * number + index + 500 * (split == "test")
                (folder / split / name / f"{index}.png").write_bytes(png(seed))
    return folder


def table(path: Path, labels: list, feature: object = None, column: str = "label", images: object = None) -> Path:
    """A parquet file of that many images."""
    rows = {"image": [{"bytes": png(index), "path": None} for index in range(len(labels))], column: labels}
    features = {"image": datasets.Image(), column: feature or datasets.Value("int64")}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path.parent


def load(path: Path, stage: str | None = "test", on_bad_image: str = "error", name: str = "own", **task) -> ImageTasks:
    cache = str(path.parent / "cache")
    data = ImageTasks([{"name": name, "path": str(path), **task}], 32, 128, 8, on_bad_image, cache_dir=cache)
    data.setup(stage)
    return data


NAMES = datasets.ClassLabel(names=["cat", "dog"])


# images


def test_grey_is_repeated() -> None:
    pixels = decode(encoded(Image.new("L", (8, 8), 77)), 8)
    assert pixels.shape == (3, 8, 8)
    assert (pixels == 77).all()


def test_a_palette_is_looked_up() -> None:
    image = Image.new("RGB", (8, 8), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode(encoded(image), 8)[:, 0, 0].tolist() == [200, 10, 30]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 0, 8, 8))
    pixels = decode(encoded(image.convert(mode)), 8)
    assert (pixels[:, :, :4] == 255).all()
    assert (pixels[:, :, 4:] == 0).all()


def test_half_transparent_black_is_grey() -> None:
    assert decode(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), 8)[:, 0, 0].tolist() == [127, 127, 127]


def test_cmyk_is_converted() -> None:
    pixels = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tiff"), 8)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    values = np.array([0, 257, 32768, 65535], np.uint16).repeat(16).reshape(8, 8)
    assert decode(encoded(Image.fromarray(values)), 8)[0, ::2, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_floats_are_scaled(scale: float) -> None:
    values = np.full((8, 8), 0.4 * scale, np.float32)
    values[0, 0] = scale
    assert decode(encoded(Image.fromarray(values), "tiff"), 8)[0, 4, 4] == 102


def test_one_bit_is_black_and_white() -> None:
    assert (decode(encoded(Image.new("1", (8, 8), 1)), 8) == 255).all()


def test_the_orientation_tag_is_obeyed() -> None:
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(encoded(image, "png", exif=exif), 8)
    assert (pixels[:, :, 4:] == 255).all()
    assert (pixels[:, :, :4] == 0).all()


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    image = Image.new("RGB", (48, 16), (9, 9, 9))
    image.paste((200, 0, 0), (16, 0, 32, 16))
    pixels = decode(encoded(image), 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels[0, 4, 4] == 200
    resized = image.resize((24, 8), Image.Resampling.BICUBIC).crop((8, 0, 16, 8))
    assert pixels.tolist() == np.asarray(resized).transpose(2, 0, 1).tolist()


# images that do not decode


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = image_folder(tmp_path / "set", cat=30, dog=30)
    (folder / "train/cat/3.png").write_bytes(b"no image")
    (folder / "train/dog/4.png").write_bytes(png(4)[:60])
    (folder / "train/dog/5.png").write_bytes(b"")
    return folder


def test_broken_images_are_named_with_their_count(broken: Path) -> None:
    message = r"3 of 60 images of task 'own' \(train\) do not decode: .*cat/3\.png.*dog/4\.png.*dog/5\.png.*: skip"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match=message):
            load(broken, "fit")


def test_broken_images_are_skipped(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(broken, None, on_bad_image="skip")
    assert len(data.splits["own"]["train"]) + len(data.splits["own"]["validation"]) == 57
    assert "3 of 60 images of task 'own' (train) do not decode" in caplog.text
    bad = [broken / "train" / name for name in ("cat/3.png", "dog/4.png", "dog/5.png")]
    good = [file for file in sorted((broken / "train").rglob("*.png")) if file not in bad]
    for split in ("train", "validation"):
        samples = data.splits["own"][split]
        files = [good[row] for row in samples.rows]
        batch = samples.batch(torch.arange(len(samples)))
        assert batch["images"].tolist() == [decode(file.read_bytes(), 8).tolist() for file in files]
        assert batch["labels"].tolist() == [["cat", "dog"].index(file.parent.name) for file in files]


def test_only_broken_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", cat=3, dog=3)
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"4 of 4 images of task 'own' \(test\) do not decode"):
        load(folder, on_bad_image="skip")


def test_a_table_that_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", cat=3, dog=3)
    (folder / "test.csv").write_text("image,label\ntrain/cat/0.png,cat\ntrain/dog/9.png,dog\n")
    with pytest.raises(InputError, match=r"1 of 2 images of task 'own' \(test\) .*: .*dog/9\.png \(FileNotFoundError"):
        load(folder)


# classes and labels


def test_classes_in_another_order_in_train_and_test(tmp_path: Path) -> None:
    table(tmp_path / "set/train.parquet", [0, 1, 1], datasets.ClassLabel(names=["cat", "dog"]))
    folder = table(tmp_path / "set/test.parquet", [0, 0, 1], datasets.ClassLabel(names=["dog", "cat"]))
    data = load(folder)
    assert data.tasks["own"].class_names == ("cat", "dog")
    assert data.splits["own"]["test"].labels.tolist() == [1, 1, 0]


def test_a_class_that_only_the_test_split_has(tmp_path: Path) -> None:
    table(tmp_path / "set/train.parquet", [0, 1] * 20, datasets.ClassLabel(names=["dog", "cat"]))
    folder = table(tmp_path / "set/test.parquet", [0, 1], datasets.ClassLabel(names=["ant", "dog"]))
    data = load(folder)
    assert data.tasks["own"].class_names == ("dog", "cat", "ant")
    assert data.splits["own"]["test"].labels.tolist() == [2, 0]


def test_a_class_without_a_training_image_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(image_folder(tmp_path / "set", ant=0, cat=25, dog=25), None)
    assert [record.message for record in caplog.records] == ["task 'own' has no training image of ant"]
    assert data.tasks["own"].class_names == ("ant", "cat", "dog")
    assert data.splits["own"]["train"].labels.unique().tolist() == [1, 2]
    assert data.splits["own"]["test"].labels.unique().tolist() == [0, 1, 2]


def test_class_names_that_are_numbers_count_in_the_given_names(tmp_path: Path) -> None:
    data = load(image_folder(tmp_path / "set", **{"00010": 3, "0009": 3, "1": 3}), class_names=list("abcdefghijk"))
    assert data.splits["own"]["test"].labels.tolist() == [10, 10, 9, 9, 1, 1]


def test_one_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task 'own' has 1 class \(cat\); telling classes apart needs at least 2"):
        load(image_folder(tmp_path / "set", cat=3))


def test_duplicated_class_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the class names of task 'own' repeat cat; every class needs"):
        load(image_folder(tmp_path / "set", cat=3, dog=3), class_aliases={"dog": "cat"})
    with pytest.raises(InputError, match=r"the class names of task 'own' repeat a b; every class needs"):
        load(image_folder(tmp_path / "other", **{"a b": 3, "a_b": 3}))


@pytest.mark.parametrize(
    ("labels", "feature", "task", "message"),
    [
        ([0, -1, -1], NAMES, {}, r"task 'own': label -1, which stands for none, in 2 of 3 rows of test; remove them"),
        ([0, 1, 2], None, {"class_names": ["a", "b"]}, r"label 2 of test is out of range, the task has 2 classes"),
        ([0, 1, -3], None, {"class_names": ["a", "b"]}, r"label -3 of test is out of range"),
        ([0, 1, 2], None, {}, r"task 'own': the labels of test are integers without names; .* class_names: \[\.\.\.\]"),
        ([0, 1, None], NAMES, {}, r"task 'own': 1 of 3 rows of test have no label in 'label'"),
        ([0.5, 1.0, 1.5], datasets.Value("float32"), {}, r"column 'label' holds neither class indices nor class names"),
        (["x", "y", "z"], datasets.Value("string"), {"class_names": ["x", "y"]}, r"\(2 names\) lacks z of the data's"),
        ([0, 1, 1], NAMES, {"class_names": ["cat", "dgo"]}, r"lacks dog of .* 2 classes; did you mean 'dgo'\?"),
        ([0, 1, 1], NAMES, {"class_aliases": {"cta": "x"}}, r"no class 'cta'; did you mean 'cat'\?"),
        ([0, 1, 1], NAMES, {"label_column": "lable"}, r"'own' has no column 'lable' \(label\); did you mean 'label'"),
        ([0, 1, 1], NAMES, {"image_column": "img"}, r"task 'own' has no column 'img' \(image\); did you mean 'image'"),
        ([0, 1, 1], NAMES, {"image_column": "label"}, r"column 'label' holds neither images nor paths"),
        ([0, 1, 1], NAMES, {"test": "tets"}, r"task 'own' has no split 'tets' for test; did you mean 'test'\?"),
        ([0, 1, 1], NAMES, {"validation": "test[:1]"}, r"uses 'test\[:1\]' for validation; say what is left of it too"),
        ([], NAMES, {}, r"task 'own': test \(.*test\.parquet\) could not be read: it holds no rows"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, labels: list, feature: object, task: dict, message: str) -> None:
    folder = table(tmp_path / "set/test.parquet", labels, feature)
    with pytest.raises(InputError, match=message):
        load(folder, **task)


def test_columns_that_look_like_nothing(tmp_path: Path) -> None:
    folder = table(tmp_path / "set/test.parquet", [0, 1], NAMES, column="label")
    datasets.Dataset.from_dict({"a": [1], "b": [2]}).to_parquet(tmp_path / "bare/test.parquet")
    with pytest.raises(InputError, match=r"none of its columns \(a, b\) looks like the label; name it with label_"):
        load(tmp_path / "bare")
    datasets.Dataset.from_dict({"a": [1, 2], "label": ["x", "y"]}).to_parquet(tmp_path / "half/test.parquet")
    with pytest.raises(InputError, match=r"none of its columns \(a, label\) looks like the image; name it with image_"):
        load(tmp_path / "half")
    assert load(folder).tasks["own"].class_names == ("cat", "dog")


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    folder = table(tmp_path / "set/test.parquet", [0, 1], NAMES)
    with pytest.raises(InputError, match=r"task 'own' has no train split, only test; name one with train: \.\.\."):
        load(folder, "fit")
    small = image_folder(tmp_path / "small", cat=1, dog=1)
    with pytest.raises(InputError, match=r"the validation split of task 'own' is empty: .* 2 training images none"):
        load(small, "fit")


# paths


@pytest.mark.parametrize("path", ["../nowhere", "/no/where/at/all", "no where", "a/b/c"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(InputError, match=rf"path '{path}' of task 'own' is not there \(relative paths start at "):
        ImageTasks([{"name": "own", "path": path}])


def test_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = ImageTasks([{"name": "own", "path": "nobody/nothing"}], image_size=8, cache_dir=str(tmp_path))
    message = r"task 'own': the hub set 'nobody/nothing' could not be read: .* local copy: \{name: own, path: FOLDER\}"
    with pytest.raises(InputError, match=message):
        data.setup("test")


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match=r"task 'own': the folder '.*set' could not be read: .*any data files"):
        load(tmp_path / "set")


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "set.png").write_bytes(png(0))
    with pytest.raises(InputError, match=r"set\.png of task 'own' is no table; expected \.parquet, \.csv"):
        load(tmp_path / "set.png")


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"on_bad_image": "skp"}, "on_bad_image must be 'error' or 'skip', got 'skp'"),
        ({"tasks": ["glyhps"]}, r"unknown task 'glyhps'; did you mean 'glyphs'\?"),
        ({"tasks": [{"name": "x", "path": "embedded:glyps"}]}, r"no embedded task 'glyps'; did you mean 'glyphs'\?"),
        ({"tasks": [{"name": "glyphs", "label_column": "y"}]}, "label_column does nothing in task 'glyphs'"),
        ({"tasks": [{"name": "glyphs", "class_aliases": {"AA": "x"}}]}, "task 'glyphs': no class 'AA'"),
    ],
)
def test_mistakes_in_settings(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageTasks(**settings)
