"""CLIP in transformers' format: image features, text features and the zero-shot head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.backbones.quiet import UNREADABLE, quiet
from fusionlab.errors import InputError, name_list

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipBackbone(nn.Module):
    """A frozen ``CLIPModel`` with its tokenizer and its own pixel normalisation.

    Args:
        model: transformers' ``CLIPModel``.
        tokenizer: the matching tokenizer.
        name: what the user called the model; it goes into adapters and result rows.
        mean: pixel mean per channel, for pixels in 0..1.
        std: pixel standard deviation per channel.
    """

    scope = "vision_model"
    full_scopes = ("vision_model", "visual_projection")
    default_target_modules = ("q_proj", "v_proj")

    def __init__(
        self,
        model: nn.Module,
        tokenizer: object,
        *,
        name: str,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.image_size = int(model.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, source: str, *, name: str) -> ClipBackbone:
        """Load from a local folder or a hub id, in float32.

        Raises:
            InputError: the folder lacks weights or tokenizer files, or they cannot be read.
        """
        from transformers import AutoTokenizer, CLIPModel

        try:
            with quiet():
                model, info = CLIPModel.from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
                )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except UNREADABLE as error:
            raise InputError(f"the CLIP model {name!r} could not be loaded: {error}") from error
        if missing := info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}:
            raise InputError(
                f"the CLIP model {name!r} lacks weights, or has them in other shapes than its config.json says: "
                f"{name_list(sorted(missing))}; give a complete one"
            )
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise InputError(
                f"the CLIP model {name!r} has no tokenizer files; put its tokenizer.json beside config.json"
            )
        return cls(model, tokenizer, name=name, **normalisation(source))

    @property
    def encoder(self) -> nn.Module:
        """The part that is adapted and fused: the image tower."""
        return self.model.vision_model

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned temperature, a scalar."""
        return self.model.logit_scale.exp()

    def image_features(self, images: Tensor) -> Tensor:
        """Unnormalised image features.

        Args:
            images: uint8, shape ``(batch, 3, image_size, image_size)``.

        Returns:
            shape ``(batch, dim)``.
        """
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Normalised text features, shape ``(len(texts), dim)``."""
        length = self.model.config.text_config.max_position_embeddings
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.mean.device)
            pooled = self.model.text_model(**tokens).pooler_output
            rows.append(F.normalize(self.model.text_projection(pooled), dim=-1))
        return torch.cat(rows)

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside weights in this layout: configuration, tokenizer and pixel normalisation."""
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        normalisation = {f"image_{name}": getattr(self, name).flatten().tolist() for name in ("mean", "std")}
        size = {"size": {"shortest_edge": self.image_size}, "crop_size": self.image_size}
        processor = {"image_processor_type": "CLIPImageProcessor", **size, **normalisation}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """One unit row a class: the mean of its normalised prompt features, normalised again.

        Args:
            class_names: the classes, in label order.
            templates: prompts with one ``{}`` each.

        Returns:
            float32, shape ``(num_classes, dim)``.

        Source: Radford et al. 2021, section 3.1.4.
        """
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        with torch.autocast(self.mean.device.type, enabled=False):
            features = self.text_features(prompts).view(len(class_names), len(templates), -1)
        return F.normalize(features.mean(dim=1), dim=-1)


def normalisation(source: str) -> dict[str, Sequence[float]]:
    """The model's own pixel mean and std, from its preprocessor config; empty where it has none."""
    path = Path(source) / "preprocessor_config.json"
    if not path.is_file():
        from transformers.utils import cached_file

        found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        if found is None:
            return {}
        path = Path(found)
    config = json.loads(path.read_text())
    return {key: config[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in config}
