"""T5 under every method: to first order by finite differences, and all weights in place of the base's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.modules import T5Module

# forward-mode differentiation scripts its decompositions on first use; torch warns about that itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
WORDS = ["positive", "negative", "not_equivalent"]


class Norm(nn.Module):
    """T5's norm in the dtype of its input; transformers' own works in float32, which differences would see."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)


def build(folder: Path, method: str) -> tuple[T5Module, dict[str, Tensor]]:
    """A module in float64 whose task has moved away from the base, and a padded batch."""
    module = T5Module(str(folder), method=method, rank=2, lora_alpha=4, max_new_tokens=5).double().eval()
    for part in list(module.modules()):
        for name, child in part.named_children():
            if type(child).__name__ == "T5LayerNorm":
                setattr(part, name, Norm(child))
    module.add_adapters(["task"])
    module.double()
    generator = torch.Generator().manual_seed(2)
    for parameter in module.task_parameters["task"]:
        step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * parameter.data.std() * step if method in ("full", "tangent") else 0.1 * step
    module.activate("task")
    tokenizer = module.backbone.tokenizer
    batch = dict(tokenizer(["the sentence is not good", "a", "bad?"], padding=True, return_tensors="pt"))
    labels = tokenizer(["negative", "good", "5.0"], padding=True, return_tensors="pt").input_ids
    return module, {**batch, "labels": labels.masked_fill(labels == 0, -100)}


def logits_at(module: T5Module, batch: dict[str, Tensor], fraction: float) -> Tensor:
    """The plain network's logits a fraction of the way from the base to the task's weights."""
    with module.use(None):
        model = copy.deepcopy(module.backbone.model)
    own = dict(model.named_parameters())
    finetuned = module.finetuned("task")
    if module.method == "tangent_lora":
        for name, delta in finetuned.task_vector().items():
            own[name.replace(".weight", ".base_layer.weight")].data += fraction * delta.double()
    else:
        for name, value in finetuned.state.items():
            own[name].data += fraction * (value - own[name].data)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("method", ["tangent_lora", "tangent"])
def test_linearized_logits_equal_central_differences(t5_folder: Callable[[str], Path], method: str, kind: str) -> None:
    module, batch = build(t5_folder(kind), method)
    inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"])
    with torch.no_grad():
        logits = module.output(lambda: module.backbone.logits(*inputs))
    step = 1e-5
    slope = (logits_at(module, batch, step) - logits_at(module, batch, -step)) / (2 * step)
    # float64 rounding over the step, and third derivatives of up to 1e4 times the step squared
    torch.testing.assert_close(logits, logits_at(module, batch, 0.0) + slope, rtol=1e-6, atol=1e-6)
    assert (logits - logits_at(module, batch, 1.0)).abs().max() > 1e-2  # the plain network is another function


@pytest.mark.parametrize("method", ["tangent_lora", "tangent"])
def test_label_words_and_answers_are_those_of_the_linearized_network(
    t5_folder: Callable[[str], Path], method: str
) -> None:
    module, batch = build(t5_folder("untied"), method)
    module.answers["task"] = module.backbone.answers(WORDS, "task")
    with torch.no_grad():
        scores = module.log_likelihoods("task", batch)
        for index, word in enumerate(WORDS):
            labels = module.backbone.tokenizer([word] * 3, return_tensors="pt").input_ids
            call_inputs = (batch["input_ids"], batch["attention_mask"], labels)
            logits = module.output(lambda inputs=call_inputs: module.backbone.logits(*inputs))
            losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none").sum(dim=1)
            torch.testing.assert_close(scores[:, index], -losses, rtol=1e-5, atol=1e-4)
        answers = module.generate(batch)
        tokens = module.backbone.tokenizer(answers, return_tensors="pt", padding=True).input_ids
    assert tokens.shape[0] == 3
    with torch.no_grad(), module.use(None):
        assert module.generate(batch) != answers  # and not those of the base


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_full_is_the_network_with_the_tasks_weights(t5_folder: Callable[[str], Path], kind: str) -> None:
    module, batch = build(t5_folder(kind), "full")
    model = copy.deepcopy(module.backbone.model)
    assert (model.lm_head.weight is model.shared.weight) == (kind == "tied")
    own = dict(model.named_parameters())
    for name, value in module.finetuned("task").items():
        own[name].data.copy_(value)
    loss = module.loss("task", batch)
    gradients = torch.autograd.grad(loss, module.task_parameters["task"])
    for parameter in own.values():
        parameter.requires_grad_(True)
    expected = F.cross_entropy(model(**batch).logits.flatten(0, 1).float(), batch["labels"].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected_gradients = torch.autograd.grad(expected, list(own.values()))
    assert len(gradients) == len(expected_gradients)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
