"""Answers ranked behind prompts longer than a window, and where a network cannot take a mask of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.backbones.causal import CausalBackbone


def network(kind: str, tokenizer: Any) -> Any:
    """A small one whose layers see a window or a chunk of 8 in their own way, or take no mask of rows."""
    import transformers

    small = {"vocab_size": len(tokenizer), "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "bloom":
        model = transformers.BloomForCausalLM(transformers.BloomConfig(n_layer=1, n_head=2, **small))
    elif kind == "gpt_neo":
        small |= {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2, "window_size": 8}
        model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(max_position_embeddings=64, **small))
    else:
        small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        small |= {"intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 2, "pad_token_id": None}
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(attention_chunk_size=8, **small))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


@pytest.mark.parametrize(("kind", "together"), [("bloom", False), ("gpt_neo", False), ("llama4", True)])
def test_answers_behind_longer_prompts_than_the_first_are_those_of_each_alone(
    tokenizer: Any, kind: str, together: bool
) -> None:
    backbone = CausalBackbone(network(kind, tokenizer), tokenizer, name=kind)
    words = [(5, 6, 2), (7, 2)]
    for length in (2, 21):
        ids = torch.stack([torch.arange(30, 30 + length), torch.arange(60, 60 + length)])
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, : length // 3] = False
        with torch.no_grad():
            found = backbone.log_likelihoods(ids, mask, AnswerTree.of(words))
            for row, column in ((row, column) for row in range(2) for column in range(2)):
                prompt, word = ids[row][mask[row]].tolist(), words[column]
                logits = backbone.model(input_ids=torch.tensor([[*prompt, *word]])).logits[0].log_softmax(-1)
                own = logits[range(len(prompt) - 1, len(prompt) + len(word) - 1), list(word)]
                torch.testing.assert_close(found[row, column, : len(word)], own, rtol=1e-4, atol=1e-4)
    assert backbone._side_by_side is together
