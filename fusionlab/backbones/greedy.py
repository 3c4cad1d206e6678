"""Greedy answers of a causal language model: at every step the most likely token, whatever the model's defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusionlab.backbones.choice import lowest_argmax

Output: TypeAlias = Callable[[Callable[[], Tensor]], Tensor]


def plain(call: Callable[[], Tensor]) -> Tensor:
    """Logits as the network itself computes them."""
    return call()


@torch.no_grad()
def greedy(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    end_ids: Sequence[int],
    output: Output,
    *,
    cached: bool,
) -> list[list[int]]:
    """The answers; arguments and result as of :meth:`~fusionlab.backbones.causal.CausalBackbone.generate`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cached else None
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    inputs, mask = prompt_ids, prompt_mask
    ended = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    ends = torch.tensor(list(end_ids), device=inputs.device)
    chosen = []
    for _ in range(max_new_tokens):
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        call = partial(
            model,
            input_ids=inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=cached,
            logits_to_keep=1,
            **{cache_name: cache},
        )
        token = lowest_argmax(output(lambda call=call: call().logits)[:, -1])
        chosen.append(token)
        ended |= torch.isin(token, ends)
        if ended.all():
            break
        inputs = token[:, None] if cached else torch.cat([inputs, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [_before_end(row, set(end_ids)) for row in torch.stack(chosen, dim=1).tolist()]


def _before_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:first])
