"""T5's own sentencepiece model, where it is at hand: GLUE's label words and scores, from ``spiece.model`` alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fusionlab.evaluation.functional import parse_score
from fusionlab.modules import T5Module

SPIECE = Path(__file__).parents[2] / ".." / "shared" / "data" / "tokenizers" / "spiece.model"
pytestmark = pytest.mark.skipif(not SPIECE.is_file(), reason=f"T5's spiece.model is not at {SPIECE}")

LABEL_WORDS = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> T5Module:
    folder = tmp_path_factory.mktemp("real-tokenizer")
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    shutil.copyfile(SPIECE, folder / "spiece.model")
    return T5Module(str(folder)).eval()


@pytest.mark.parametrize("task", LABEL_WORDS)
def test_the_papers_label_words_are_scored_as_one_by_one(module: T5Module, task: str) -> None:
    backbone, words = module.backbone, LABEL_WORDS[task]
    answers = backbone.answers(words, task)
    texts = ["cola sentence: The cat sat.", "premise: A man sleeps. hypothesis: Someone is awake and well."]
    batch = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = backbone.log_likelihoods(**batch, answers=answers)
        for row, text in enumerate(texts):
            for column, word in enumerate(words):
                labels = backbone.tokenizer(word, return_tensors="pt").input_ids
                loss = backbone.model(**backbone.tokenizer(text, return_tensors="pt"), labels=labels).loss
                # a mean over 2 to 7 tokens, times their number, in float32
                torch.testing.assert_close(scores[row, column], -loss * labels.shape[1], rtol=1e-5, atol=1e-4)
    decoded = backbone.decode(backbone.tokenizer(list(words), padding=True, return_tensors="pt").input_ids)
    assert decoded == list(words)


def test_every_score_with_one_decimal_survives_the_tokenizer(module: T5Module) -> None:
    texts = [f"{tenths / 10:.1f}" for tenths in range(51)]
    labels = module.backbone.tokenizer(texts, padding=True, return_tensors="pt").input_ids
    decoded = module.backbone.decode(labels.masked_fill(labels == 0, -100))
    assert [parse_score(text) for text in decoded] == [tenths / 10 for tenths in range(51)]
    assert labels.shape[1] < module.max_new_tokens
