"""Linearized language models: logits and gradients against a jvp oracle and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fusionlab import adapters
from fusionlab.backbones.causal import CausalBackbone
from fusionlab.linearize import LinearizedState
from fusionlab.modules import CausalModule

# torch.func.jvp scripts its decompositions in a way that torch itself has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
Folder = Callable[[str], Path]
IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46], [1, 60, 61, 62, 63, 64, 65, 66]])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def module(request: pytest.FixtureRequest, causal_folder: Folder) -> CausalModule:
    backbone = CausalBackbone.load(str(causal_folder(request.param)), name=request.param)
    backbone.model.double()
    return CausalModule(backbone)


def trained(module: CausalModule, size: float) -> dict[str, Tensor]:
    """Weights a little off the base's, float64."""
    generator = torch.Generator().manual_seed(1)
    base = adapters.base_state(module.base_model)
    return {
        name: value + size * value.std() * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in base.items()
        if value.is_floating_point() and value.numel() > 1
    }


def test_a_tangent_model_is_the_jvp_of_the_network(module: CausalModule) -> None:
    weights = trained(module, 0.1)
    model = module.base_model
    parameters = {name: value for name, value in model.named_parameters() if name in weights}
    tangents = {name: weights[name] - value for name, value in parameters.items()}
    model.set_attn_implementation("eager")  # fused attention has no forward mode

    def logits(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, kwargs={"input_ids": IDS, "use_cache": False}).logits

    primal, tangent = jvp(logits, (parameters,), (tangents,))
    with torch.no_grad(), module.use(LinearizedState(weights)):
        found = module.output(lambda: module.backbone.logits(IDS))
    bound = 1e-6 if "llama" in module.backbone.name else 1e-12  # Llama's norms and positions are in float32
    assert (found - primal - tangent).norm() <= bound * tangent.norm()


def test_a_tangent_model_agrees_with_finite_differences(module: CausalModule) -> None:
    weights = trained(module, 0.1)
    base = adapters.base_state(module.base_model)

    def shifted(step: float) -> Tensor:
        state = {name: base[name] + step * (value - base[name]) for name, value in weights.items()}
        with torch.no_grad(), module.use(state):
            return module.output(lambda: module.backbone.logits(IDS))

    # errors of step² and of rounding / step; Llama's norms round to float32 whatever the model's dtype is
    in_float32 = "llama" in module.backbone.name
    step, bound = (3e-3, 1e-3) if in_float32 else (1e-5, 1e-7)
    change = (shifted(step) - shifted(-step)) / (2 * step)
    with torch.no_grad(), module.use(LinearizedState(weights)):
        found = module.output(lambda: module.backbone.logits(IDS)) - module.backbone.logits(IDS)
    assert (found - change).norm() <= bound * change.norm()


class LinearizedLayer(nn.Module):
    """W x + s·B A x to first order in (A, B) about (A₀, 0), by jvp."""

    def __init__(self, base: nn.Module, lora_a0: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.lora_a0, self.scaling = base, lora_a0, scaling
        self.lora_a = nn.Parameter(lora_a0.clone())
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, len(lora_a0), dtype=lora_a0.dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        def term(lora_a: Tensor, lora_b: Tensor) -> Tensor:
            return inputs @ lora_a.T @ lora_b.T

        start = (self.lora_a0, torch.zeros_like(self.lora_b))
        tangents = (self.lora_a - start[0], self.lora_b - start[1])
        primal, tangent = jvp(term, start, tangents)
        return self.base(inputs) + self.scaling * (primal + tangent)


def test_l_lora_is_the_jvp_oracle_in_logits_and_gradients(causal_folder: Folder) -> None:
    from transformers import AutoModelForCausalLM

    backbone = CausalBackbone.load(str(causal_folder("llama")), name="llama")
    backbone.model.double()
    targets = backbone.default_target_modules
    adapters.inject(backbone.model, ["t"], method="l_lora", rank=3, target_modules=targets, seed=5)
    adapters.activate(backbone.model, "t")
    generator = torch.Generator().manual_seed(2)
    own = dict(
        zip(
            adapters.extract(backbone.model, "t").factors,
            adapters.trainable_parameters(backbone.model, "t"),
            strict=True,
        )
    )
    with torch.no_grad():
        for parameter in own.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    oracle: Any = AutoModelForCausalLM.from_pretrained(causal_folder("llama")).double()
    layers = {}
    for name, factors in adapters.extract(backbone.model, "t").factors.items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = LinearizedLayer(oracle.get_submodule(name), factors.lora_a.double(), factors.scaling)
        setattr(oracle.get_submodule(parent), leaf, layers[name])
        with torch.no_grad():
            layers[name].lora_b.copy_(own[name])
    found, expected = (net(input_ids=IDS, use_cache=False).logits for net in (backbone.model, oracle))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    target = torch.randn(found.shape, generator=generator, dtype=found.dtype)
    ours = torch.autograd.grad((found * target).sum(), list(own.values()))
    theirs = torch.autograd.grad((expected * target).sum(), [layers[name].lora_b for name in own])
    of_a = torch.autograd.grad(
        (oracle(input_ids=IDS, use_cache=False).logits * target).sum(), [layers[name].lora_a for name in own]
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert not any(gradient.any() for gradient in of_a)
