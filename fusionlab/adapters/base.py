"""The base weights below the adapters: read by their own names, and replaced for a while."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fusionlab.errors import InputError
from fusionlab.tensors.state import State, named_tensors


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters and persistent buffers by their names before any adapter was injected; not copies.

    Tied tensors come once, under the first of their names, as transformers stores them.
    """
    tied = tied_names(model)
    return {
        own: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".lora_" not in name and (own := name.replace(".base_layer.", ".")) not in tied
    }


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters and buffers by each of their names before any adapter was injected."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in named_tensors(model).items()
        if ".lora_" not in name
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of tensors that have several: each with the first one, which :func:`base_state` uses."""
    first: dict[int, str] = {}
    names = {
        name.replace(".base_layer.", "."): first.setdefault(id(tensor), name.replace(".base_layer.", "."))
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return {name: kept for name, kept in names.items() if name != kept}


def under_first_names(model: nn.Module, state: State) -> dict[str, Tensor]:
    """``state`` as :func:`base_state` names it: of a tensor that ``model`` has under several names, the first alone.

    Raises:
        InputError: the state has two values for one tensor; naming them.
    """
    tied, found, names = tied_names(model), dict[str, Tensor](), dict[str, str]()
    for name, value in state.items():
        first = tied.get(name, name)
        if first in found and not _equal(found[first], value):
            raise InputError(f"{names[first]} and {name} are one tensor, and the weights have two values for it")
        found[first], names[first] = value, name
    return found


def _equal(first: Tensor, second: Tensor) -> bool:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first is second or torch.equal(first.to(dtype), second.to(dtype))


def modules_of_tied_tensors(model: nn.Module, module_names: Iterable[str]) -> list[str]:
    """Those of the modules whose weight other parts of the model have too, which an adapter leaves as they are."""
    tied = tied_names(model)
    several = {*tied, *tied.values()}
    return [module for module in module_names if f"{module}.weight" in several]
