"""l_lora inside whole models against layers wrapped in a Jacobian-vector product, in value and gradient, float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, T5Config, T5ForConditionalGeneration

from fusionlab import adapters

# forward-mode differentiation scripts its decompositions on first use; torch warns about that itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

Forward = Callable[[nn.Module], Tensor]


class JvpLinear(nn.Module):
    """An adapted linear layer expanded about (A₀, B₀) by forward-mode differentiation; the slow, obvious form."""

    def __init__(self, linear: nn.Linear, factors: adapters.Factors) -> None:
        super().__init__()
        assert factors.lora_a0 is not None
        self.bias, self.scaling = linear.bias, factors.scaling
        self.lora_a = nn.Parameter(factors.lora_a.double())
        self.lora_b = nn.Parameter(factors.lora_b.double())
        self.lora_a0 = factors.lora_a0.double()
        self.lora_b0 = torch.zeros_like(self.lora_b)
        self.weight = nn.Parameter(linear.weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        def layer(lora_a: Tensor, lora_b: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(x, lora_a), lora_b)

        tangent = (self.lora_a - self.lora_a0, self.lora_b - self.lora_b0)
        value, tangent_output = jvp(layer, (self.lora_a0, self.lora_b0), tangent)
        return value + tangent_output


def _clip() -> tuple[nn.Module, Forward, list[str]]:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    model = CLIPVisionModelWithProjection(config)
    return model, lambda model: model(pixel_values=pixels).image_embeds, ["q_proj", "v_proj"]


def _t5() -> tuple[nn.Module, Forward, list[str]]:
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=40, decoder_start_token_id=0)
    tokens = torch.arange(12).view(2, 6)
    return T5ForConditionalGeneration(config), lambda model: model(input_ids=tokens, labels=tokens).logits, ["q", "v"]


@pytest.mark.parametrize("build", [_clip, _t5])
def test_l_lora_equals_jvp_wrapped_layers(build: Callable[[], tuple[nn.Module, Forward, list[str]]]) -> None:
    torch.manual_seed(0)
    model, forward, targets = build()
    model = model.double().eval()
    report = adapters.inject(model, ["task"], method="l_lora", rank=2, lora_alpha=6, target_modules=targets)
    adapters.activate(model, "task")
    for parameter in adapters.trainable_parameters(model, "task"):
        parameter.data += 0.3 * torch.randn_like(parameter)
    adapter, upstream = adapters.extract(model, "task"), None
    output = forward(model)
    upstream = torch.randn_like(output)
    gradients = iter(torch.autograd.grad(output, adapters.trainable_parameters(model, "task"), upstream))

    oracle_layers = {}
    for module, factors in adapter.factors.items():
        parent, _, child = module.rpartition(".")
        linear = model.get_submodule(module).get_base_layer()
        oracle_layers[module] = JvpLinear(linear, factors)
        setattr(model.get_submodule(parent), child, oracle_layers[module])
    expected = forward(model)
    # 1e-10: float64 rounding through two layers
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    assert (output - forward_without(model, forward, oracle_layers)).abs().max() > 1e-3
    expected_gradients = torch.autograd.grad(
        expected, [p for layer in oracle_layers.values() for p in layer.parameters() if p.requires_grad], upstream
    )
    by_layer = dict(
        zip(oracle_layers, zip(expected_gradients[::2], expected_gradients[1::2], strict=True), strict=True)
    )
    for module in report.module_names:
        gradient_a, gradient_b = by_layer[module]
        assert not gradient_a.any()
        torch.testing.assert_close(next(gradients), gradient_b, rtol=0, atol=1e-9)


def forward_without(model: nn.Module, forward: Forward, layers: dict[str, JvpLinear]) -> Tensor:
    """The output with every adapter at its start, to show that the comparison is not of two pretrained models."""
    kept = {name: (layer.lora_a.data.clone(), layer.lora_b.data.clone()) for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a0.clone(), layer.lora_b0.clone()
    with torch.no_grad():
        output = forward(model)
    for name, layer in layers.items():
        layer.lora_a.data, layer.lora_b.data = kept[name]
    return output
