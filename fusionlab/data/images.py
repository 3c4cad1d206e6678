"""Image classification tasks, embedded or from a hub id or local files, as uint8 batches of one size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusionlab.backbones.images import ImageBackbone
from fusionlab.backbones.preprocessing import Preprocessing
from fusionlab.data.base import TaskData, check_embedded, check_positive, embedded, embedded_name, refuse_keys
from fusionlab.data.cache import cache_root
from fusionlab.data.drawing import DRAWN_TASKS, DrawnTask
from fusionlab.data.folder import ImageBatches, image_files
from fusionlab.data.known_tasks import DEFAULT_TEMPLATES, IMAGE_TASKS
from fusionlab.data.pixels import pixels
from fusionlab.data.sources import check_path
from fusionlab.data.splits import SplitName
from fusionlab.data.stored import OnBadImage, StoredImages, data_version
from fusionlab.data.suites import IMAGE_SUITES, check_within, tasks_of
from fusionlab.data.tasks import Task, parse_tasks
from fusionlab.errors import InputError, did_you_mean
from fusionlab.samplers import Batch

EMBEDDED_TASKS: list[str | dict] = list(DRAWN_TASKS)
_KNOWN = {**IMAGE_TASKS, **embedded(DRAWN_TASKS)}
_TEXT_KEYS = ("input_columns", "template", "label_words", "target_column", "metric")
Suite = Literal["ta8", "tall14", "tall20"]


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
        how: how images are processed, or the side of the square images in a batch; stored images of that size are
            taken to be so already.
        version: the data version if it is known already.
    """

    evaluation_order: Tensor | None = None

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        how: Preprocessing | int,
        version: str | None = None,
    ) -> None:
        self.images = images
        self.rows = torch.from_numpy(rows)
        self.labels = torch.from_numpy(labels[rows])
        self.how = Preprocessing(how) if isinstance(how, int) else how
        self.image_size = self.how.image_size
        self.data_version = version or data_version(images, labels, rows)
        if self._is_resized and self.how.key:
            self.data_version = hashlib.sha256(f"{self.data_version}{self.how.key}".encode()).hexdigest()[:16]

    @property
    def reading_version(self) -> str:
        """The data version: that of pixels and labels."""
        return self.data_version

    @property
    def _is_resized(self) -> bool:
        return self.images.shape[-1] != self.image_size

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        """Images uint8 ``(batch, 3, image_size, image_size)``, labels and index int64 ``(batch,)``."""
        images = self.images[self.rows[indices].numpy()]
        if self._is_resized:
            images = np.stack([pixels(Image.fromarray(image.transpose(1, 2, 0)), self.how) for image in images])
        return {"images": torch.from_numpy(images), "labels": self.labels[indices], "index": indices}


class ImageTasks(TaskData):
    """One loader over all tasks in training, exact batches of each task in evaluation.

    Args:
        tasks: names known to the package, or mappings ``{name, path, ...}`` where path is a hub id, or a local folder
            or file of parquet, csv, tsv, json or images in one folder per class; all embedded tasks by default.
        batch_size: images of each task in a training batch of one process.
        eval_batch_size: images in an evaluation batch at most; those of a set are of one size.
        image_size: side of the square images in pixels; by default what the backbone takes, processed as its
            checkpoint says.
        on_bad_image: ``error`` names the images that do not decode and stops, ``skip`` leaves them out.
        images: folder of images, or one image, for ``predict``.
        suite: the tasks that papers compare on, as FusionBench has them: ``ta8``, ``tall14`` or ``tall20``; ``tasks``
            then takes some of them by name, or says where a copy is, ``{name, path}``.
        arguments: max_samples, cache_dir and seed, as of :class:`~fusionlab.data.base.TaskData`.
    """

    gives = "images"

    def __init__(
        self,
        tasks: list[str | dict] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        image_size: int | None = None,
        on_bad_image: OnBadImage = "error",
        images: str | None = None,
        suite: Suite | None = None,
        **arguments: Any,
    ) -> None:
        of_suite = tasks_of(suite, IMAGE_SUITES)
        default = list(of_suite) or EMBEDDED_TASKS
        super().__init__(
            parse_tasks(default if tasks is None else tasks, _KNOWN | of_suite),
            batch_size,
            eval_batch_size,
            **arguments,
        )
        check_within(suite, self.definitions, of_suite)
        self.suite, self._known = suite, IMAGE_TASKS | of_suite
        check_positive(image_size=image_size)
        if on_bad_image not in ("error", "skip"):
            raise InputError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")
        for task in self.definitions.values():
            _check(task)
        self.image_size, self.on_bad_image = image_size, on_bad_image
        self.images = None if images is None else image_files(Path(images))

    def load_task(self, task: Task, splits: list[SplitName]) -> None:
        """Draw, or decode into the cache and read from there."""
        if (name := embedded_name(task)) is not None:
            self._load_embedded(task, DRAWN_TASKS[name], splits)
        else:
            self._load_stored(task, splits)

    def _load_embedded(self, task: Task, drawn: DrawnTask, splits: list[SplitName]) -> None:
        class_names = tuple((task.class_aliases or {}).get(name, name) for name in drawn.class_names)
        self._add_task(task, class_names, drawn.templates)
        for split in splits:
            images, labels = drawn.draw(split)
            self._add_split(task.name, split, images.transpose(0, 3, 1, 2), labels, np.arange(len(labels)))

    def _load_stored(self, task: Task, splits: list[SplitName]) -> None:
        stored = StoredImages(
            task,
            self._known.get(task.name),
            how=self._how(),
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
        chosen = self.chosen(rows, task, split)
        version = version if len(chosen) == len(rows) else None
        self.loaded[task][split] = ImageSplit(images, labels, chosen, self._how(), version)

    def _how(self) -> Preprocessing:
        """How the backbone's checkpoint processes images; for another size, or without a backbone, as CLIP does."""
        module = None if self.trainer is None else self.trainer.lightning_module
        backbone = None if module is None else module.backbone
        if not isinstance(backbone, ImageBackbone):
            if self.image_size is None:
                raise RuntimeError(
                    "set image_size, or attach a trainer whose module has a backbone of images, before setup"
                )
            return Preprocessing(self.image_size)
        how = backbone.preprocessing
        if self.image_size not in (None, how.image_size):
            return Preprocessing(self.image_size)
        self.image_size = how.image_size
        return how

    def predict_dataloader(self) -> ImageBatches:
        """Batches of the images to label: uint8 images of constant shape and the paths of those that are no padding.

        Raises:
            InputError: no ``images`` given, or images that do not decode (unless ``on_bad_image`` is ``skip``).
        """
        if self.images is None:
            raise InputError("predict needs --data.images, a folder of images or one image")
        return ImageBatches(self.images, self._how(), self.eval_batch_size, self.on_bad_image)


def _check(task: Task) -> None:
    refuse_keys(task, _TEXT_KEYS, "whose inputs are images")
    if (name := embedded_name(task)) is None:
        check_path(task)
        return
    check_embedded(task, name, DRAWN_TASKS, usable=("templates", "class_aliases"))
    for alias in task.class_aliases or ():
        if alias not in (names := DRAWN_TASKS[name].class_names):
            raise InputError(f"class_aliases of task {task.name!r}: no class {alias!r}; {did_you_mean(alias, names)}")
