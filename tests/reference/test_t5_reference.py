"""T5 against transformers itself: loss, logits, greedy answers, and label words scored one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import T5ForConditionalGeneration

from fusionlab import adapters
from fusionlab.modules import T5Module

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["the sentence is good", "a", "not positive: is the sentence bad? the a the a is not good", "x5.0 y2.5"]
TARGETS = ["good", "not_equivalent", "bad", "2.5"]
WORDS = ["positive", "not_equivalent", "equivalent", "unacceptable", "acceptable", "contradiction", "a", "5.0"]


def build(folder: Path, **options: object) -> T5Module:
    return T5Module(str(folder), rank=2, lora_alpha=6, **options).eval()


def batch_of(module: T5Module, texts: list[str], targets: list[str] | None = None) -> dict[str, Tensor]:
    tokenizer = module.backbone.tokenizer
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    if targets is not None:
        labels = tokenizer(targets, padding=True, return_tensors="pt").input_ids
        batch["labels"] = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    return batch


def perturb(model: torch.nn.Module, seed: int = 5) -> None:
    """Move every adapter factor, in the order of the layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@torch.no_grad()  # with gradients torch takes another attention kernel, which rounds otherwise
def test_loss_and_logits_are_those_of_transformers(t5_folder: Callable[[str], Path], kind: str) -> None:
    module = build(t5_folder(kind))
    batch = batch_of(module, TEXTS, TARGETS)
    model = T5ForConditionalGeneration.from_pretrained(t5_folder(kind)).eval()
    expected = model(**batch)
    assert (batch["labels"] == -100).any()
    assert torch.equal(module.backbone.logits(**batch), expected.logits)
    assert torch.equal(module.loss("task", batch), expected.loss)


@pytest.mark.parametrize("method", ["lora", "l_lora"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
@torch.no_grad()
def test_loss_and_logits_with_an_adapter_are_those_of_stock_peft(
    t5_folder: Callable[[str], Path], tmp_path: Path, kind: str, method: str
) -> None:
    module = build(t5_folder(kind), method=method)
    batch = batch_of(module, TEXTS, TARGETS)
    pretrained = module.loss("task", batch)
    module.add_adapters(["task"])
    perturb(module)
    module.activate("task")
    adapters.save_adapter(tmp_path, module.finetuned("task"))
    model = T5ForConditionalGeneration.from_pretrained(t5_folder(kind)).eval()
    expected = PeftModel.from_pretrained(model, tmp_path)(**batch)
    assert torch.equal(module.backbone.logits(**batch), expected.logits)
    assert torch.equal(module.loss("task", batch), expected.loss)
    assert (expected.loss - pretrained).abs() > 1e-3


def test_the_same_layers_are_adapted_as_by_peft(t5_folder: Callable[[str], Path]) -> None:
    module = build(t5_folder("tied"))
    module.add_adapters(["task"])
    model = T5ForConditionalGeneration.from_pretrained(t5_folder("tied"))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    layers = [name for name, part in peft_model.named_modules() if isinstance(part, LoraLayer)]
    assert list(module.injection.module_names) == [name.removeprefix("base_model.model.") for name in layers]
    assert module.injection.num_adapted_layers == (2 + 2 * 2) * 2  # encoder, decoder and cross-attention; q and v


def likelihood_by_transformers(model: torch.nn.Module, tokenizer: object, text: str, word: str) -> float:
    """log p(word | text) of one text and one word, unpadded: minus transformers' mean loss times the tokens."""
    labels = tokenizer(word, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(**tokenizer(text, return_tensors="pt"), labels=labels).loss
    return -loss.item() * labels.shape[1]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rank_scores_equal_a_loop_over_texts_and_words(
    t5_folder: Callable[[str], Path], kind: str, adapted: bool
) -> None:
    module = build(t5_folder(kind))
    module.double()
    if adapted:
        module.add_adapters(["task"])
        perturb(module)
        module.activate("task")
    answers = module.backbone.answers(WORDS, "task")
    with torch.no_grad():
        scores = module.backbone.log_likelihoods(**batch_of(module, TEXTS), answers=answers)
    model, tokenizer = copy.deepcopy(module.backbone.model), module.backbone.tokenizer
    expected = torch.tensor([[likelihood_by_transformers(model, tokenizer, t, word) for word in WORDS] for t in TEXTS])
    # scores are float32 sums of up to 15 terms of size 1 to 20
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-5)
    assert scores.argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()


def test_a_word_scores_the_same_in_any_company(t5_folder: Callable[[str], Path]) -> None:
    module = build(t5_folder("untied"))
    batch = batch_of(module, TEXTS)
    with torch.no_grad():
        together = module.backbone.log_likelihoods(**batch, answers=module.backbone.answers(WORDS, "task"))
        for index, word in enumerate(WORDS):
            alone = module.backbone.log_likelihoods(**batch, answers=module.backbone.answers([word], "task"))
            # matrix products of another width round otherwise, float32
            torch.testing.assert_close(alone[:, 0], together[:, index], rtol=1e-5, atol=1e-4)


def test_many_words_are_scored_by_groups_of_rows(
    t5_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(t5_folder("untied"))
    batch, answers, calls = batch_of(module, TEXTS), module.backbone.answers(WORDS, "task"), []

    def counted(call: Callable[[], Tensor]) -> Tensor:
        calls.append(call())
        return calls[-1]

    with torch.no_grad():
        whole = module.backbone.log_likelihoods(**batch, answers=answers)
        monkeypatch.setattr("fusionlab.backbones.t5._MAX_LOGITS", 3 * 91 * len(answers.targets))
        grouped = module.backbone.log_likelihoods(**batch, answers=answers, output=counted)
    assert [len(logits) for logits in calls] == [3, 1]
    # matrix products of another height round otherwise, float32
    torch.testing.assert_close(grouped, whole, rtol=1e-5, atol=1e-4)


def padded(batch: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    return {name: torch.nn.functional.pad(value, (left, right)) for name, value in batch.items()}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_batched_and_single_agree_whatever_the_padding(t5_folder: Callable[[str], Path], kind: str) -> None:
    module = build(t5_folder(kind))
    module.add_adapters(["task"])
    perturb(module)
    module.activate("task")
    answers = module.backbone.answers(WORDS, "task")
    batch = batch_of(module, TEXTS)

    def both(batch: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
        with torch.no_grad():
            return module.backbone.log_likelihoods(**batch, answers=answers), module.generate(batch)

    scores, texts = both(batch)
    for index, text in enumerate(TEXTS):
        single_scores, single_texts = both(batch_of(module, [text]))
        torch.testing.assert_close(single_scores[0], scores[index], rtol=1e-5, atol=1e-4)
        assert single_texts == [texts[index]]
    for left, right in ((0, 9), (4, 0), (3, 5)):
        padded_scores, padded_texts = both(padded(batch, left, right))
        torch.testing.assert_close(padded_scores, scores, rtol=1e-5, atol=1e-4)
        assert padded_texts == texts
    assert kind == "tied" or len(set(texts)) > 1  # with random tied weights the greedy answer is empty


def test_generation_is_the_greedy_loop(t5_folder: Callable[[str], Path]) -> None:
    module = build(t5_folder("untied"), max_new_tokens=6)
    model, tokenizer = module.backbone.model, module.backbone.tokenizer
    texts = module.generate(batch_of(module, TEXTS))
    for text, answer in zip(TEXTS, texts, strict=True):
        tokens = torch.tensor([[model.config.decoder_start_token_id]])
        while tokens.shape[1] <= 6 and tokens[0, -1] != tokenizer.eos_token_id:
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt"), decoder_input_ids=tokens).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
        assert answer == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert any(texts)


def test_generation_by_logits_is_generation(t5_folder: Callable[[str], Path]) -> None:
    module = build(t5_folder("untied"))
    batch = batch_of(module, TEXTS)
    with torch.no_grad():
        tokens = module.backbone.generate_by_logits(**batch, max_new_tokens=6, output=lambda call: call())
    assert module.backbone.decode(tokens) == module.backbone.decode(module.backbone.generate(**batch, max_new_tokens=6))
    assert tokens.shape == (4, 7)


def test_stored_generation_defaults_do_not_change_the_answers(t5_folder: Callable[[str], Path]) -> None:
    module = build(t5_folder("untied"), max_new_tokens=6)
    batch = batch_of(module, TEXTS)
    greedy = module.generate(batch)
    module.backbone.model.generation_config.update(num_beams=3, do_sample=True, max_new_tokens=2)
    assert module.generate(batch) == greedy


def test_bfloat16_is_near_float32_with_float32_adapters(t5_folder: Callable[[str], Path]) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        module = build(t5_folder("tied"), dtype=dtype)
        module.add_adapters(["task"])
        perturb(module)
        module.activate("task")
        assert {parameter.dtype for parameter in module.task_parameters["task"]} == {torch.float32}
        batch = batch_of(module, TEXTS, TARGETS)
        losses[dtype] = module.loss("task", batch)
        assert losses[dtype].dtype == torch.float32
        scores = module.backbone.log_likelihoods(**batch_of(module, TEXTS), answers=module.backbone.answers(WORDS, ""))
        assert scores.isfinite().all()
    assert module.backbone.model.shared.weight.dtype == torch.bfloat16
    # 8 bits of mantissa through four blocks
    assert losses["bfloat16"].item() == pytest.approx(losses["float32"].item(), rel=0.02)
