"""CLIP in transformers' format: image features, text features and the zero-shot head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.backbones.images import ImageBackbone
from fusionlab.backbones.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing, of_transformers, processor_files
from fusionlab.backbones.prompts import check_prompts, check_rows, prompts_of
from fusionlab.backbones.quiet import UNREADABLE, quiet, reason_of
from fusionlab.errors import InputError, name_list


class ClipBackbone(ImageBackbone):
    """A frozen ``CLIPModel`` with its tokenizer and its own image processing.

    Args:
        model: transformers' ``CLIPModel``.
        tokenizer: the matching tokenizer.
        name: what the user called the model; it goes into adapters and result rows.
        mean: pixel mean per channel, for pixels in 0..1, where no ``preprocessing`` is given.
        std: pixel standard deviation per channel.
        preprocessing: how images are processed; CLIP's own way by default.
        processor_files: the checkpoint's own files about that, by name, to lie beside exported weights.
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
        preprocessing: Preprocessing | None = None,
        processor_files: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        own = Preprocessing(int(model.config.vision_config.image_size), crop_rounds="down")
        self.preprocess_by(preprocessing or replace(own, mean=tuple(mean), std=tuple(std)))
        self.processor_files = processor_files or {}
        self._checked_prompts: set[tuple[Any, ...]] = set()

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
            raise InputError(f"the CLIP model {name!r} could not be loaded: {reason_of(error)}") from error
        if missing := info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}:
            raise InputError(
                f"the CLIP model {name!r} lacks weights, or has them in other shapes than its config.json says: "
                f"{name_list(sorted(missing))}; give a complete one"
            )
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise InputError(
                f"the CLIP model {name!r} has no tokenizer files; put its tokenizer.json beside config.json"
            )
        size = int(model.config.vision_config.image_size)
        preprocessing = of_transformers(source, "CLIP", size)
        return cls(model, tokenizer, name=name, preprocessing=preprocessing, processor_files=processor_files(source))

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
        pooled = self.model.vision_model(pixel_values=self.pixel_values(images)).pooler_output
        return self.model.visual_projection(pooled)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Normalised text features, shape ``(len(texts), dim)``."""
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.max_text_tokens,
                return_tensors="pt",
            ).to(self.mean.device)
            pooled = self.model.text_model(**tokens).pooler_output
            rows.append(F.normalize(self.model.text_projection(pooled), dim=-1))
        return torch.cat(rows)

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside weights in this layout: configuration, tokenizer and image processor."""
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_processor(folder, "CLIP")

    def tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each text as the text tower reads them, and whether the text has more than it reads."""
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        read = self.tokenizer(list(texts), truncation=True, max_length=self.max_text_tokens)["input_ids"]
        return read, [len(tokens) > self.max_text_tokens for tokens in whole]

    @property
    def max_text_tokens(self) -> int:
        """Tokens of a text that the text tower reads."""
        return int(self.model.config.text_config.max_position_embeddings)

    def check_prompts(self, class_names: Sequence[str], templates: Sequence[str], task: str | None = None) -> None:
        """Raise if two classes have one row of the head; prompts that are cut are logged, once.

        Raises:
            InputError: the prompts of two classes are the same tokens, by themselves or since they are cut.
        """
        if (key := (tuple(class_names), tuple(templates), task)) not in self._checked_prompts:
            prompts = prompts_of(class_names, templates)
            check_prompts(class_names, prompts, *self.tokens(prompts), self.max_text_tokens, task)
            self._checked_prompts.add(key)

    def zero_shot_head(self, class_names: Sequence[str], templates: Sequence[str], task: str | None = None) -> Tensor:
        """One unit row a class: the mean of its normalised prompt features, normalised again.

        Args:
            class_names: the classes, in label order.
            templates: prompts with one ``{}`` each.
            task: name of the task, for messages.

        Returns:
            float32, shape ``(num_classes, dim)``.

        Raises:
            InputError: as :meth:`check_prompts`, or the text tower gives two classes the same features.

        Source: Radford et al. 2021, section 3.1.4.
        """
        self.check_prompts(class_names, templates, task)
        prompts = prompts_of(class_names, templates)
        with torch.autocast(self.mean.device.type, enabled=False):
            features = self.text_features(prompts).view(len(class_names), len(templates), -1)
        head = F.normalize(features.mean(dim=1), dim=-1)
        check_rows(head, class_names, task)
        return head
