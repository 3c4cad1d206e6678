"""Greedy answers of networks that carry a state along, or take no positions, are those of each prompt alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionlab.backbones.causal import CausalBackbone
from fusionlab.errors import InputError

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 4, "num_hidden_layers": 2}),
    "rwkv": ("Rwkv", {"num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 64}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "lru_width": 16,
            "attention_window_size": 64,
        },
    ),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 2}),
}
PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47], [60, 61], [70, 71, 72, 73, 74]]


def backbone_of(kind: str, tokenizer: Any) -> CausalBackbone:
    import transformers

    name, arguments = NETWORKS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=16, bos_token_id=0, eos_token_id=2, pad_token_id=1, **arguments
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return CausalBackbone(model, tokenizer, name=kind)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("kind", "way"), [("mamba", "together"), ("rwkv", "alone"), ("recurrent_gemma", "alone"), ("bloom", "cached")]
)
def test_answers_are_those_of_each_prompt_alone(tokenizer: Any, kind: str, way: str, cached: bool) -> None:
    backbone = backbone_of(kind, tokenizer)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.arange(longest) >= longest - torch.tensor([len(prompt) for prompt in PROMPTS])[:, None]
    found = backbone.generate(ids, mask, 8, (2,), cached=cached)
    assert backbone._way == way
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token in [*answer, *([2] if len(answer) < 8 else [])]:
            with torch.no_grad():
                logits = backbone.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4, "not the most likely token"
            tokens.append(token)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_networks_of_attention_alone_are_not_tried(causal_folder: Callable[[str], Path], kind: str) -> None:
    backbone = CausalBackbone.load(str(causal_folder(kind)), name=kind)
    forward, calls = backbone.model.forward, []

    @functools.wraps(forward)
    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(more)
        return forward(*arguments, **more)

    backbone.model.forward = counted
    backbone.generate(torch.tensor([[40, 41]]), torch.ones(1, 2, dtype=torch.bool), 1, (2,))
    assert len(calls) == 1
    assert backbone._way == "cached"


def test_packing_that_a_network_cannot_be_asked_for_is_refused(tokenizer: Any) -> None:
    backbone = backbone_of("bloom", tokenizer)

    def odd(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **more: Any) -> Any:
        raise RuntimeError("the size of tensor a must match that of tensor b")

    backbone.model.forward = odd
    with pytest.raises(InputError, match="does not keep samples of one row apart"):
        backbone.check_packing(64)
