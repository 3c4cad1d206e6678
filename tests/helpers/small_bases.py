"""Small bases in their libraries' own formats."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel


def write_small_bases(root: Path) -> dict[str, Path]:
    """A small open_clip model and a small ViT in folders below ``root``."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 4, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (root / "open_clip").mkdir()
    (root / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    clip = open_clip.CLIP(**json.loads(json.dumps(config)))
    save_file(clip.state_dict(), root / "open_clip" / "open_clip_model.safetensors")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "vit")
    return {"open_clip": root / "open_clip", "vit": root / "vit"}
