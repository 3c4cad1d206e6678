"""Which layers an adapter goes to: targets that all must match, and adapters that must fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusionlab.adapters.factors import Adapter
from fusionlab.errors import InputError, did_you_mean, name_list

LINEAR = (nn.Linear, Conv1D)
"""Layers W x + b; transformers' Conv1D stores W transposed."""


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer of the base, beneath PEFT's where adapters were put in."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer.

    Example:
        >>> layer_shape(nn.Linear(2, 3)), layer_shape(Conv1D(3, 2))
        ((3, 2), (3, 2))
    """
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def linear_but(model: nn.Module, head: nn.Module | None) -> tuple[str, ...]:
    """Every linear layer but the head: by the ends of their names where these say just them, else by full names."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR) and name}
    wanted = [name for name, module in linear.items() if module is not head]
    ends = tuple(dict.fromkeys(name.rpartition(".")[2] for name in wanted))
    chosen = [name for name in linear if name.endswith(tuple(f".{end}" for end in ends)) or name in ends]
    return ends if chosen == wanted else tuple(wanted)


def match_targets(model: nn.Module, target_modules: Sequence[str], scope: str = "") -> list[str]:
    """Names of the linear layers below ``scope`` that are, or end in, one of ``target_modules``, in model order.

    Raises:
        InputError: no target given, a target or the scope that matches nothing, or one that is no linear layer.
    """
    modules = {name: module for name, module in model.named_modules() if name and not _inside_adapter(name)}
    if scope and scope not in modules:
        raise InputError(f"the model has no submodule {scope!r}; {did_you_mean(scope, modules)}")
    below = {name: module for name, module in modules.items() if not scope or name.startswith(f"{scope}.")}
    fused = tuple(f"{name}." for name, module in below.items() if isinstance(module, nn.MultiheadAttention))
    linear = {name for name, module in below.items() if isinstance(module, (*LINEAR, LoraLayer))}
    linear = {name for name in linear if not (fused and name.startswith(fused))}
    if isinstance(target_modules, str) or not target_modules:
        raise InputError(f"target_modules must be a list with at least one name, got {target_modules!r}")
    found: set[str] = set()
    for target in target_modules:
        matching = {name for name in below if name == target or name.endswith(f".{target}")}
        if not matching & linear:
            _refuse_target(target, matching, below, linear, scope)
        found |= matching & linear
    return [name for name in below if name in found]


def check_fits(model: nn.Module, adapter: Adapter) -> None:
    """Raise unless every adapted module is a linear layer of ``model`` with the adapter's shape.

    Raises:
        InputError: modules are missing, or their shapes differ; the message lists them.
    """
    modules = dict(model.named_modules())
    missing = [name for name in adapter.factors if name not in modules]
    if missing:
        linear = [name for name, module in modules.items() if isinstance(module, (*LINEAR, LoraLayer))]
        raise InputError(
            f"the adapter adapts modules that the model does not have: {name_list(missing)}; "
            f"{did_you_mean(missing[0], linear)} Use the model it was made for ({adapter.base_model or 'unknown'})."
        )
    problems = []
    for name, factors in adapter.factors.items():
        layer = base_layer(modules[name])
        if not isinstance(layer, LINEAR):
            problems.append(f"{name} is a {type(layer).__name__}, expected a linear layer")
        elif layer_shape(layer) != factors.shape:
            problems.append(f"{name} {factors.shape}, the model has {layer_shape(layer)}")
    if problems:
        raise InputError(f"the adapter does not fit the model: {name_list(problems)}. Use the model it was made for.")


def laid_out(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with each linear layer's layout as ``model`` stores it, which PEFT's files do not say."""
    modules = dict(model.named_modules())
    factors = {}
    for name, of_module in adapter.factors.items():
        layer = base_layer(modules[name])
        is_transposed = of_module.layout == "linear" and isinstance(layer, Conv1D)
        factors[name] = replace(of_module, layout="transposed") if is_transposed else of_module
    return replace(adapter, factors=factors)


def _inside_adapter(name: str) -> bool:
    return ".base_layer" in name or ".lora_" in name


def _refuse_target(
    target: str, matching: set[str], below: Mapping[str, nn.Module], linear: set[str], scope: str
) -> None:
    where = f" below {scope!r}" if scope else ""
    if matching:
        kinds = sorted({type(below[name]).__name__ for name in matching})
        raise InputError(
            f"target module {target!r} is a {', '.join(kinds)}{where}, or lies inside fused attention; only linear "
            f"layers can be adapted, such as {name_list(sorted({name.rpartition('.')[2] for name in linear}), 8)}"
        )
    ends = dict.fromkeys(name.rpartition(".")[2] for name in below if name in linear)
    raise InputError(f"target module {target!r} matches no layer{where}; {did_you_mean(target, ends)}")
