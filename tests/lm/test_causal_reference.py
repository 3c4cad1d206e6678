"""Losses, packing, ranking and generation against one sample at a time in float64, on tiny models of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.backbones.causal import CausalBackbone
from fusionlab.backbones.masks import additive_masks

from .conftest import ARCHITECTURES

Folder = Callable[[str], Path]
WORDS = [(5, 6, 2), (5, 2), (9, 40, 7, 2), (2,)]
PROMPTS = [[1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [1, 60], [70, 71, 72, 73, 74]]


@pytest.fixture(scope="module", params=[*ARCHITECTURES])
def backbone(request: pytest.FixtureRequest, causal_folder: Folder) -> CausalBackbone:
    return CausalBackbone.load(str(causal_folder(request.param)), name=request.param)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest, backbone: CausalBackbone) -> str:
    if backbone.name == "gemma2" and request.param == "sdpa":
        pytest.skip("transformers has no sdpa for Gemma 2, whose attention scores are capped")
    backbone.model.set_attn_implementation(request.param)
    return request.param


def alone(backbone: CausalBackbone, ids: list[int]) -> Tensor:
    """log p of every next token of one sample, float64, from a copy of the model in float64."""
    model = backbone.model.double()
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the fused kernel takes no float64
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        backbone.model.float()


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[77] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.arange(longest) >= longest - torch.tensor([len(prompt) for prompt in prompts])[:, None]


def test_ranked_answers_are_those_of_each_answer_alone(backbone: CausalBackbone, attention: str) -> None:
    ids, mask = left_padded(PROMPTS)
    with torch.no_grad():
        found = backbone.log_likelihoods(ids, mask, AnswerTree.of(WORDS))
    for row, prompt in enumerate(PROMPTS):
        for column, word in enumerate(WORDS):
            of_tokens = alone(backbone, [*prompt, *word])
            expected = [of_tokens[len(prompt) - 1 + place, token] for place, token in enumerate(word)]
            # float32 against float64 on logits of about 10
            torch.testing.assert_close(
                found[row, column, : len(word)].double(), torch.stack(expected), rtol=1e-4, atol=2e-4
            )
            assert not found[row, column, len(word) :].any()


def test_all_answers_are_scored_in_one_pass(backbone: CausalBackbone, attention: str) -> None:
    ids, mask = left_padded(PROMPTS)
    with torch.no_grad():
        backbone._side_by_side = None
        backbone.log_likelihoods(ids, mask, AnswerTree.of(WORDS))
    assert backbone._side_by_side is True


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_one_pass_stays_one_pass_in_half_precision(backbone: CausalBackbone, attention: str, precision: str) -> None:
    if precision == "bfloat16" and hasattr(backbone.model.config, "num_local_experts"):
        pytest.skip("rounding sends tokens to other experts")
    ids, mask = left_padded(PROMPTS)
    tree = AnswerTree.of(WORDS)
    with torch.no_grad():
        expected = backbone.log_likelihoods(ids, mask, tree)
        backbone._side_by_side = None
        try:
            if precision == "bfloat16":
                backbone.model.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                found = backbone.log_likelihoods(ids, mask, tree)
        finally:
            backbone.model.float()
    assert backbone._side_by_side is True
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.15)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_answers_that_see_one_another_are_run_apart(
    backbone: CausalBackbone, attention: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the architecture took no mask: in half precision too that is no rounding."""
    ids, mask = left_padded(PROMPTS)
    monkeypatch.setattr(
        "fusionlab.backbones.causal.additive_masks",
        lambda model, visible, positions: additive_masks(model, torch.ones_like(visible).tril(), positions),
    )
    backbone._side_by_side = None
    try:
        if precision == "bfloat16":
            backbone.model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            backbone.log_likelihoods(ids, mask, AnswerTree.of(WORDS))
        assert backbone._side_by_side is False
    finally:
        backbone.model.float()
        backbone._side_by_side = None


def test_the_way_for_architectures_without_masks_gives_the_same(backbone: CausalBackbone) -> None:
    ids, mask = left_padded(PROMPTS)
    tree = AnswerTree.of(WORDS)
    with torch.no_grad():
        together, apart = (
            score(ids, mask, tree, lambda call: call()) for score in (backbone._together, backbone._apart)
        )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_packed_samples_have_the_logits_that_they_have_alone(
    backbone: CausalBackbone, attention: str, training: bool
) -> None:
    samples = [list(range(30, 52)), [60, 61, 62], list(range(100, 112))]  # one is longer than a window of 8
    packed = torch.tensor([[token for sample in samples for token in sample]])
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    backbone.model.train(training)
    with torch.no_grad():
        found = backbone.logits(packed, position_ids=positions)[0].log_softmax(-1)
        other = packed.clone()
        other[0, :22] = torch.arange(150, 172)
        moved = backbone.logits(other, position_ids=positions)[0].log_softmax(-1)
    backbone.model.eval()
    start = 0
    for sample in samples:
        own = found[start : start + len(sample)]
        torch.testing.assert_close(own.double(), alone(backbone, sample), rtol=1e-3, atol=1e-3)
        start += len(sample)
    torch.testing.assert_close(moved[22:], found[22:], rtol=0, atol=1e-5)
    assert not torch.allclose(moved[:22], found[:22], atol=1e-2)


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_answers_are_those_of_each_prompt_alone(backbone: CausalBackbone, attention: str, cached: bool) -> None:
    ids, mask = left_padded(PROMPTS)
    found = backbone.generate(ids, mask, 12, (2,), cached=cached)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token in answer:
            of_tokens = alone(backbone, tokens)[-1]
            best = of_tokens.max()
            assert of_tokens[token] >= best - 1e-4, "not the most likely token"
            tokens.append(token)
        assert len(answer) == 12 or alone(backbone, tokens)[-1].argmax() == 2


def test_the_loss_is_that_of_each_sample_alone(backbone: CausalBackbone, attention: str) -> None:
    samples = [[1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 2], [1, 60, 5, 2]]
    learnt = [range(8, 12), range(2, 4)]
    ids = torch.zeros(2, 12, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
    columns = torch.tensor([1, 2, 7, 8, 9, 10])
    with torch.no_grad():
        found = backbone.logits(ids, columns).log_softmax(-1)
    for row, (sample, places) in enumerate(zip(samples, learnt, strict=True)):
        of_tokens = alone(backbone, sample)
        for place in places:
            column = columns.tolist().index(place - 1)
            expected = of_tokens[place - 1, sample[place]]
            torch.testing.assert_close(found[row, column, sample[place]].double(), expected, rtol=1e-4, atol=2e-4)
