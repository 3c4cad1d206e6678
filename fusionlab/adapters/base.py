"""The base weights below the adapters: read by their own names, and replaced for a while."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fusionlab.tensors.state import named_tensors


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


def modules_of_tied_tensors(model: nn.Module, module_names: Iterable[str]) -> list[str]:
    """Those of the modules whose weight other parts of the model have too, which an adapter leaves as they are."""
    tied = tied_names(model)
    several = {*tied, *tied.values()}
    return [module for module in module_names if f"{module}.weight" in several]
