"""What backbones that take images share: their preprocessing, and pixels as the values that the model takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionlab.backbones.preprocessing import PREPROCESSOR, Preprocessing
from fusionlab.backbones.settings import function_settings


class ImageBackbone(nn.Module):
    """A backbone that takes images; subclasses call :meth:`preprocess_by` once they know how."""

    preprocessing: Preprocessing
    processor_files: dict[str, str]
    loaded_from: str | None = None

    def preprocess_by(self, preprocessing: Preprocessing) -> None:
        """Take images processed so."""
        self.preprocessing, self.image_size = preprocessing, preprocessing.image_size
        for key in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, key)).view(3, 1, 1)
            self.register_buffer(key, values, persistent=False)

    def pixel_values(self, images: Tensor) -> Tensor:
        """(images / divisor - mean) / std in the dtype of the model's constants; images are uint8."""
        return (images.to(self.mean.dtype) / self.preprocessing.divisor - self.mean) / self.std

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features beside weights and images."""
        network = function_settings(self.model.config.to_dict())
        return {"network": network, "kind": type(self.model).__name__, "preprocessing": asdict(self.preprocessing)}

    def save_processor(self, folder: Path, kind: str) -> None:
        """Write the checkpoint's own files about images as they are; where it has none, one that says the same."""
        files = self.processor_files or {PREPROCESSOR: self.preprocessing.to_transformers(kind)}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
