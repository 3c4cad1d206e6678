"""Images to label: the files of a folder, decoded into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusionlab.backbones.preprocessing import Preprocessing
from fusionlab.data.layout import files_below, images_among
from fusionlab.data.pixels import DECODE_ERRORS, decode
from fusionlab.errors import InputError, name_list


def image_files(path: Path) -> list[Path]:
    """The image files at or below ``path``, by name; what begins with a dot is left out.

    Raises:
        InputError: nothing there, or no image in it.
    """
    path = path.expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"data.images: no folder or image {str(path)!r}")
    files = images_among(files_below(path))
    if not files:
        raise InputError(f"data.images: no image files in {str(path)!r}; expected endings such as .png or .jpg")
    return files


class ImageBatches:
    """Batches ``{"images": uint8 (batch_size, 3, size, size), "paths": names of the images that are no padding}``.

    Args:
        files: image files.
        how: how images are processed, or the side of the square images in pixels.
        batch_size: images in a batch; the last one is padded.
        on_bad_image: ``error`` or ``skip``.
    """

    def __init__(self, files: Sequence[Path], how: Preprocessing | int, batch_size: int, on_bad_image: str) -> None:
        self.files, self.batch_size = files, batch_size
        self.how = Preprocessing(how) if isinstance(how, int) else how
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.files), self.batch_size):
            yield self._batch(self.files[start : start + self.batch_size])

    def _batch(self, files: Sequence[Path]) -> dict[str, Any]:
        images = np.zeros((self.batch_size, 3, self.how.image_size, self.how.image_size), dtype=np.uint8)
        paths: list[str] = []
        bad: list[str] = []
        for file in files:
            try:
                images[len(paths)] = decode(file.read_bytes(), self.how)
                paths.append(str(file))
            except DECODE_ERRORS as error:
                bad.append(f"{file} ({error})")
        if bad and self.on_bad_image == "error":
            raise InputError(f"images that do not decode: {name_list(bad)}; mend them, or --data.on_bad_image skip")
        return {"images": torch.from_numpy(images), "paths": paths}
