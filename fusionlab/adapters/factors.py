"""What an adapter is: low-rank factors by module name, and the arithmetic that needs nothing but them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fusionlab.errors import InputError, did_you_mean
from fusionlab.tensors.state import Computed, State

Method = Literal["lora", "l_lora", "tangent_lora"]
METHODS: tuple[str, ...] = get_args(Method)
FAN_IN_FAN_OUT = "fan_in_fan_out"  # PEFT's flag for transposed layers: one for all, set by the last one
Layout = Literal["linear", "transposed", "embedding", "convolution"]


@dataclass(frozen=True)
class Factors:
    """One layer's adapter.

    Args:
        lora_a: A, shape ``(rank, in)``.
        lora_b: B, shape ``(out, rank)``.
        lora_alpha: the adapter is scaled by ``lora_alpha / rank``.
        use_rslora: scale by ``lora_alpha / sqrt(rank)`` instead.
        lora_a0: A₀, what A started from; None where it is not known, or where A is frozen and is A₀.
        layout: how the base stores the weight: ``(out, in)``; ``(in, out)`` of a ``transposed`` linear layer (Conv1D)
            or an ``embedding``; or ``(out, in, *kernel)`` of a ``convolution``, whose A has in·kernel columns.
        kernel: of a convolution.
    """

    lora_a: Tensor
    lora_b: Tensor
    lora_alpha: float
    use_rslora: bool = False
    lora_a0: Tensor | None = None
    layout: Layout = "linear"
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of B·A."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight that is adapted, as the base stores it."""
        rows, columns = self.shape
        if self.layout == "convolution":
            return (rows, columns // math.prod(self.kernel), *self.kernel)
        return (rows, columns) if self.layout == "linear" else (columns, rows)

    def stored(self, product: Tensor) -> Tensor:
        """A matrix ``(out, in)``, such as B·A, as the base stores the weight."""
        if self.layout in ("transposed", "embedding"):
            return product.T.contiguous()
        return product.reshape(self.stored_shape)

    def with_matrices(self, lora_a: Tensor, lora_b: Tensor, lora_alpha: float) -> Factors:
        """Other factors of the same layer."""
        return Factors(lora_a, lora_b, lora_alpha, layout=self.layout, kernel=self.kernel)

    @property
    def scaling(self) -> float:
        """s = lora_alpha / rank, or / sqrt(rank) for rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """A task vector in low-rank form: τ = s·left·right for each adapted weight.

    Args:
        factors: by the base model's own module names, before any adapter was injected.
        method: how the adapter acts: ``lora``, ``l_lora`` (each layer linearized) or ``tangent_lora`` (whole network).
        base_model: hub id or path of the base, as the user gave it.
        a0_hash: SHA-256 over the initial factors of all layers; empty where it is not known.
        seed: the seed that the initial factors were drawn from; None where they were not.
        fused_attention: names of attentions whose q, k and v the base stores as one matrix and that were split.
        space: how a fused adapter was made: ``delta_weight``, or ``factor`` for A and B fused apart.
        config: further fields of the PEFT configuration that travel along, such as ``lora_dropout``.
    """

    factors: Mapping[str, Factors]
    method: Method = "lora"
    base_model: str = ""
    a0_hash: str = ""
    seed: int | None = None
    fused_attention: tuple[str, ...] = ()
    space: Literal["delta_weight", "factor"] = "delta_weight"
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        if not self.factors:
            raise InputError("an adapter needs at least one adapted module, got none")

    @property
    def ranks(self) -> dict[str, int]:
        return {module: factors.rank for module, factors in self.factors.items()}

    def terms(self, module: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(B, A)``, shapes ``(out, rank)`` and ``(rank, in)``, in ``dtype``: delta_weight = s·B·A."""
        factors = self.factors[module]
        return factors.lora_b.to(dtype), factors.lora_a.to(dtype)

    def delta_weight(self, module: str) -> Tensor:
        """τ of one adapted weight, float32 (float64 where the factors are), as the base stores it.

        Raises:
            InputError: the adapter does not adapt ``module``.
        """
        if module not in self.factors:
            raise InputError(f"the adapter has no module {module!r}; {did_you_mean(module, self.factors)}")
        factors = self.factors[module]
        left, right = self.terms(module, torch.promote_types(factors.lora_a.dtype, torch.float32))
        return factors.stored((left @ right).mul_(factors.scaling))

    def task_vector(self) -> State:
        """τ by parameter name (``<module>.weight``), each computed when it is asked for."""
        return Computed({f"{module}.weight": module for module in self.factors}, self.delta_weight)


def inner_product(first: Adapter, second: Adapter) -> float:
    """⟨τ₁, τ₂⟩ = Σ s₁s₂·Σ((left₁ᵀ left₂) ⊙ (right₁ right₂ᵀ)), in float64, without a dense weight; ranks may differ.

    Example:
        >>> one = Adapter({"layer": Factors(torch.ones(1, 2), torch.ones(3, 1), lora_alpha=2.0)})
        >>> inner_product(one, one)  # six entries of 2.0
        24.0
    """
    products = []
    for module, factors in first.factors.items():
        if module in second.factors:
            left, right = first.terms(module, torch.float64)
            other_left, other_right = second.terms(module, torch.float64)
            gram = (left.T @ other_left) * (right @ other_right.T)
            products.append(factors.scaling * second.factors[module].scaling * gram.sum().item())
    return math.fsum(products)


def hash_initial(initial: Mapping[str, tuple[Tensor, Tensor | None]]) -> str:
    """SHA-256 over names, shapes and float32 bytes of one or two tensors a layer, such as A₀, by sorted name."""
    digest = hashlib.sha256()
    for module in sorted(initial):
        for label, tensor in zip(("lora_a0", "lora_b0"), initial[module], strict=True):
            if tensor is not None:
                digest.update(f"{module}.{label}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
