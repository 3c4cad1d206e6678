"""Sums of tangents over every kind of parameter, alone and in mixtures, one to four tasks, against finite differences.

All in float64: central differences with step 1e-4 have an error of order 1e-8 relative.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from often import often
from oracles import select_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusionlab.linearize import tangent_outputs
from fusionlab.modules.applying import LinearOutputs

STEP = 1e-4
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions with biases, norms, and scales that act in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 2, groups=2)
        self.norm1, self.norm2, self.norm3 = nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.InstanceNorm3d(4, affine=True)
        self.activation, self.scale = nn.LeakyReLU(0.3, inplace=True), nn.Parameter(torch.randn(4))
        self.last = nn.Linear(4, 3)

    def forward(self, line: Tensor, image: Tensor, volume: Tensor) -> Tensor:
        one = self.norm1(self.activation(self.conv1(line))).mean(-1)
        two = self.norm2(self.activation(self.conv2(image))).mean((-1, -2))
        three = self.norm3(self.activation(self.conv3(volume[0]))[None]).square().mean((-1, -2, -3))
        return self.last(one).mul_(self.scale[:3]) + self.last(two.mul_(self.scale)) + self.last(three)


def convolutions() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    inputs = [torch.randn(3, 2, *[5] * dims, dtype=torch.float64) for dims in (1, 2, 3)]
    return Convolutions(), lambda model: model(*inputs)


def clip() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=16, patch_size=8))
    return model, lambda model: model(pixel_values=pixels).pooler_output


def vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import ViTConfig, ViTModel

    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8), add_pooling_layer=False)
    return model, lambda model: model(pixel_values=pixels).last_hidden_state[:, 0]


def timm_vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from timm.models.vision_transformer import VisionTransformer

    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, init_values=0.5, num_classes=0, reg_tokens=1)
    return model, lambda model: model(pixels)


def open_clip_tower() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from open_clip.transformer import VisionTransformer

    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": 8}
    return VisionTransformer(image_size=16, patch_size=8, **sizes, ls_init_value=0.5), lambda model: model(pixels)


def gpt2() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = torch.randint(0, 20, (2, 5))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    return model, lambda model: model(input_ids=tokens, use_cache=False).logits


def t5() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    for part in list(model.modules()):  # T5's own norm computes in float32, below what finite differences can see
        for name, child in part.named_children():
            if type(child).__name__ == "T5LayerNorm":
                setattr(part, name, nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon))
    tokens, labels = torch.randint(1, 20, (2, 5)), torch.randint(1, 20, (2, 3))
    return model, lambda model: model(input_ids=tokens, labels=labels).logits


MODELS: dict[str, Any] = {
    "convolutions": convolutions, "clip": clip, "vit": vit, "timm": timm_vit, "open_clip": open_clip_tower,
    "gpt2": gpt2, "t5": t5,
}  # fmt: skip
KINDS = {
    "convolutions": {
        "weight": "conv?.weight", "bias": "conv?.bias", "norm": "norm*", "scale": "scale", "last bias": "last.bias",
    },
    "clip": {
        "weight": "*fc1.weight", "bias": "*.fc1.bias", "query bias": "*q_proj.bias", "norm": "*layer_norm?.*",
        "convolution": "*patch_embedding.weight", "class": "*class_embedding", "positions": "*position_embedding*",
    },
    "vit": {
        "weight": "*value.weight", "bias": "*dense.bias", "norm": "*layernorm*", "convolution bias": "*projection.bias",
        "class": "*cls_token", "positions": "*position_embeddings",
    },
    "timm": {
        "weight": "*qkv.weight", "bias": "*qkv.bias", "norm": "*norm?.*", "convolution bias": "*patch_embed.proj.bias",
        "class": "cls_token", "registers": "reg_token", "positions": "pos_embed", "scale": "*ls?.gamma",
    },
    "open_clip": {
        "weight": "*c_fc.weight", "bias": "*c_fc.bias", "fused": "*in_proj_weight", "fused bias": "*in_proj_bias",
        "norm": "*ln_?.*", "class": "class_embedding", "positions": "positional_embedding", "scale": "*ls_?.gamma",
        "projection": "proj",
    },
    "gpt2": {
        "transposed": "*c_attn.weight", "bias": "*c_attn.bias", "norm": "*ln_?.*", "embedding": "*wte.weight",
        "positions": "*wpe.weight",
    },
    "t5": {
        "weight": "*.q.weight", "norm": "*layer_norm.weight", "embedding": "shared.weight",
        "positions": "*relative_attention_bias.weight",
    },
}  # fmt: skip


@cache
def build(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model, call = MODELS[name]()
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model, lambda: call(model)


def matched(model: nn.Module, pattern: str) -> list[str]:
    """Names by pattern; transformers has named the layers of its ViT in two ways."""
    renamed = {"*value.weight": "*v_proj.weight", "*dense.bias": "*fc?.bias"}
    known = any(fnmatchcase(name, pattern) for name, _ in model.named_parameters())
    return select_parameters(model, [pattern if known else renamed[pattern]])


def difference(model: nn.Module, call: Callable[[], Tensor], tangent: dict[str, Tensor]) -> Tensor:
    """Central difference of the output along ``tangent``."""
    own, values = dict(model.named_parameters()), []
    before = {name: own[name].clone() for name in tangent}
    for sign in (1, -1):
        for name, value in tangent.items():
            own[name].copy_(before[name] + sign * STEP * value)
        with sdpa_kernel(SDPBackend.MATH):
            values.append(call())
    for name, value in before.items():
        own[name].copy_(value)
    return (values[0] - values[1]) / (2 * STEP)


def draw(model: nn.Module, names: list[str], seed: int) -> dict[str, Tensor]:
    own, generator = dict(model.named_parameters()), torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(own[name].shape, generator=generator, dtype=torch.float64) for name in names}


def check(name: str, by_task: dict[str, list[str]]) -> None:
    """The sums of these tasks' tangents, each over its own parameters, are those of finite differences."""
    model, call = build(name)
    vectors = {task: draw(model, names, seed) for seed, (task, names) in enumerate(by_task.items())}
    expected = {task: difference(model, call, vector) for task, vector in vectors.items()}
    outputs = LinearOutputs(model, vectors)
    base, found = outputs.parts(call)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(base, call(), rtol=1e-12, atol=1e-12)
    for task, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 1e-5, "the output must depend on what is moved"
        torch.testing.assert_close(found[task], value, rtol=1e-6, atol=1e-7 * scale)
    coefficients = {task: 0.3 + number for number, task in enumerate(vectors)}
    total = base + sum(coefficients[task] * value for task, value in expected.items())
    scale = max(float(value.abs().max()) for value in expected.values())
    torch.testing.assert_close(outputs.at(coefficients)(call), total, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", [(name, kind) for name, kinds in KINDS.items() for kind in kinds], ids=":".join)
def test_one_kind_alone_for_one_to_four_tasks(kind: tuple[str, str]) -> None:
    model, _ = build(kind[0])
    names = matched(model, KINDS[kind[0]][kind[1]])
    for num_tasks in (1, 2, 4):
        check(kind[0], {f"task {number}": names for number in range(num_tasks)})


@pytest.mark.parametrize("name", often(KINDS, "clip", "convolutions"))
def test_mixtures(name: str) -> None:
    """Every pair of kinds moved by two and three tasks, and each task another kind of its own."""
    model, _ = build(name)
    of_kind = {kind: matched(model, pattern) for kind, pattern in KINDS[name].items()}
    for number, (first, second) in enumerate(combinations(of_kind.values(), 2)):
        both = list(dict.fromkeys([*first, *second]))
        check(name, {f"task {task}": both for task in range(2 + number % 2)})
        check(name, {"x": first, "y": second})
    names = list(of_kind.values())
    check(name, {f"task {number}": of for number, of in enumerate(names[-4:])})
    check(name, {f"task {number}": [each for of in names for each in of] for number in range(3)})


def test_the_example_of_a_bias_and_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    own = {name: value.detach() for name, value in model.named_parameters()}
    for names in (["0.bias", "2.weight"], ["0.bias"], ["0.bias", "2.bias"], ["2.bias"]):
        point = {name: own[name] for name in names}
        tangents = {task: draw(model, names, seed) for seed, task in enumerate("xyz")}
        _, outputs = tangent_outputs(lambda: model(inputs), model, point, tangents)
        for task, tangent in tangents.items():
            expected = difference(model, lambda: model(inputs), tangent)
            torch.testing.assert_close(outputs[task], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("batched", [True, False], ids=["", "one sample"])
def test_a_bias_of_layers_of_all_dimensions(dims: int, batched: bool) -> None:
    torch.manual_seed(dims)
    call = (F.linear, F.conv1d, F.conv2d, F.conv3d)[dims]
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(4, 3, *[2] * dims, dtype=torch.float64), requires_grad=False)
    model.bias = nn.Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False)
    inputs = torch.randn(*([5] if batched else []), 3, *[4] * dims, dtype=torch.float64)

    def output() -> Tensor:
        return call(inputs, model.weight, bias=model.bias).tanh()

    for names in (["bias"], ["weight"], ["bias", "weight"]):
        vectors = {task: draw(model, names, seed) for seed, task in enumerate("xy")}
        _, found = LinearOutputs(model, vectors).parts(output)
        for task, vector in vectors.items():
            torch.testing.assert_close(found[task], difference(model, output, vector), rtol=1e-6, atol=1e-9)
