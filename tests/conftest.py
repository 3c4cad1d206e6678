"""Fixtures that several test folders share."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with a random T5 and a tokenizer of letters, digits and a few words.

    ``tied`` is as the first T5: one embedding table and a ReLU. ``untied`` is as T5 v1.1 and flan-T5: an output layer
    of its own, a gated GELU, and outputs that are not scaled.
    """
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    words = ["▁the", "▁a", "▁is", "▁sentence", "▁positive", "▁negative", "▁not", "▁good", "▁bad", "5.0", "2.5", "0.0"]
    pieces = [*words, "▁", *string.ascii_letters, *string.digits, *"._:-?"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(pieces))) for piece in pieces)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=4)
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            torch.manual_seed(0)
            config = T5Config(
                vocab_size=len(tokenizer) + 4, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                decoder_start_token_id=0, tie_word_embeddings=kind == "tied",
                feed_forward_proj="relu" if kind == "tied" else "gated-gelu",
            )  # fmt: skip
            model = T5ForConditionalGeneration(config)
            if kind == "untied":
                model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, 32))
            folders[kind] = tmp_path_factory.mktemp(f"t5-{kind}")
            model.save_pretrained(folders[kind])
            tokenizer.save_pretrained(folders[kind])
        return folders[kind]

    return folder
