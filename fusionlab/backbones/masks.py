"""What sees what in a row of a language model, and the masks that say so to transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def visible_within(position_ids: Tensor) -> Tensor:
    """What sees what in rows of samples each of which begins at position 0: bool, shape ``(batch, len, len)``.

    Example:
        >>> visible_within(torch.tensor([[0, 1, 0]])).int()
        tensor([[[1, 0, 0],
                 [1, 1, 0],
                 [0, 0, 1]]], dtype=torch.int32)
    """
    sample = (position_ids == 0).cumsum(1)
    return (sample[:, :, None] == sample[:, None, :]).tril()


def additive_masks(model: Any, visible: Tensor, positions: Tensor) -> Any:
    """Additive masks for every kind of layer of a model of transformers'; a boolean one is misread by eager attention.

    Args:
        model: whose configuration says which layers see a window, or their own chunk of the text, only.
        visible: what sees what, bool, shape ``(batch, len, len)``.
        positions: int64, shape ``(batch, len)``, which a window counts by.

    Returns:
        shape ``(batch, 1, len, len)``; by kind of layer where there are several.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    distance = positions[:, :, None] - positions[:, None, :]
    near = visible if window is None else visible & (distance < window)
    chunk = getattr(config, "attention_chunk_size", None)
    part = positions // chunk if chunk else torch.zeros_like(positions)
    chunked = visible & (part[:, :, None] == part[:, None, :])
    dtype = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(visible.device.type):
        dtype = torch.get_autocast_dtype(visible.device.type)
    seen = {"full_attention": visible, "sliding_attention": near, "chunked_attention": chunked}
    if len(kinds) > 1:
        return {kind: _additive(seen.get(kind, visible), dtype) for kind in kinds}
    return _additive(seen.get(*kinds, near) if kinds else near, dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
