"""The MLPs of a network, by the names that its library gives them, and the linear layers in each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from fusionlab.adapters.targets import LINEAR
from fusionlab.contracts import Module
from fusionlab.errors import InputError, name_list

MLP_NAMES = ("mlp", "DenseReluDense", "feed_forward", "ffn")
"""What an MLP is called: of CLIP, ViT, timm's and open_clip's models, Llama and most others; T5; and others still."""
_EXPERTS = ("experts", "expert")


@dataclass(frozen=True)
class Mlp:
    """An MLP.

    Args:
        layers: its linear layers by name, in the order of its parts, with whether the weight is stored ``(in, out)``.
        width: numbers that it reads at a token.
    """

    layers: dict[str, bool]
    width: int


def mlps_of(model: nn.Module, trained: Collection[str]) -> dict[str, Mlp]:
    """The MLPs one of whose linear layers was trained, by name; those that choose among experts are left alone.

    Args:
        model: with or without adapters in it.
        trained: names of linear layers without adapters.

    Raises:
        InputError: there is none.
    """
    parts = list(model.named_modules())
    found, left = {}, []
    for name, part in parts:
        if name.rpartition(".")[2] not in MLP_NAMES:
            continue
        inside = {each.rpartition(".")[2] for each, _ in part.named_modules()}
        linear = _linear_layers(name, part)
        if inside & set(_EXPERTS):
            left.append(name)
            continue
        if not set(linear) & set(trained):
            continue
        first = next(iter(linear.values()))
        is_first_transposed = not isinstance(first, nn.Linear)
        layers = {each: not isinstance(layer, nn.Linear) for each, layer in linear.items()}
        found[name] = Mlp(layers, int(first.weight.shape[0 if is_first_transposed else 1]))
    if not found:
        told = f"; {name_list(left)} choose among experts of their own and are left alone" if left else ""
        raise InputError(
            f"wemoe: no MLP was trained: it routes modules called {' or '.join(MLP_NAMES)}, and what was trained is "
            f"{name_list(trained)}{told}; train the MLPs too (--model.target_modules, or --model.method full), or "
            f"choose another rule"
        )
    return found


def check_mlps(module: Module) -> None:
    """Raise if what a module is about to train, or has trained, has no MLP in it.

    Raises:
        InputError: as :func:`mlps_of`.
    """
    if module.injection is not None:
        mlps_of(module.base_model, module.injection.module_names)
    else:
        linear = [name for name, part in module.base_model.named_modules() if isinstance(part, LINEAR)]
        mlps_of(module.base_model, linear)


def _linear_layers(name: str, part: nn.Module) -> dict[str, nn.Module]:
    """Below an MLP, by the names that they have without adapters."""
    return {
        f"{name}.{inner}".removesuffix(".base_layer"): layer
        for inner, layer in part.named_modules()
        if isinstance(layer, LINEAR) and ".lora_" not in f".{inner}"
    }
