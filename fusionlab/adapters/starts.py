"""Where an adapter starts: the seeded A₀ (and B₀), and the forward of layers whose B₀ is not zero."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from fusionlab.adapters.targets import layer_shape
from fusionlab.errors import InputError, did_you_mean
from fusionlab.linearize import centred_term, linearized_term
from fusionlab.samplers import derive_seed

INITS = ("default", "gaussian", "orthogonal", "olora", "pissa")


def initial_lora_a(module: str, rank: int, in_features: int, seed: int) -> Tensor:
    """A₀ of one layer, float32 ``(rank, in)``: Kaiming-uniform with a = √5, as PEFT's and torch's linear layers.

    The generator is seeded by (seed, layer name) alone, so that no other layer, task or call moves it.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_a0", module))
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)


def initial_factors(
    module: str, linear: nn.Module, rank: int, scaling: float, init: str, seed: int
) -> tuple[Tensor, Tensor | None]:
    """``(A₀, B₀)`` of one layer on the CPU in float32, B₀ None for zero.

    Args:
        module: the layer's name, part of the seed.
        linear: the layer; PEFT's data-driven inits read its weight, which is not changed.
        rank: r.
        scaling: s, by which ``pissa`` divides.
        init: one of :data:`INITS`, or ``pissa_niter_N``.
        seed: the run's seed.

    Raises:
        InputError: another ``init``.
    """
    if init == "default":
        return initial_lora_a(module, rank, layer_shape(linear)[1], seed), None
    if init not in INITS and not re.fullmatch(r"pissa_niter_\d+", init):
        raise InputError(f"unknown init {init!r}; {did_you_mean(init, [*INITS, 'pissa_niter_4'])}")
    probe = nn.ModuleDict({"layer": copy.deepcopy(linear).to("cpu", torch.float32)})
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["layer"], init_lora_weights=init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, init, module))
        layer = inject_adapter_in_model(config, probe)["layer"]
    lora_a, lora_b = (part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
    return lora_a, lora_b if lora_b.any() else None


class PointVariant(LoraVariant):
    """PEFT forward of an adapter that acts relative to its start (A₀, B₀ ≠ 0), the buffers ``initial`` of its parts.

    The layer's weight is the pretrained one, so W x + s·(B A − B₀A₀)x for ``lora`` and, to first order in (A, B),
    W x + s·(B−B₀)A₀x + s·B₀(A−A₀)x for ``l_lora``: the pretrained layer at the start, as PEFT's PiSSA is over the
    residual W − s·B₀A₀, but with nothing subtracted from the shared weights.
    """

    def __init__(self, linearized: bool) -> None:
        self.term = linearized_term if linearized else centred_term

    def forward(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        part_a, part_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inputs = module.lora_dropout[active_adapter](x)
        term = self.term(inputs, part_a.weight, part_b.weight, part_a.initial, part_b.initial)
        return result + term * module.scaling[active_adapter]
