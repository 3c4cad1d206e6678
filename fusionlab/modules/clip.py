"""CLIP image classification against zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from fusionlab.adapters import hash_initial
from fusionlab.backbones import ClipBackbone
from fusionlab.backbones.prompts import prompts_of
from fusionlab.keys import key_of
from fusionlab.modules.images import ImageClassifier


class ClipModule(ImageClassifier):
    """Fine-tunes CLIP's image tower; the text tower and the zero-shot heads that it gives stay frozen.

    Args:
        backbone: an embedded name, a local folder or a hub id of a CLIP; ``tiny-clip`` by default.
        arguments: method, rank and the others of :class:`~fusionlab.modules.base.FusionModule`.
    """

    backbone: ClipBackbone
    default_backbone = "tiny-clip"
    default_learning_rates: ClassVar[dict[str, float]] = {
        "lora": 3e-3, "l_lora": 1e-2, "tangent_lora": 1e-2, "tangent": 1e-4, "full": 1e-4,
    }  # fmt: skip

    def __init__(self, backbone: str | None = None, **arguments: Any) -> None:
        super().__init__(backbone, **arguments)
        self.heads: dict[str, Tensor] = {}
        self._prompts: dict[str, str] = {}
        self._read: dict[tuple[tuple[str, ...], ...], str] = {}
        self._head_keys: dict[str, str] = {}
        self.class_names = {}

    def setup(self, stage: str) -> None:
        """Refuse classes that the text tower cannot tell apart before anything is written; then as every module.

        Raises:
            InputError: the prompts of two classes are one, by themselves or since they are cut.
        """
        for name, task in self.trainer.datamodule.tasks.items():
            self.backbone.check_prompts(task.class_names, task.templates, name)
        super().setup(stage)

    def prepare_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Build each task's zero-shot head: unit rows, shape ``(num_classes, dim)``, on this device.

        One that is there already stays where prompts and text tower are those that it was built with.
        """
        tower = self._text_tower() if tasks else ""
        for name, task in tasks.items():
            self.class_names[name] = task.class_names
            self._prompts[name] = self._read_prompts(task)
            key = key_of({"prompts": self._prompts[name], "tower": tower})
            if self._head_keys.get(name) != key:
                self.heads[name] = self.backbone.zero_shot_head(task.class_names, task.templates, name)
                self._head_keys[name] = key
            self.heads[name] = self.heads[name].to(self.device)

    def task_settings(self, task: str) -> dict[str, Any]:
        """Metric, and the prompts of the classes in label order."""
        return {"metric": "accuracy", "prompts": self._prompts[task]}

    def _read_prompts(self, task: Any) -> str:
        """Key of the prompts as the text tower reads them, class by class; found once for the same prompts."""
        said = tuple(task.class_names), tuple(task.templates)
        if said not in self._read:
            read, _ = self.backbone.tokens(prompts_of(*said))
            self._read[said] = key_of({"tokens": read, "classes": len(said[0])})
        return self._read[said]

    def _text_tower(self) -> str:
        """Hash of all weights but those of the image tower."""
        own = {name: value for name, value in self.base_model.state_dict().items() if value.is_floating_point()}
        scopes = tuple(f"{scope}." for scope in self.backbone.full_scopes)
        return hash_initial({name: (value, None) for name, value in own.items() if not name.startswith(scopes)})

    def logits(self, task: str, images: Tensor) -> Tensor:
        """Temperature times cosine of image and class, shape ``(batch, num_classes)``, in float32."""
        features = self.features(images)
        with self.full_precision():
            return (
                self.backbone.logit_scale.to(features) * F.normalize(features, dim=-1) @ self.heads[task].to(features).T
            )
