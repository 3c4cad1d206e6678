"""The backbone of a module of causal language models."""

from __future__ import annotations

from torch import nn

from fusionlab.backbones import CausalBackbone, load_backbone
from fusionlab.errors import InputError


def causal_backbone(given: str | nn.Module, dtype: str) -> CausalBackbone:
    """The backbone that was given, loaded where it is a name.

    Args:
        given: name, folder, hub id or GGUF file; or a backbone.
        dtype: of the weights of one that is loaded.

    Raises:
        InputError: it cannot be loaded, or is no causal language model.
    """
    loaded = load_backbone(given, dtype=dtype) if isinstance(given, str) else given
    if not isinstance(loaded, CausalBackbone):
        raise InputError(
            f"CausalModule needs a causal language model, and {given!r} is a {type(loaded.model).__name__}; give "
            f"one such as a Llama, Qwen, Gemma or GPT-2, or use ClipModule, ViTModule or T5Module"
        )
    return loaded
