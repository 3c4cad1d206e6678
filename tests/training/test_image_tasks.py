"""Image tasks: where samples come from, how they are split, decoded and cached, and what a batch holds."""

import hashlib
import io
import multiprocessing
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from oracles import training_indices
from PIL import Image

from fusionlab.backbones.images import ImageBackbone
from fusionlab.backbones.preprocessing import Preprocessing
from fusionlab.data.images import EMBEDDED_TASKS, ImageTasks
from fusionlab.data.known_tasks import IMAGE_TASKS
from fusionlab.data.sources import _open_hub, hub_fingerprint
from fusionlab.data.stored import StoredImages, data_version
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError

REAL = Path(__file__).parents[2] / "../shared/data"


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A small encoded image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def remainder(encoded: bytes) -> int:
    return int(hashlib.sha256(encoded).hexdigest()[:8], 16) % 10


def write_parquet(path: Path, encoded: list[bytes], labels: list[int], names: list[str] | None) -> None:
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [{"bytes": data, "path": None} for data in encoded], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def parquet_folder(folder: Path, num_train: int = 60, num_test: int = 10) -> list[bytes]:
    train = [png(seed) for seed in range(num_train)]
    write_parquet(folder / "train.parquet", train, [index % 3 for index in range(num_train)], ["a", "b", "c"])
    test = [png(seed) for seed in range(1000, 1000 + num_test)]
    write_parquet(folder / "test.parquet", test, [index % 3 for index in range(num_test)], ["a", "b", "c"])
    return train


def image_folder(folder: Path, splits: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for number, (split, size) in enumerate(splits.items()):
        for index in range(size):
            file = folder / split / classes[index % len(classes)] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(1000 * number + index))


def load(tmp_path: Path, task: dict, stage: str | None = None, **options) -> ImageTasks:
    options = {"image_size": 8, "cache_dir": str(tmp_path / "cache"), **options}
    data = ImageTasks([{"name": "own", **task}], **options)
    data.setup(stage)
    return data


def sizes(data: ImageTasks) -> dict[str, int]:
    return {split: len(samples) for split, samples in data.splits["own"].items()}


def pixels(data: ImageTasks, split: str) -> torch.Tensor:
    samples = data.splits["own"][split]
    return samples.batch(torch.arange(len(samples)))["images"]


def test_embedded_tasks_are_the_default_and_need_no_cache(tmp_path: Path) -> None:
    data = ImageTasks(image_size=32, cache_dir=str(tmp_path / "cache"))
    data.setup()
    assert list(data.tasks) == EMBEDDED_TASKS
    assert len(EMBEDDED_TASKS) >= 8
    for name, task in data.tasks.items():
        assert set(data.splits[name]) == {"train", "validation", "test"}
        for samples in data.splits[name].values():
            assert samples.labels.unique().tolist() == list(range(task.num_classes))
    assert not (tmp_path / "cache").exists()


def test_embedded_images_are_resized_to_the_backbone() -> None:
    data = ImageTasks(["glyphs"], image_size=48)
    data.setup("test")
    batch = next(data.eval_batches("glyphs", "test"))
    assert batch["images"].shape == (100, 3, 48, 48)  # 400 in four batches of one size
    assert batch["images"].dtype == torch.uint8


def test_a_batch(tmp_path: Path) -> None:
    train = parquet_folder(tmp_path / "set")
    data = load(tmp_path, {"path": str(tmp_path / "set")})
    rows = [index for index, encoded in enumerate(train) if remainder(encoded) != 0]
    batch = data.splits["own"]["train"].batch(torch.tensor([5, 0, 5]))
    assert batch["images"].dtype == torch.uint8
    assert batch["images"].shape == (3, 3, 8, 8)
    assert batch["index"].tolist() == [5, 0, 5]
    assert batch["labels"].tolist() == [rows[5] % 3, rows[0] % 3, rows[5] % 3]
    expected = np.asarray(Image.open(io.BytesIO(train[rows[5]]))).transpose(2, 0, 1)
    assert batch["images"][0].numpy().tolist() == expected.tolist()


def test_a_missing_validation_split_is_a_tenth_of_training_by_hash(tmp_path: Path) -> None:
    train = parquet_folder(tmp_path / "set", num_train=200)
    data = load(tmp_path, {"path": str(tmp_path / "set")})
    kept = [index for index, encoded in enumerate(train) if remainder(encoded) == 0]
    assert 10 < len(kept) < 30
    assert data.splits["own"]["validation"].rows.tolist() == kept
    assert data.splits["own"]["train"].rows.tolist() == sorted(set(range(200)) - set(kept))
    assert len(data.splits["own"]["test"]) == 10


def test_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    train = [png(seed) for seed in range(40)] * 2
    write_parquet(tmp_path / "set/train.parquet", train, [0, 1] * 40, ["a", "b"])
    data = load(tmp_path, {"path": str(tmp_path / "set"), "train": "train[10:]", "test": "train[:10]"})
    seen = {split: {image.numpy().tobytes() for image in pixels(data, split)} for split in ("train", "validation")}
    assert len(seen["train"]) + len(seen["validation"]) == 40
    assert not seen["train"] & seen["validation"]


def test_a_validation_split_of_its_own_is_used(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {"train": 30, "validation": 7, "test": 9})
    data = load(tmp_path, {"path": str(tmp_path / "set")})
    assert sizes(data) == {"train": 30, "validation": 7, "test": 9}


def test_without_any_split_test_is_another_tenth_by_hash(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {".": 120})
    files = sorted((tmp_path / "set").rglob("*.png"))
    remainders = [remainder(file.read_bytes()) for file in files]
    data = load(tmp_path, {"path": str(tmp_path / "set")})
    counts = {"validation": remainders.count(0), "test": remainders.count(1)}
    assert sizes(data) == {"train": 120 - sum(counts.values()), **counts}
    assert data.tasks["own"].class_names == ("cat", "dog")


def test_a_split_that_serves_as_test_is_not_used_twice(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {"train": 100, "validation": 9})
    data = load(tmp_path, {"path": str(tmp_path / "set"), "test": "validation"})
    assert len(data.splits["own"]["test"]) == 9
    assert len(data.splits["own"]["train"]) + len(data.splits["own"]["validation"]) == 100


def test_slices_of_splits(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {".": 100})
    slices = {"train": "train[:60%]", "validation": "train[60%:70%]", "test": "train[70%:]"}
    data = load(tmp_path, {"path": str(tmp_path / "set"), **slices})
    assert sizes(data) == {"train": 60, "validation": 10, "test": 30}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_table_of_paths(tmp_path: Path, suffix: str) -> None:
    image_folder(tmp_path / "set/images", {".": 40})
    for split, numbers in {"train": range(30), "test": range(30, 40)}.items():
        kinds = [(number, ("cat", "dog")[number % 2]) for number in numbers]
        rows = [{"path": f"images/{kind}/{number}.png", "kind": f"a_{kind}"} for number, kind in kinds]
        table = datasets.Dataset.from_list(rows)
        file = tmp_path / f"set/{split}.{suffix}"
        table.to_json(file) if suffix == "jsonl" else table.to_csv(file, sep="\t" if suffix == "tsv" else ",")
    data = load(tmp_path, {"path": str(tmp_path / "set"), "label_column": "kind"})
    assert data.tasks["own"].class_names == ("a cat", "a dog")
    assert len(data.splits["own"]["test"]) == 10
    expected = np.asarray(Image.open(tmp_path / "set/images/dog/31.png")).transpose(2, 0, 1)
    assert pixels(data, "test")[1].numpy().tolist() == expected.tolist()
    assert data.splits["own"]["test"].labels.tolist() == [0, 1] * 5


def test_files_named_for_their_splits(tmp_path: Path) -> None:
    train = [png(seed) for seed in range(50)]
    write_parquet(tmp_path / "set/some.parquet", train, [0, 1] * 25, ["a", "b"])
    write_parquet(tmp_path / "set/other.parquet", train[:4], [0, 1, 0, 1], ["a", "b"])
    task = {"path": str(tmp_path / "set"), "train": "some.parquet", "test": "other.parquet"}
    assert sizes(load(tmp_path, task))["test"] == 4
    alone = load(tmp_path, {"path": str(tmp_path / "set/some.parquet")})
    assert sum(sizes(alone).values()) == 50


def test_stages_load_what_they_need(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    for stage, splits in {"validate": {"validation"}, "test": {"test"}, "predict": set()}.items():
        data = load(tmp_path, {"path": str(tmp_path / "set")}, stage)
        assert set(data.splits["own"]) == splits
        assert data.tasks["own"].num_classes == 3


def test_class_names_templates_and_aliases(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    task = {"path": str(tmp_path / "set"), "templates": "a {}!", "class_aliases": {"b": "bee"}}
    own = load(tmp_path, task, "test").tasks["own"]
    assert (own.class_names, own.templates) == (("a", "bee", "c"), ("a {}!",))
    task = {"path": str(tmp_path / "set"), "class_names": ["ay", "bee", "sea"]}
    own = load(tmp_path, task, "test").tasks["own"]
    assert (own.class_names, own.templates) == (("ay", "bee", "sea"), ("a photo of a {}.",))


def test_a_second_run_decodes_nothing_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_folder(tmp_path / "set")
    first = load(tmp_path, {"path": str(tmp_path / "set")})
    monkeypatch.setattr(StoredImages, "_decode", pytest.fail)
    monkeypatch.setattr("fusionlab.data.sources.open_source", pytest.fail)
    second = load(tmp_path, {"path": str(tmp_path / "set")})
    for split in ("train", "validation", "test"):
        assert pixels(first, split).equal(pixels(second, split))
        assert first.splits["own"][split].data_version == second.splits["own"][split].data_version


def test_the_cache_follows_the_data(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {"train": 40, "test": 6})
    before = load(tmp_path, {"path": str(tmp_path / "set")})
    assert load(tmp_path, {"path": str(tmp_path / "set")}, image_size=16).splits["own"]["test"].batch(
        torch.tensor([0])
    )["images"].shape == (1, 3, 16, 16)
    (tmp_path / "set/test/cat/0.png").write_bytes(png(77777))
    after = load(tmp_path, {"path": str(tmp_path / "set")})
    assert before.splits["own"]["train"].data_version == after.splits["own"]["train"].data_version
    assert before.splits["own"]["test"].data_version != after.splits["own"]["test"].data_version


def test_the_cache_follows_images_that_a_table_names_elsewhere(tmp_path: Path) -> None:
    image_folder(tmp_path / "elsewhere", {".": 40})
    files = sorted((tmp_path / "elsewhere").rglob("*.png"))
    rows = [{"image": str(file), "label": file.parent.name} for file in files]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "all.csv")
    task = {"path": str(tmp_path / "all.csv"), "train": "train[8:]", "test": "train[:8]"}
    before = load(tmp_path, task, "test")
    files[0].write_bytes(png(77777))
    after = load(tmp_path, task, "test")
    assert not pixels(before, "test")[0].equal(pixels(after, "test")[0])


def test_the_data_version_is_that_of_pixels_and_labels(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    samples = load(tmp_path, {"path": str(tmp_path / "set")}).splits["own"]["validation"]
    batch = samples.batch(torch.arange(len(samples)))
    digest = hashlib.sha256(batch["images"].numpy().tobytes() + batch["labels"].numpy().tobytes())
    assert samples.data_version == digest.hexdigest()[:16]
    changed = samples.images.copy()
    changed[samples.rows[0], 0, 0, 0] ^= 1
    assert data_version(changed, samples.labels.numpy().repeat(100), samples.rows.numpy()) != samples.data_version


def test_max_samples_is_a_fixed_choice(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    options = {"max_samples": 6}
    first, second = (load(tmp_path, {"path": str(tmp_path / "set")}, seed=seed, **options) for seed in (0, 1))
    assert len(first.splits["own"]["train"]) == len(first.splits["own"]["test"]) == 6
    assert first.splits["own"]["train"].rows.tolist() == second.splits["own"]["train"].rows.tolist()
    whole = load(tmp_path, {"path": str(tmp_path / "set")})
    assert first.splits["own"]["train"].data_version != whole.splits["own"]["train"].data_version


def _setup(folder: str, barrier) -> None:
    barrier.wait()
    ImageTasks([{"name": "own", "path": f"{folder}/set"}], image_size=8, cache_dir=f"{folder}/cache").setup()


def test_several_processes_may_fill_the_cache_at_once(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_setup, args=(str(tmp_path), barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(file.name for file in next((tmp_path / "cache").glob("own-*")).iterdir()) == [
        "source",
        "test-8",
        "train-8",
    ]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    data = load(tmp_path, {"path": str(tmp_path / "set")}, "test")
    folder = next((tmp_path / "cache").glob("own-*"))
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    left_over = folder / f".train-8.tmp-{socket.gethostname()}-{process.pid}-abc"
    left_over.mkdir()
    data.setup("fit")
    assert not left_over.exists()


class Sized(LightningModule):
    """As much of a module as the data needs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ImageBackbone()
        self.backbone.preprocess_by(Preprocessing(12))
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shapes: list[tuple[int, ...]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.shapes.append(tuple(batch["own"]["images"].shape))
        return self.weight * 1.0

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Scoring is not the loader's."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_gives_the_image_size_of_its_backbone(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "set")
    task = {"name": "own", "path": str(tmp_path / "set")}
    data = ImageTasks([task], batch_size=16, cache_dir=str(tmp_path / "cache"))
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Sized()
    trainer.fit(module, data)
    assert module.shapes == [(16, 3, 12, 12)] * -(-len(data.splits["own"]["train"]) // 16)


def test_the_training_loader_follows_seed_and_rank() -> None:
    data = ImageTasks(["glyphs"], batch_size=4, image_size=32, seed=3)
    data.setup("fit")
    trainers = [SimpleNamespace(global_rank=rank, world_size=2, accumulate_grad_batches=1) for rank in (0, 1)]
    indices = []
    for data.trainer in trainers:
        indices += next(iter(data.train_dataloader()))["glyphs"]["index"].tolist()
    assert indices == training_indices(len(data.splits["glyphs"]["train"]), 8, 0, seed=3, task="glyphs").tolist()


def test_without_an_image_size_the_order_of_calls_is_named() -> None:
    with pytest.raises(RuntimeError, match="set image_size, or attach a trainer"):
        ImageTasks(["glyphs"]).setup("test")
    with pytest.raises(RuntimeError, match=r"split 'test' of task 'glyphs' is not loaded \(loaded: none\)"):
        ImageTasks(["glyphs"], image_size=32).eval_batches("glyphs", "test")


def test_a_hub_set_is_opened_by_its_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    parquet_folder(tmp_path / "set")
    source = _open_hub(Task("own", path=str(tmp_path / "set"), test="test[:4]"))
    assert {split: len(table) for split, table in source.tables.items()} == {"train": 60, "test": 4}
    assert hub_fingerprint(source) == hub_fingerprint(_open_hub(source.task))


def test_a_known_task_s_classes_by_number_take_its_names(tmp_path: Path) -> None:
    names = IMAGE_TASKS["gtsrb"].class_names
    image_folder(tmp_path / "set", {"train": 86, "test": 43}, tuple(f"{number:05d}" for number in range(43)))
    data = load(tmp_path, {"name": "gtsrb", "path": str(tmp_path / "set")}, "test")
    assert data.tasks["gtsrb"].class_names == names
    assert data.splits["gtsrb"]["test"].labels.tolist() == list(range(43))
    write_parquet(tmp_path / "mnist/test.parquet", [png(seed) for seed in range(10)], list(range(10)), None)
    task = load(tmp_path, {"name": "mnist", "path": str(tmp_path / "mnist")}, "test").tasks["mnist"]
    assert task.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert task.templates == ('a photo of the number: "{}".',)


def test_a_known_task_s_class_names_are_made_readable(tmp_path: Path) -> None:
    names = sorted(IMAGE_TASKS["eurosat"].class_aliases)
    write_parquet(tmp_path / "set/test.parquet", [png(seed) for seed in range(10)], list(range(10)), names)
    task = load(tmp_path, {"name": "eurosat", "path": str(tmp_path / "set")}, "test").tasks["eurosat"]
    assert task.class_names == IMAGE_TASKS["eurosat"].class_names
    assert task.templates[0] == "a centered satellite photo of {}."


def test_a_known_task_in_part_needs_its_own_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set/test.parquet", [png(0), png(1)], [0, 3], None)
    with pytest.raises(InputError, match="the labels of test are integers without names"):
        load(tmp_path, {"name": "mnist", "path": str(tmp_path / "set")}, "test")


@pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not here")
@pytest.mark.parametrize(("name", "num_classes", "first"), [("dtd", 10, "banded"), ("gtsrb", 43, "speed limit 20")])
def test_real_sets_load_by_name_and_path(tmp_path: Path, name: str, num_classes: int, first: str) -> None:
    data = ImageTasks([{"name": name, "path": str(REAL / name)}], image_size=32, cache_dir=str(tmp_path))
    data.setup("test")
    assert data.tasks[name].num_classes == num_classes
    assert data.tasks[name].class_names[0] == first
    assert sum(batch["mask"].sum() for batch in data.eval_batches(name, "test")) == len(data.splits[name]["test"])
