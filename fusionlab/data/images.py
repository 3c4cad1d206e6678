"""Image classification tasks, embedded or from a hub id or local files, as uint8 batches of one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from fusionlab.data.cache import cache_root
from fusionlab.data.drawing import DRAWN_TASKS
from fusionlab.data.folder import ImageBatches, image_files
from fusionlab.data.loader import Batch, StepLoader, exact_batches
from fusionlab.data.pixels import pixels
from fusionlab.data.sources import SPLITS, SplitName, check_path
from fusionlab.data.stored import OnBadImage, StoredImages, data_version
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.known_tasks import DEFAULT_TEMPLATES, IMAGE_TASKS
from fusionlab.samplers import derive_seed
from fusionlab.tasks import Task, parse_tasks

EMBEDDED_TASKS: list[str | dict[str, Any]] = list(DRAWN_TASKS)
_KNOWN = {**IMAGE_TASKS, **{name: Task(name=name, path=f"embedded:{name}") for name in DRAWN_TASKS}}
_STAGE_SPLITS: dict[str, tuple[SplitName, ...]] = {
    "fit": SPLITS,
    "validate": ("validation",),
    "test": ("test",),
    "predict": (),
}


@dataclass(frozen=True)
class ImageTask:
    """What a zero-shot head needs of a task: its name, the classes in label order, prompts with one ``{}`` each."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


class ImageSplit:
    """The samples of one split.

    Args:
        images: uint8, shape ``(stored rows, 3, height, width)``; may be memory-mapped.
        labels: int64, shape ``(stored rows,)``.
        rows: which stored rows are this split's, int64.
        image_size: side of the square images in a batch; stored images of another size are resized.
        version: the data version if it is known already.
    """

    evaluation_order: Tensor | None = None

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, image_size: int, version: str | None = None
    ) -> None:
        self.images = images
        self.rows = torch.from_numpy(rows)
        self.labels = torch.from_numpy(labels[rows])
        self.image_size = image_size
        self.data_version = version or data_version(images, labels, rows)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        """Images uint8 ``(batch, 3, image_size, image_size)``, labels and index int64 ``(batch,)``."""
        images = self.images[self.rows[indices].numpy()]
        if images.shape[-1] != self.image_size:
            images = np.stack([pixels(Image.fromarray(image.transpose(1, 2, 0)), self.image_size) for image in images])
        return {"images": torch.from_numpy(images), "labels": self.labels[indices], "index": indices}


class ImageTasks(LightningDataModule):
    """One loader over all tasks in training, exact batches of each task in evaluation.

    Args:
        tasks: names known to the package, or mappings ``{name, path, ...}`` where path is a hub id, or a local folder
            or file of parquet, csv, tsv, json or images in one folder per class; all embedded tasks by default.
        batch_size: images of each task in a training batch of one process.
        eval_batch_size: images in an evaluation batch.
        image_size: side of the square images in pixels; by default what the backbone takes.
        on_bad_image: ``error`` names the images that do not decode and stops, ``skip`` leaves them out.
        images: folder of images, or one image, for ``predict``.
        max_samples: use at most this many images of each split, a fixed random choice.
        cache_dir: folder for decoded images; by default ``$FUSIONLAB_CACHE``, else ``~/.cache/fusionlab``.
        seed: seed of the order of training images.
    """

    def __init__(
        self,
        tasks: list[str | dict[str, Any]] = EMBEDDED_TASKS,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        image_size: int | None = None,
        on_bad_image: OnBadImage = "error",
        images: str | None = None,
        max_samples: int | None = None,
        cache_dir: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "image_size": image_size}
        for name, value in {**sizes, "max_samples": max_samples}.items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if on_bad_image not in ("error", "skip"):
            raise InputError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")
        self.definitions = parse_tasks(tasks, _KNOWN)
        for task in self.definitions.values():
            _check_embedded(task) if _is_embedded(task) else check_path(task)
        self.batch_size, self.eval_batch_size, self.image_size = batch_size, eval_batch_size, image_size
        self.on_bad_image, self.max_samples, self.cache_dir, self.seed = on_bad_image, max_samples, cache_dir, seed
        self.images = None if images is None else image_files(Path(images))
        self.tasks: dict[str, ImageTask] = {}
        self.splits: dict[str, dict[str, ImageSplit]] = {name: {} for name in self.definitions}

    def prepare_data(self) -> None:
        """Decode into the cache, in one process of each machine, before the others read it."""
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        self._load(_STAGE_SPLITS[self.trainer.state.fn.value])

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs; all of them without a stage.

        Raises:
            InputError: the data cannot be read as the tasks say; the message names task, split and what to do.
        """
        self._load(SPLITS if stage is None else _STAGE_SPLITS[stage])

    def _load(self, splits: tuple[SplitName, ...]) -> None:
        for name, task in self.definitions.items():
            missing = [split for split in splits if split not in self.splits[name]]
            if missing or name not in self.tasks:
                load = self._load_embedded if _is_embedded(task) else self._load_stored
                load(task, missing)

    def _load_embedded(self, task: Task, splits: list[SplitName]) -> None:
        drawn = DRAWN_TASKS[_embedded_name(task)]
        class_names = tuple((task.class_aliases or {}).get(name, name) for name in drawn.class_names)
        self._add_task(task, class_names, drawn.templates)
        for split in splits:
            images, labels = drawn.draw(split)
            self._add_split(task.name, split, images.transpose(0, 3, 1, 2), labels, np.arange(len(labels)))

    def _load_stored(self, task: Task, splits: list[SplitName]) -> None:
        stored = StoredImages(
            task,
            IMAGE_TASKS.get(task.name),
            image_size=self._image_size(),
            on_bad_image=self.on_bad_image,
            cache=cache_root(self.cache_dir),
        )
        self._add_task(task, stored.class_names, DEFAULT_TEMPLATES)
        for split in splits:
            self._add_split(task.name, split, *stored.split(split))

    def _add_task(self, task: Task, class_names: tuple[str, ...], templates: tuple[str, ...]) -> None:
        self.tasks[task.name] = ImageTask(task.name, class_names, task.templates or templates)

    def _add_split(
        self,
        task: str,
        split: str,
        images: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        version: str | None = None,
    ) -> None:
        if self.max_samples is not None and len(rows) > self.max_samples:
            generator = np.random.default_rng(derive_seed("max_samples", task, split))
            rows, version = np.sort(generator.choice(rows, self.max_samples, replace=False)), None
        self.splits[task][split] = ImageSplit(images, labels, rows, self._image_size(), version)

    def _image_size(self) -> int:
        if self.image_size is None:
            if self.trainer is None or self.trainer.lightning_module is None:
                raise RuntimeError("set image_size, or attach a trainer whose module has a backbone, before setup")
            backbone: Any = self.trainer.lightning_module.backbone
            self.image_size = int(backbone.image_size)
        return self.image_size

    def train_dataloader(self) -> StepLoader:
        """Micro-batches ``{task: batch}`` for this process."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        splits = {name: self.splits[name]["train"] for name in self.tasks}
        return StepLoader(splits, self.batch_size, seed=self.seed, rank=rank, world_size=world_size)

    def val_dataloader(self) -> list[int]:
        """One empty batch: the module scores by :func:`fusionlab.evaluate`, which takes :meth:`eval_batches` itself."""
        return [0]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> ImageBatches:
        """Batches of the images to label: uint8 images of constant shape and the paths of those that are no padding.

        Raises:
            InputError: no ``images`` given, or images that do not decode (unless ``on_bad_image`` is ``skip``).
        """
        if self.images is None:
            raise InputError("predict needs --data.images, a folder of images or one image")
        return ImageBatches(self.images, self._image_size(), self.eval_batch_size, self.on_bad_image)

    def eval_batches(self, task: str, split: str, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """This rank's evaluation batches of a task, each with a bool ``"mask"`` that is False on padding."""
        return exact_batches(self._split(task, split), self.eval_batch_size, rank=rank, world_size=world_size)

    def num_eval_batches(self, task: str, split: str) -> int:
        """Number of evaluation batches of a task, over all ranks."""
        return -(-len(self._split(task, split)) // self.eval_batch_size)

    def _split(self, task: str, split: str) -> ImageSplit:
        if split not in self.splits[task]:
            loaded = name_list(self.splits[task]) or "none"
            raise RuntimeError(f"split {split!r} of task {task!r} is not loaded (loaded: {loaded}); call setup first")
        return self.splits[task][split]


def _is_embedded(task: Task) -> bool:
    return (task.path or "").startswith("embedded:")


def _check_embedded(task: Task) -> None:
    name = _embedded_name(task)
    if name not in DRAWN_TASKS:
        raise InputError(f"task {task.name!r}: no embedded task {name!r}; {did_you_mean(name, DRAWN_TASKS)}")
    for field in fields(Task):
        if getattr(task, field.name) is not None and field.name not in ("name", "path", "templates", "class_aliases"):
            raise InputError(f"{field.name} does nothing in task {task.name!r}, which is embedded; remove it")
    for alias in task.class_aliases or ():
        if alias not in (names := DRAWN_TASKS[name].class_names):
            raise InputError(f"class_aliases of task {task.name!r}: no class {alias!r}; {did_you_mean(alias, names)}")


def _embedded_name(task: Task) -> str:
    return (task.path or "").removeprefix("embedded:")
