"""Vision transformers: transformers' ViT and timm's, as features of an image; the supervised heads are the module's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionlab.backbones.images import ImageBackbone
from fusionlab.backbones.preprocessing import HALF, Preprocessing, of_timm, of_transformers, processor_files
from fusionlab.backbones.quiet import UNREADABLE, quiet, reason_of
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.tensors.hub_refusals import hub_refusal

TIMM, FROM_CONFIG = "timm:", "config:"


class ViTBackbone(ImageBackbone):
    """A frozen ViT whose features are its class token after the last norm.

    Args:
        model: transformers' ``ViTModel`` or ``ViTForImageClassification``.
        name: what the user called the model; it goes into adapters and result rows.
        preprocessing: how images are processed; squashed by a bilinear filter by default, as transformers does.
        processor_files: the checkpoint's own files about that, by name, to lie beside exported weights.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        preprocessing: Preprocessing | None = None,
        processor_files: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.num_features = int(model.config.hidden_size)
        size = int(model.config.image_size)
        own = Preprocessing(size, resize="squash", resample=2, crop=False, crop_rounds="down", mean=HALF, std=HALF)
        self.preprocess_by(preprocessing or own)
        self.processor_files = processor_files or {}
        inner = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
        self.scope = inner
        # what the class token depends on: not a pooler, a mask token or a classifier of the checkpoint's own
        parts = [part for part, _ in self.encoder.named_children() if part != "pooler"]
        self.full_scopes = tuple(f"{inner}.{part}" if inner else part for part in parts)
        leaves = {name.rpartition(".")[2] for name, part in self.encoder.named_modules() if isinstance(part, nn.Linear)}
        self.default_target_modules = ("q_proj", "v_proj") if "q_proj" in leaves else ("query", "value")

    @classmethod
    def load(cls, source: str, *, name: str) -> ViTBackbone:
        """Load in float32, by the class that the checkpoint says it was saved from.

        Args:
            source: folder or hub id.
            name: what the user called it.

        Raises:
            InputError: weights are missing.
        """
        from transformers import ViTConfig, ViTForImageClassification, ViTModel

        try:
            config = ViTConfig.from_pretrained(source)
            classifies = any("ForImageClassification" in each for each in config.architectures or ())
            model_class = ViTForImageClassification if classifies else ViTModel
            with quiet():
                model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
                missing = set(info["missing_keys"])
                if not classifies and missing and all(key.startswith("pooler.") for key in missing):
                    model, missing = ViTModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False), ()
        except UNREADABLE as error:
            raise InputError(f"the ViT model {name!r} could not be loaded: {reason_of(error)}") from error
        if missing:
            raise InputError(f"the ViT model {name!r} lacks weights: {name_list(sorted(missing))}; give a complete one")
        preprocessing = of_transformers(source, "ViT", int(config.image_size))
        return cls(model, name=name, preprocessing=preprocessing, processor_files=processor_files(source))

    @classmethod
    def from_config(cls, path: str, *, name: str, seed: int = 0) -> ViTBackbone:
        """Random weights, seeded, by a ``config.json`` or the folder that has one: to train from scratch.

        Raises:
            InputError: no such file, or no ViT's configuration.
        """
        from transformers import ViTConfig, ViTModel

        file = Path(path).expanduser()
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise InputError(f"no configuration {str(file)!r} for {name!r}; give a config.json or a folder with one")
        values = json.loads(file.read_text())
        if values.get("model_type", "vit") != "vit":
            raise InputError(f"{str(file)!r} is for a {values['model_type']!r}; expected a 'vit'")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ViTModel(ViTConfig(**values), add_pooling_layer=False)
        return cls(model, name=name)

    @property
    def encoder(self) -> Any:
        """The part that is adapted and fused."""
        return self.model.base_model

    def image_features(self, images: Tensor) -> Tensor:
        """The class token after the last norm.

        Args:
            images: uint8, shape ``(batch, 3, image_size, image_size)``.

        Returns:
            shape ``(batch, num_features)``.
        """
        return self.encoder(pixel_values=self.pixel_values(images)).last_hidden_state[:, 0]

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside weights in this layout: configuration and image processor."""
        config = self.model.config.to_diff_dict() | {"architectures": [type(self.model).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.save_processor(folder, "ViT")


class TimmBackbone(ImageBackbone):
    """A frozen image model of timm without its classifier; features are what its own pooling gives.

    Args:
        model: made with ``num_classes=0``.
        name: what the user called the model.
        model_args: what else ``timm.create_model`` was given, so that an exported folder is made the same way.
    """

    scope = ""

    def __init__(self, model: Any, *, name: str, model_args: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.name, self.model_args = name, dict(model_args or {})
        config = model.pretrained_cfg
        self.num_features = int(model.num_features)
        size = int(model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else config["input_size"][-1])
        self.preprocess_by(of_timm(config, size, name))
        linears = {part.rpartition(".")[2] for part, each in model.named_modules() if isinstance(each, nn.Linear)}
        known = [names for names in (("qkv",), ("q_proj", "v_proj"), ("query", "value")) if linears >= set(names)]
        if not known:
            raise InputError(
                f"{name!r} has no attention whose q and v are linear layers; its linear layers: {name_list(linears)}. "
                f"Choose a vision transformer"
            )
        self.default_target_modules = known[0]
        self.full_scopes = ("",)

    @classmethod
    def load(cls, source: str, *, name: str) -> TimmBackbone:
        """Load in float32.

        Args:
            source: an architecture, whose pretrained weights are downloaded, or a folder in timm's layout.
            name: what the user called it.

        Raises:
            InputError: no such architecture or folder, or the weights could not be had.
        """
        import timm

        folder = Path(source).expanduser()
        if not folder.is_dir() and not timm.is_model(source):
            raise InputError(f"timm has no model {source!r}; {did_you_mean(source, timm.list_models())[:400]}")
        try:
            config = json.loads((folder / "config.json").read_text()) if folder.is_dir() else {}
            called = f"local-dir:{folder}" if folder.is_dir() else source
            model = timm.create_model(called, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            reason = hub_refusal(error) or str(error)[:500]
            raise InputError(f"the timm model {name!r} could not be loaded: {reason}") from error
        return cls(model, name=name, model_args=config.get("model_args"))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features beside weights and images."""
        network = {"architecture": self.model.pretrained_cfg.get("architecture"), "model_args": self.model_args}
        return {"network": network, "kind": "timm", "preprocessing": asdict(self.preprocessing)}

    @property
    def encoder(self) -> Any:
        """The part that is adapted and fused: the whole model."""
        return self.model

    def image_features(self, images: Tensor) -> Tensor:
        """The pooled features, ``(batch, num_features)``; images are uint8 ``(batch, 3, image_size, image_size)``."""
        return self.model(self.pixel_values(images))

    def save_files(self, folder: Path) -> None:
        """Write timm's ``config.json``, so that ``local-dir:`` loads the folder."""
        kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "pool_size", "first_conv", "classifier")
        pretrained = {key: self.model.pretrained_cfg[key] for key in kept if key in self.model.pretrained_cfg}
        config = {
            "architecture": self.model.pretrained_cfg["architecture"],
            "num_classes": 0,
            "num_features": self.num_features,
            "pretrained_cfg": {**pretrained, "input_size": [3, self.image_size, self.image_size], "num_classes": 0},
            "model_args": self.model_args,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
