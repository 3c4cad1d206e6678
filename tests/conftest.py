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


@pytest.fixture(scope="session")
def task_matrices() -> Callable[..., list[torch.Tensor]]:
    """Task matrices of a named structure, float64, ``(rows, columns)`` each.

    ``full``: of full rank. ``low rank``: B A of rank 3 with everything drawn anew. ``equal A``, ``equal B``: one factor
    shared. ``A apart by X``: A of a task is the shared one plus X times one of its own. ``one zero``, ``all zero``,
    ``one task``, ``twice`` (the first task again at the end), ``vectors`` (rank 1).
    """

    def make(kind: str, rows: int = 36, columns: int = 28, num_tasks: int = 4, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        num_tasks = 1 if kind == "one task" else num_tasks
        if kind == "full":
            return [0.1 * (task + 1) * draw(rows, columns) for task in range(num_tasks)]
        rank = 1 if kind == "vectors" else 3
        shared_a, shared_b = draw(rank, columns), draw(rows, rank)
        found = []
        for task in range(num_tasks):
            own_a, own_b = draw(rank, columns), draw(rows, rank)
            if kind.startswith("A apart by "):
                own_a = shared_a + float(kind.removeprefix("A apart by ")) * own_a
            own_a = shared_a if kind == "equal A" else own_a
            own_b = shared_b if kind == "equal B" else own_b
            found.append(0.05 * (task + 1) * own_b @ own_a)
        if kind == "twice":
            found[-1] = found[0].clone()
        if kind in ("one zero", "all zero"):
            found = [0.0 * each if kind == "all zero" or task == 1 else each for task, each in enumerate(found)]
        return found

    return make
