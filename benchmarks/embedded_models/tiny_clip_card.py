"""Measures tiny-clip's zero-shot accuracy and writes its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fusionlab.backbones.clip import ClipBackbone
from fusionlab.data.drawing import DRAWN_TASKS

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# tiny-clip

A real, small CLIP for tests, demonstrations and laptops: 32-pixel images, patches of 8, an image tower of
{vision_layers} layers of width {vision_width}, a text tower of {text_layers} layers of width {text_width},
{parameters:,} parameters in float32 ({size:.1f} MB). It is not meant for use on real problems.

## How it was made
From random weights, in {minutes:.0f} minutes on one busy CPU core ({steps} steps, seed {seed}), by

    python benchmarks/embedded_models/make_tiny_clip.py --cifar100 PATH --cifar10 PATH --output DIR \\
        --steps {steps} --learning_rate {learning_rate:g} --seed {seed} --threads 1

Contrastive image-text training; all images of one caption are its positives. Each batch holds 64 real photos (of the
30,000 in a copy of CIFAR-100's training split, captions such as "a photo of a whale.") and 96 drawings made on the
spot (digits and letters in a printed typeface, flat traffic signs, bold textures, rows of equal things, single and
coloured shapes, clean icons). The embedded tasks draw the same concepts in harder styles, as filmed off an interlaced
screen; none of their images was used. The tokenizer is CLIP's byte-level one with {tokens} tokens learned from the
captions; the context length is {context}.

## Zero-shot accuracy on test splits
Class names and templates of each task; `chance` is one over the number of classes.

| task | classes | chance | accuracy |
|---|---|---|---|
{rows}

## Licence
The weights are released under the Apache License 2.0, like the package. CIFAR-100 (Krizhevsky, 2009), from which they
were trained, keeps its own terms; none of its images is contained here.
"""
PHOTO_TEMPLATES = ("a photo of a {}.", "a picture of a {}.")


@torch.no_grad()
def zero_shot_accuracy(
    backbone: ClipBackbone, images: Tensor, labels: Tensor, class_names: Sequence[str], templates: Sequence[str]
) -> float:
    """Fraction of uint8 images ``(n, 3, 32, 32)`` whose nearest class text is their label."""
    head = backbone.zero_shot_head(class_names, templates)
    features = torch.cat([backbone.image_features(part) for part in images.split(200)])
    return (F.normalize(features, dim=-1) @ head.T).argmax(dim=1).eq(labels).double().mean().item()


def write_card(
    folder: Path,
    *,
    minutes: float,
    steps: int,
    learning_rate: float,
    seed: int,
    photos: Mapping[str, tuple[Tensor, Tensor, list[str]]],
) -> None:
    """Writes ``README.md`` beside the weights, with what was measured on the embedded tasks and on ``photos``."""
    backbone = ClipBackbone.load(str(folder), name="tiny-clip")
    rows = []
    for name, task in DRAWN_TASKS.items():
        images, labels = task.draw("test")
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        value = zero_shot_accuracy(backbone, pixels, torch.from_numpy(labels), task.class_names, task.templates)
        rows.append((name, len(task.class_names), value))
    for name, (images, labels, class_names) in photos.items():
        value = zero_shot_accuracy(backbone, images, labels, class_names, PHOTO_TEMPLATES)
        rows.append((name, len(class_names), value))
    text, vision = backbone.model.config.text_config, backbone.model.config.vision_config
    card = CARD.format(
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        parameters=sum(p.numel() for p in backbone.model.parameters()),
        size=(folder / "model.safetensors").stat().st_size / 1e6,
        minutes=minutes,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        tokens=text.vocab_size,
        context=text.max_position_embeddings,
        rows="\n".join(f"| {name} | {classes} | {1 / classes:.3f} | {value:.3f} |" for name, classes, value in rows),
    )
    (folder / "README.md").write_text(card)
    print(card[card.index("| task") : card.index("## Licence")])
