"""Weights of which a part is weighed anew for every sample, in files: one of tensors, and what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fusionlab.adapters.factors import Adapter, Factors
from fusionlab.adapters.routed import DenseExperts, Experts, LowRankExperts, RoutedWeights
from fusionlab.errors import InputError
from fusionlab.foreign import RoutedRecord, read_json
from fusionlab.layout import ROUTED, ROUTED_OWN
from fusionlab.rules.routed import RoutedMlp, Router
from fusionlab.tensors.headers import read_header
from fusionlab.tensors.readers import SafetensorsWeights
from fusionlab.tensors.writers import save_state

_REST, _EXPERTS, _ROUTERS = "rest/", "experts/", "routers/"
_ONE_FILE = 1 << 62  # bytes


def save_routed(folder: Path, weights: RoutedWeights) -> None:
    """Write ``wemoe.safetensors`` and ``wemoe.json`` into an existing folder.

    Args:
        folder: where to.
        weights: of which the rest, where it is base weights, is under its names on disk.
    """
    tensors: dict[str, Tensor] = {}
    if isinstance(weights.rest, Adapter):
        for module, factors in weights.rest.factors.items():
            tensors |= {f"{_REST}{module}/lora_a": factors.lora_a, f"{_REST}{module}/lora_b": factors.lora_b}
    else:
        tensors |= {f"{_REST}{name}": value for name, value in weights.rest.items()}
    for layer, experts in weights.experts.items():
        tensors |= {f"{_EXPERTS}{layer}/{name}": value for name, value in experts.tensors.items()}
    for name, mlp in weights.mlps.items():
        tensors |= {f"{_ROUTERS}{name}/{part}": value for part, value in mlp.router.tensors.items()}
    save_state(folder, tensors, max_shard_size=_ONE_FILE, name=ROUTED)
    ranks = {layer: each.ranks for layer, each in weights.experts.items() if isinstance(each, LowRankExperts)}
    record = {
        "schema": 1,
        "tasks": weights.tasks,
        "mlps": {name: dict(mlp.layers) for name, mlp in weights.mlps.items()},
        "ranks": ranks,
        "rest": _told(weights.rest) if isinstance(weights.rest, Adapter) else None,
    }
    (folder / ROUTED_OWN).write_text(json.dumps(record, indent=2) + "\n")


def load_routed(folder: Path) -> RoutedWeights:
    """What :func:`save_routed` wrote, bit for bit, its rest under the names that it was written by.

    Raises:
        InputError: a file that is missing or corrupt, or tensors that are not those that ``wemoe.json`` tells of.
    """
    record = read_json(folder / ROUTED_OWN, RoutedRecord)
    file = SafetensorsWeights({folder / ROUTED: read_header(folder / ROUTED)})
    tensors = {name: file.read(name) for name in file.tensors}
    mlps = {}
    try:
        for name, layers in record["mlps"].items():
            mlps[name] = RoutedMlp(layers, Router.of(_below(tensors, f"{_ROUTERS}{name}/")))
        experts = {
            layer: _experts(_below(tensors, f"{_EXPERTS}{layer}/"), (record.get("ranks") or {}).get(layer))
            for layers in record["mlps"].values()
            for layer in layers
            if any(name.startswith(f"{_EXPERTS}{layer}/") for name in tensors)
        }
        rest = _below(tensors, _REST)
        told = record.get("rest")
        adapter = rest if told is None else _adapter(told, rest)
    except KeyError as error:
        raise InputError(f"{str(folder)!r}: {ROUTED} lacks {error.args[0]!r}; make the folder anew.") from error
    found = RoutedWeights(tuple(record["tasks"]), adapter, mlps, experts)
    counts = {len(mlp.router.layers[-1][1]) for mlp in mlps.values()}
    if counts != {len(found.tasks)}:
        raise InputError(f"{str(folder)!r}: routers of {sorted(counts)} tasks, {ROUTED_OWN} has {len(found.tasks)}.")
    return found


def _below(tensors: Mapping[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {name.removeprefix(beginning): value for name, value in tensors.items() if name.startswith(beginning)}


def _experts(tensors: Mapping[str, Tensor], ranks: list[int] | None) -> Experts:
    if ranks is None:
        return DenseExperts(tensors["weight"], tensors.get("bias"))
    return LowRankExperts(tensors["lora_a"], tensors["lora_b"], tuple(ranks))


def _told(adapter: Adapter) -> dict[str, Any]:
    factors = adapter.factors
    return {
        "method": adapter.method,
        "base_model": adapter.base_model,
        "fused_attention": adapter.fused_attention,
        "lora_alpha": {
            name: each.scaling * each.rank if each.use_rslora else each.lora_alpha for name, each in factors.items()
        },
        "layouts": {name: each.layout for name, each in factors.items() if each.layout != "linear"},
        "kernels": {name: each.kernel for name, each in factors.items() if each.kernel},
    }


def _adapter(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    layouts, kernels = told.get("layouts") or {}, told.get("kernels") or {}
    factors = {
        name: Factors(
            tensors[f"{name}/lora_a"],
            tensors[f"{name}/lora_b"],
            alpha,
            layout=layouts.get(name, "linear"),
            kernel=tuple(kernels.get(name, ())),
        )
        for name, alpha in told["lora_alpha"].items()
    }
    fused_attention = tuple(told.get("fused_attention") or ())
    return Adapter(factors, told["method"], told["base_model"], fused_attention=fused_attention)
