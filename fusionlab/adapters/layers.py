"""Factors by the names and shapes that PEFT gives them in a layer: linear, embedding or convolution."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusionlab.adapters.factors import Factors, Layout
from fusionlab.adapters.fused_attention import STORED_OUT
from fusionlab.adapters.refusals import MERGE, check_names
from fusionlab.errors import InputError

PREFIX = "base_model.model."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PART = re.compile(
    r"^(?P<module>.+)\.lora_(?:(?P<part>[AB])\.(?:[^.]+\.)?weight|embedding_(?P<of_embedding>[AB])(?:\.[^.]+)?)$"
)


def in_peft_shapes(factors: Factors) -> dict[str, Tensor]:
    """A and B by what PEFT calls them in a layer of this kind, in the shapes that they have there."""
    if factors.layout == "embedding":
        return {"lora_embedding_A": factors.lora_a, "lora_embedding_B": factors.lora_b}
    lora_a, lora_b = factors.lora_a, factors.lora_b
    if factors.layout == "convolution":
        lora_a = lora_a.reshape(factors.rank, -1, *factors.kernel)
        lora_b = lora_b.reshape(*lora_b.shape, *(1 for _ in factors.kernel))
    return {"lora_A.weight": lora_a, "lora_B.weight": lora_b}


def pair_up(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Factors]:
    """Factors by module from PEFT's names of A and B, with ranks and alphas by the configuration.

    A layer that is stored transposed (Conv1D) is not told from a linear one: that is known by the base alone.

    Args:
        tensors: of an adapter file.
        config: its ``adapter_config.json``.
        where: the folder, for messages.

    Raises:
        InputError: no such tensors, others beside them, or shapes that fit neither each other nor the configuration.
    """
    check_names([name for name in tensors if not _PART.match(name)], where)
    parts: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PART.match(name.removeprefix(PREFIX))
        assert match is not None
        is_embedding = match["part"] is None
        parts.setdefault((match["module"], is_embedding), {})[match["part"] or match["of_embedding"]] = tensor
    if not parts:
        raise InputError(f"the adapter {where!r} has no lora_A and lora_B weights")
    if config.get("ensure_weight_tying") and any(is_embedding for _, is_embedding in parts):
        raise InputError(
            f"the adapter {where!r} has ensure_weight_tying=True: what it changes in an embedding, it changes in what "
            f"is tied to it; {MERGE}"
        )
    check_names([f"{module}.lora_embedding_" for module, of in parts if of and (module, False) in parts], where)
    factors = {}
    for (module, is_embedding), pair in parts.items():
        kinds = {part: f"{tuple(tensor.shape)} {tensor.dtype}" for part, tensor in pair.items()}
        dims = {tensor.dim() for tensor in pair.values()}
        is_pair = set(pair) == {"A", "B"} and len(dims) == 1 and all(part.dtype in _FLOATS for part in pair.values())
        if not is_pair or not (dims == {2} or (dims <= {3, 4, 5} and not is_embedding)):
            raise InputError(f"{module} in {where!r}: expected matrices lora_A and lora_B, got {kinds}")
        rank, lora_alpha = (_configured(config, module, *names) for names in (("rank", "r"), ("alpha", "lora_alpha")))
        lora_a, lora_b, kernel = pair["A"], pair["B"], tuple(pair["A"].shape[2:])
        if (lora_a.shape[0], lora_b.shape[1]) != (rank, rank):
            hint = "; a convolution in groups is no B·A of its weight" if kernel and lora_a.shape[0] == rank else ""
            raise InputError(
                f"{module} in {where!r}: the configuration says rank {rank}, the factors have "
                f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}{hint}"
            )
        if set(lora_b.shape[2:]) - {1}:
            raise InputError(f"{module} in {where!r}: expected a pointwise lora_B, got {kinds}")
        layout: Layout = "embedding" if is_embedding else "convolution" if kernel else "linear"
        factors[module] = Factors(
            lora_a.flatten(1),
            lora_b.flatten(1),
            lora_alpha,
            bool(config.get("use_rslora", False)),
            layout=layout,
            kernel=kernel,
        )
    return factors


def _configured(config: Mapping[str, Any], module: str, pattern: str, field: str) -> Any:
    """The rank or alpha of ``module``, by PEFT's matching of patterns."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(f"{pattern}_pattern") or {}
    module = module.removesuffix(f".{STORED_OUT}")  # PEFT gives fused attention's parts one rank and alpha
    return patterns.get(get_pattern_key(list(patterns), module), config.get(field, 8))
