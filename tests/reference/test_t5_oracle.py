"""l_lora through T5's encoder, decoder and cross-attention against layers expanded by forward-mode differentiation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from fusionlab.adapters import Factors
from fusionlab.modules import T5Module

# forward-mode differentiation scripts its decompositions on first use; torch warns about that itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


class Expanded(nn.Module):
    """W x + s·B A x to first order in (A, B) about (A₀, 0), by a Jacobian-vector product."""

    def __init__(self, weight: Tensor, factors: Factors) -> None:
        super().__init__()
        self.weight, self.scaling = weight, factors.scaling
        self.lora_a0, self.lora_b0 = factors.lora_a0.double(), torch.zeros_like(factors.lora_b).double()
        self.lora_a = nn.Parameter(factors.lora_a.double())
        self.lora_b = nn.Parameter(factors.lora_b.double())

    def forward(self, x: Tensor) -> Tensor:
        def layer(lora_a: Tensor, lora_b: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, lora_a), lora_b)

        tangent = self.lora_a - self.lora_a0, self.lora_b - self.lora_b0
        value, tangent_output = jvp(layer, (self.lora_a0, self.lora_b0), tangent)
        return value + tangent_output


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_loss_and_gradients_equal_the_oracle(t5_folder: Callable[[str], Path], kind: str) -> None:
    module = T5Module(str(t5_folder(kind)), method="l_lora", rank=2, lora_alpha=6).double().eval()
    pretrained = copy.deepcopy(module.backbone.model)
    module.add_adapters(["task"])
    module.double()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.task_parameters["task"]:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    module.activate("task")
    tokenizer = module.backbone.tokenizer
    batch = dict(tokenizer(["the sentence is not good", "a", "bad?"], padding=True, return_tensors="pt"))
    labels = tokenizer(["negative", "good", "5.0"], padding=True, return_tensors="pt").input_ids
    batch["labels"] = labels.masked_fill(labels == 0, -100)
    loss = module.loss("task", batch)
    gradients = torch.autograd.grad(loss, module.task_parameters["task"])

    model, layers = pretrained, {}
    start = module.loss("task", batch).detach()
    for name, factors in module.finetuned("task").factors.items():
        parent, _, child = name.rpartition(".")
        layers[name] = Expanded(model.get_submodule(name).weight, factors)
        setattr(model.get_submodule(parent), child, layers[name])
    expected = F.cross_entropy(model(**batch).logits.flatten(0, 1).float(), batch["labels"].flatten())
    # the loss itself is float32 of float64 logits, as everywhere
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    module.activate(None)
    assert (module.loss("task", batch) - start).abs() > 1e-3
    of_b = torch.autograd.grad(expected, [layer.lora_b for layer in layers.values()], retain_graph=True)
    of_a = torch.autograd.grad(expected, [layer.lora_a for layer in layers.values()])
    assert not any(gradient.any() for gradient in of_a)  # A trains nothing at B₀ = 0, and is frozen here
    kinds = {"encoder.block.0.", "decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"}
    for name, gradient, expected_gradient in zip(layers, gradients, of_b, strict=True):
        # float32 in the loss and its first gradient, float64 from the logits on
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)
        if gradient.abs().max() > 1e-5:
            kinds -= {part for part in kinds if part in name}
    assert not kinds, f"no gradient reaches {kinds}"
