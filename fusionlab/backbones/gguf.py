"""Models in a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError

GGUF = ".gguf"


def dequantized(file: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a GGUF file.

    Raises:
        InputError: what reads such files is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file!r} is a GGUF file, which needs gguf: install fusionlab[gguf]")
    from transformers import GgufConfig

    path = Path(file)
    config = GgufConfig(dequantize=True)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "quantization_config": config}
