"""The model whose MLPs are weighed anew for every sample: the rest fused by task arithmetic, experts kept by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusionlab.adapters import Adapter
from fusionlab.adapters.routed import DenseExperts, Experts, LowRankExperts, RoutedWeights
from fusionlab.adapters.weights import Weights, state_of
from fusionlab.fusion.base import Base
from fusionlab.rules.routed import RoutedMlps
from fusionlab.tensors.state import State


def with_experts(
    rule: RoutedMlps,
    base: Base,
    fused: Weights,
    adapters: Mapping[str, Adapter],
    task_vectors: Mapping[str, State],
) -> RoutedWeights:
    """The model.

    Args:
        rule: with routers.
        base: that is fused on.
        fused: by task arithmetic, of which all but what is routed stays.
        adapters: by task, where all are adapters, whose factors are kept; else empty.
        task_vectors: by task and unit, for others; each task's is kept whole, in float32.
    """
    units = _units_of(rule, base)
    experts: dict[str, Experts] = {}
    for layer, is_transposed in rule.layers.items():
        found = _low_rank(layer, adapters) if adapters else _dense(layer, is_transposed, units, task_vectors)
        if found is not None:
            experts[layer] = found
    rest: Adapter | State
    if isinstance(fused, Adapter):
        factors = {name: each for name, each in fused.factors.items() if name not in rule.layers}
        rest = replace(fused, factors=factors) if factors else {}
    else:
        rest = {name: value for name, value in state_of(fused).items() if name not in units}
    return RoutedWeights(rule.tasks, rest, rule.mlps, experts)


def _units_of(rule: RoutedMlps, base: Base) -> dict[str, str]:
    """The units of what is routed, by name in memory."""
    names = [f"{layer}.{part}" for layer in rule.layers for part in ("weight", "bias")]
    return {name: base.layout.names.get(name, name) for name in names}


def _low_rank(layer: str, adapters: Mapping[str, Adapter]) -> LowRankExperts | None:
    terms = {
        task: adapter.terms(layer, torch.promote_types(adapter.factors[layer].lora_a.dtype, torch.float32))
        for task, adapter in adapters.items()
        if layer in adapter.factors
    }
    if not terms:
        return None
    lora_b = torch.cat([adapters[task].factors[layer].scaling * left for task, (left, _) in terms.items()], dim=1)
    ranks = tuple(len(terms[task][1]) if task in terms else 0 for task in adapters)
    return LowRankExperts(torch.cat([right for _, right in terms.values()]), lora_b, ranks)


def _dense(
    layer: str, is_transposed: bool, units: Mapping[str, str], task_vectors: Mapping[str, State]
) -> DenseExperts | None:
    weight, bias = (_stacked(units[f"{layer}.{part}"], task_vectors) for part in ("weight", "bias"))
    if weight is None:
        return None
    return DenseExperts(weight.transpose(1, 2).contiguous() if is_transposed else weight, bias)


def _stacked(unit: str, task_vectors: Mapping[str, State]) -> Tensor | None:
    """τ_t of a unit, zero of a task that lacks it; None where all do."""
    found = {task: vector[unit] for task, vector in task_vectors.items() if unit in vector}
    if not found:
        return None
    zero = torch.zeros_like(next(iter(found.values())))
    return torch.stack([found.get(task, zero) for task in task_vectors])
