"""Files of tasks, and tasks of files: for tests of how tables and folders are read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from fusionlab.data.images import ImageTasks
from fusionlab.data.rendering import Texts, TextSource
from fusionlab.data.tasks import Task

WORDS = {"input_columns": ["text"], "label_words": ["bad", "good"]}


def png(seed: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def texts(path: Path, split: str = "test", **task: Any) -> Texts:
    """A split of a text task, whole, as the file of that name has it."""
    settings = {**WORDS, **({split: path.name} if path.is_file() else {}), **task}
    folder = path.parent if path.is_file() else path
    return TextSource(Task("own", path=str(folder), **settings), None, folder.parent / "cache").texts(split)


def images(path: Path, stage: str | None = None, name: str = "own", **task: Any) -> ImageTasks:
    data = ImageTasks([{"name": name, "path": str(path), **task}], image_size=8, cache_dir=str(path.parent / "cache"))
    data.setup(stage)
    return data


def sizes(data: ImageTasks) -> dict[str, int]:
    return {split: len(samples) for split, samples in data.splits["own"].items()}


def tree(root: Path, **files: int) -> Path:
    """``root`` with so many images in each folder; no two are alike."""
    for number, (folder, count) in enumerate(files.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (root / folder / f"{index}.png").write_bytes(png(1000 * number + index))
    return root


def table(file: Path, columns: dict[str, list], features: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
    return file.parent
