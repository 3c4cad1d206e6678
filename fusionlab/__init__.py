"""fusionlab: fine-tune on many tasks, fuse the task vectors into one model, evaluate it exactly.

Public names are handed out lazily: ``import fusionlab`` imports neither torch nor lightning.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Adapter": "fusionlab.adapters",
    "CausalModule": "fusionlab.modules",
    "ChatTasks": "fusionlab.data",
    "ClipModule": "fusionlab.modules",
    "FusionCallback": "fusionlab.callbacks",
    "ImageTasks": "fusionlab.data",
    "InputError": "fusionlab.errors",
    "T5Module": "fusionlab.modules",
    "TextTasks": "fusionlab.data",
    "ViTModule": "fusionlab.modules",
    "evaluate": "fusionlab.evaluation.scores",
    "fuse": "fusionlab.fusion.python",
    "fuse_checkpoints": "fusionlab.commands.fuse.command",
    "load": "fusionlab.runs.loading",
    "load_backbone": "fusionlab.backbones",
    "rules": "fusionlab.rules",
    "sweep": "fusionlab.commands.sweep.command",
    "task_vector": "fusionlab.tensors.state",
    "weights_of": "fusionlab.fusion.by_task",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fusionlab' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__ == f"fusionlab.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
