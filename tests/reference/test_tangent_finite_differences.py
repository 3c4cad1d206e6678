"""The tangent of a whole network against central finite differences and against reverse-over-forward AD, in float64.

Central differences with step 1e-4 have an error of order 1e-8 relative; measured 1e-9 to 1e-8.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import jvp_call, select_parameters
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusionlab.linearize import linearized_call

STEP = 1e-4


def tiny_clip() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return CLIPVisionModel(config), lambda model: model(pixel_values=pixels).pooler_output


def tiny_vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return ViTModel(config, add_pooling_layer=False), lambda model: model(pixel_values=pixels).last_hidden_state[:, 0]


def tiny_t5() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    for part in list(model.modules()):  # T5's own norm computes in float32, below what finite differences can see
        for name, child in part.named_children():
            if type(child).__name__ == "T5LayerNorm":
                setattr(part, name, nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon))
    tokens, labels = torch.randint(1, 40, (3, 7)), torch.randint(1, 40, (3, 4))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return model, lambda model: model(input_ids=tokens, attention_mask=mask, labels=labels).logits


def open_clip_tower() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return model, lambda model: model(pixels)


MODELS: dict[str, Any] = {"clip": tiny_clip, "vit": tiny_vit, "t5": tiny_t5, "open_clip": open_clip_tower}
PARTS = {
    "clip": ["*q_proj.weight", "*v_proj.weight"],
    "vit": ["*.q_proj.*", "*.v_proj.*"],
    "t5": ["*.q.weight", "*.v.weight"],
    "open_clip": ["*.attn.in_proj_weight"],
}


def build(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model, call = MODELS[name]()
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model, lambda: call(model)


def near(point: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: scale * torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in point.items()
    }


def point_of(model: nn.Module, patterns: list[str]) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    return {name: own[name].detach().clone() for name in select_parameters(model, patterns)}


@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_jvp_is_the_central_difference(name: str, everything: bool) -> None:
    model, call = build(name)
    point = point_of(model, ["*"] if everything else PARTS[name])
    tangent = near(point, 0.1)
    base, output = jvp_call(call, model, point, tangent)
    values = []
    own = dict(model.named_parameters())
    for sign in (1, -1):
        for key, value in point.items():
            own[key].copy_(value + sign * STEP * tangent[key])
        with sdpa_kernel(SDPBackend.MATH):
            values.append(call())
    for key, value in point.items():
        own[key].copy_(value)
    expected = (values[0] - values[1]) / (2 * STEP)
    assert base.dtype == torch.float64
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_are_those_of_reverse_over_forward(name: str, everything: bool) -> None:
    model, call = build(name)
    point = point_of(model, ["*"] if everything else PARTS[name])
    update = near(point, 0.1)
    parameters = {key: (value + update[key]).requires_grad_() for key, value in point.items()}
    output = linearized_call(call, model, parameters, point)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, list(parameters.values()), cotangent)
    expected = reverse_over_forward(model, call, parameters, point)
    expected_gradients = torch.autograd.grad(expected, list(parameters.values()), cotangent)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    assert max(float(gradient.abs().max()) for gradient in expected_gradients) > 1e-2
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


def reverse_over_forward(
    model: nn.Module, call: Callable[[], Tensor], parameters: dict[str, Tensor], point: dict[str, Tensor]
) -> Tensor:
    """The slow independent version: torch.func's jvp, differentiated."""

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return call()

    module = Call()
    named = {f"model.{name}": value for name, value in point.items()}
    tangents = {f"model.{name}": parameters[name] - value for name, value in point.items()}
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, tangent = torch.func.jvp(
            lambda values: torch.func.functional_call(module, values, tie_weights=True), (named,), (tangents,)
        )
    torch.backends.mha.set_fastpath_enabled(True)
    return base + tangent
