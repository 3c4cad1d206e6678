"""Where an adapter starts: the seeded A₀; B₀ is zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fusionlab.samplers import derive_seed


def initial_lora_a(module: str, rank: int, in_features: int, seed: int) -> Tensor:
    """A₀ of one layer, float32 ``(rank, in)``: Kaiming-uniform with a = √5, as PEFT's and torch's linear layers.

    The generator is seeded by (seed, layer name) alone, so that no other layer, task or call moves it.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_a0", module))
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
