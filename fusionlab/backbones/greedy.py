"""Greedy answers of a causal language model: at every step the most likely token, whatever the model's defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fusionlab.backbones.choice import lowest_argmax
from fusionlab.backbones.trying import tried
from fusionlab.errors import InputError

Output: TypeAlias = Callable[[Callable[[], Tensor]], Tensor]
Reading: TypeAlias = Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]]
Way = Literal["cached", "together", "alone"]
"""How prompts are answered: side by side with what was read kept, side by side anew each time, one after another."""
_TRIED = ((3, 24), (11, 9))  # first token and length of the prompts that are tried
_STEPS = 4
_EXACT = 1e-3  # log-likelihoods of a way may differ by so much from those of each prompt alone


def plain(call: Callable[[], Tensor]) -> Tensor:
    """Logits as the network itself computes them."""
    return call()


def find_ends(defaults: Any, tokenizer: Any, name: str, more: Sequence[int] = ()) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, those of the model's defaults, and ``more``, each once.

    Args:
        defaults: the model's ``generation_config``, or None.
        tokenizer: the matching tokenizer.
        name: of the model.
        more: further tokens.

    Raises:
        InputError: the defaults name something else than tokens by their ids.
    """
    own = getattr(defaults, "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    if any(not isinstance(end, int | None) for end in listed):
        raise InputError(
            f"the generation_config.json of {name!r} has eos_token_id {own!r}; expected the id of a token, or a list "
            f"of ids"
        )
    return tuple(dict.fromkeys(end for end in (tokenizer.eos_token_id, *listed, *more) if end is not None))


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
) -> list[list[int] | None]:
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
        token = token.clamp(min=0)  # where the logits are NaN, which is no answer
        ended |= torch.isin(token, ends) | (chosen[-1] < 0)
        if ended.all():
            break
        inputs = token[:, None] if cached else torch.cat([inputs, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [_before_end(row, set(end_ids)) for row in torch.stack(chosen, dim=1).tolist()]


@torch.no_grad()
def find_way(model: Any, vocabulary: int, reading: Reading) -> Way:
    """The fastest way that is exact, found by trying where a network carries a state along or takes no positions.

    Args:
        model: of transformers', in evaluation mode.
        vocabulary: ids that it has.
        reading: within which prompts are read, whose mask it is given.
    """
    names = inspect.signature(model.forward).parameters.keys()
    if not getattr(model, "_is_stateful", False) and "position_ids" in names and names & {"cache", "past_key_values"}:
        return "cached"
    device = model.get_input_embeddings().weight.device
    prompts = [torch.arange(start, start + size, device=device).remainder(vocabulary) for start, size in _TRIED]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    whole = torch.ones_like(ids, dtype=torch.bool)
    alone = torch.cat(
        [_steps(model, prompt[None], whole[:1, : len(prompt)], reading, cached=False) for prompt in prompts]
    )
    for way in ("cached", "together"):
        steps = tried(partial(_steps, model, ids, mask, reading, cached=way == "cached"))
        rounding = 16 * torch.finfo(model.dtype).eps * float(alone.abs().max())
        bound = max(_EXACT, rounding if model.dtype != torch.float32 else 0)
        if steps is not None and (steps - alone).abs().max() < bound:
            return way
    return "alone"


def _steps(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    reading: Reading,
    *,
    cached: bool,
) -> Tensor:
    """log p of every token at the first steps of the answers, shape ``(batch, steps, vocab)``."""
    seen: list[Tensor] = []

    def output(call: Callable[[], Tensor]) -> Tensor:
        seen.append(call())
        return seen[-1]

    with reading({"": prompt_mask}):
        greedy(model, prompt_ids, prompt_mask, _STEPS, (-1,), output, cached=cached)
    found = [logits[:, -1].float().log_softmax(-1) for logits in seen]
    found += [torch.full_like(found[-1], torch.nan)] * (_STEPS - len(found))  # answers end where logits are NaN
    return torch.stack(found, dim=1)


def _before_end(tokens: Sequence[int], ends: set[int]) -> list[int] | None:
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return None if -1 in tokens[:first] else list(tokens[:first])
