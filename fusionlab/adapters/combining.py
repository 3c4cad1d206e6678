"""Adapters into one adapter: exact weighted sums of task vectors in low-rank form, truncation, and factor space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusionlab.adapters.factors import Adapter, Factors, hash_initial
from fusionlab.adapters.fused_attention import stored_name
from fusionlab.adapters.starts import initial_lora_a
from fusionlab.errors import InputError, did_you_mean, name_list

Coefficients = Mapping[str, Mapping[str, float]]
INSTEAD = "Use delta_weight space, which is exact for any adapters."


def combine(adapters: Mapping[str, Adapter], coefficients: Coefficients) -> Adapter:
    """Σ λ_t τ_t as one adapter, exact in delta_weight space.

    Per module: where all tasks with λ ≠ 0 share the current A bit for bit, B = Σ λ_t s_t B_t at that rank; else the
    ranks add up. λ_t s_t is folded into B, with lora_alpha = rank, but where one task has λ = 1. Sums are in float64,
    cast once to float32 or wider.

    Args:
        adapters: by task.
        coefficients: λ by parameter name (``<module>.weight``, or as the base has it on disk) and task; ``"*"`` is for
            all names not given. A task not named has λ = 0.

    Raises:
        InputError: no adapter, unknown tasks or names, ``tangent_lora`` mixed with other methods, or coefficients that
            lead beyond the factors' dtype.
    """
    _check(adapters, coefficients)
    first, alike = next(iter(adapters.values())), _alike(adapters)
    fused_attention = fused_attention_of(adapters)
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter.factors))
    factors = {
        module: _combine_module(module, adapters, _of(coefficients, module, fused_attention)) for module in modules
    }
    for module, of_module in factors.items():
        if not (of_module.lora_a.isfinite().all() and of_module.lora_b.isfinite().all()):
            raise InputError(
                f"{module}: the fused factors overflow {of_module.lora_b.dtype}, or an adapter has NaN or Inf; take "
                f"smaller coefficients, or leave that adapter out."
            )
    if any(adapter.method == "tangent_lora" for adapter in adapters.values()):
        grown = [module for module in modules if factors[module].rank != first.ranks.get(module)]
        if not alike or grown:
            raise InputError("tangent_lora adapters can be combined only with one another and from one start")
    config = common_config(adapters)
    first = replace(first, fused_attention=fused_attention, config=config)
    if not alike:
        return Adapter(factors, "lora", first.base_model, fused_attention=fused_attention, config=config)
    kept = {module: of_module.rank for module, of_module in factors.items()} == first.ranks
    return replace(first, factors=factors) if kept else replace(first, factors=factors, a0_hash="", seed=None)


def combine_factors(adapters: Mapping[str, Adapter], coefficients: Coefficients) -> Adapter:
    """A = A₀ + Σ λ_t(A_t − A₀), B = Σ λ_t B_t: ``factor`` space, for reproduction of published results only.

    Exact for ``l_lora``; for trained A it differs from Σ λ_t τ_t by cross terms. The result says ``space="factor"``.

    Args:
        adapters: by task, of one rank and scaling, all started from one A₀.
        coefficients: as in :func:`combine`.

    Raises:
        InputError: ranks or scalings differ, or A₀ differs or is not known.
    """
    _check(adapters, coefficients)
    first_task, first = next(iter(adapters.items()))
    starts = {task: _starts(task, adapter) for task, adapter in adapters.items()}
    for task, adapter in adapters.items():
        if adapter.method != first.method or set(adapter.factors) != set(first.factors):
            raise InputError(
                f"factor space needs one method and the same modules; {first_task!r} ({first.method}, "
                f"{len(first.factors)} modules) and {task!r} ({adapter.method}, {len(adapter.factors)} modules) "
                f"differ. {INSTEAD}"
            )
        for module, own in adapter.factors.items():
            if (own.rank, own.scaling) != (first.factors[module].rank, first.factors[module].scaling):
                raise InputError(
                    f"factor space needs one rank and scaling; {first_task!r}, {task!r} differ at {module} (rank "
                    f"{first.factors[module].rank} and {own.rank}, scaling {first.factors[module].scaling:g} and "
                    f"{own.scaling:g}). {INSTEAD}"
                )
            if not torch.equal(starts[task][module], starts[first_task][module]):
                raise InputError(
                    f"factor space needs one A₀ for all tasks; {first_task!r} and {task!r} started from different A₀ "
                    f"at {module} (hashes {first.a0_hash[:12] or 'none'} and {adapter.a0_hash[:12] or 'none'}). "
                    + INSTEAD
                )
    factors = {
        module: _about_start(module, adapters, _of(coefficients, module, first.fused_attention), start)
        for module, start in starts[first_task].items()
    }
    return replace(first, factors=factors, space="factor")


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The adapter of at most ``rank`` nearest to ``adapter``, by singular values in float64, and its relative error.

    Modules of that rank or less keep their task vector as it is; where all do, the adapter itself is returned. Else it
    is an ordinary ``lora`` adapter.

    Returns:
        the adapter, and ‖τ − τ_rank‖ / ‖τ‖ over all modules (Frobenius norms; 0 for a zero adapter).

    Raises:
        InputError: ``rank`` is below 1, or the adapter is a ``tangent_lora`` above it, which has no weights to
            approximate.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    if all(factors.rank <= rank for factors in adapter.factors.values()):
        return adapter, 0.0
    if adapter.method == "tangent_lora":
        raise InputError("a tangent_lora adapter acts under the linearized forward only; it cannot be truncated")
    factors, squares, dropped = {}, [], []
    for module, of_module in adapter.factors.items():
        left, right = adapter.terms(module, torch.float64)
        dtype = torch.promote_types(of_module.lora_a.dtype, torch.float32)
        left_q, left_r = torch.linalg.qr(left)
        right_q, right_r = torch.linalg.qr(right.T)
        u, sigma, v = torch.linalg.svd(of_module.scaling * left_r @ right_r.T, full_matrices=False)
        squares.append(sigma.square().sum().item())
        if right.shape[0] > rank:
            roots = sigma[:rank].sqrt()
            left, right = left_q @ u[:, :rank] * roots, roots[:, None] * (right_q @ v.T[:, :rank]).T
            dropped.append(sigma[rank:].square().sum().item())
            factors[module] = of_module.with_matrices(right.to(dtype), left.to(dtype), right.shape[0])
        else:
            scaled = of_module.scaling * right.shape[0]
            factors[module] = of_module.with_matrices(right.to(dtype), left.to(dtype), scaled)
    total = math.fsum(squares)
    truncated = replace(adapter, factors=factors, method="lora", a0_hash="", seed=None)
    return truncated, math.sqrt(math.fsum(dropped) / total) if total else 0.0


def _combine_module(module: str, adapters: Mapping[str, Adapter], lambdas: Mapping[str, float]) -> Factors:
    present = {task: adapter for task, adapter in adapters.items() if module in adapter.factors}
    used = {task: adapter for task, adapter in present.items() if lambdas.get(task, 0.0) != 0.0}
    if not used:
        factors = next(iter(present.values())).factors[module]
        return replace(factors, lora_b=torch.zeros_like(factors.lora_b))
    factors = next(iter(used.values())).factors[module]
    if len(used) == 1 and lambdas[next(iter(used))] == 1:
        return factors
    if all(torch.equal(factors.lora_a, adapter.factors[module].lora_a) for adapter in used.values()):
        return _sum_b(module, used, lambdas)
    return _concatenate(module, used, lambdas)


def _sum_b(module: str, adapters: Mapping[str, Adapter], lambdas: Mapping[str, float]) -> Factors:
    factors = {task: adapter.factors[module] for task, adapter in adapters.items()}
    first = next(iter(factors.values()))
    total = torch.zeros_like(first.lora_b, dtype=torch.float64)
    for task, of_task in factors.items():
        total += (lambdas[task] * of_task.scaling) * of_task.lora_b.double()
    dtype = torch.promote_types(first.lora_b.dtype, torch.float32)
    return replace(
        first, lora_a=first.lora_a.to(dtype), lora_b=total.to(dtype), lora_alpha=first.rank, use_rslora=False
    )


def _about_start(
    module: str,
    adapters: Mapping[str, Adapter],
    lambdas: Mapping[str, float],
    lora_a0: Tensor,
) -> Factors:
    first = next(iter(adapters.values())).factors[module]
    start_a = total_a = lora_a0.double()
    total_b = torch.zeros_like(first.lora_b).double()
    for task, adapter in adapters.items():
        factors, scaling_coefficient = adapter.factors[module], lambdas.get(task, 0.0)
        total_a = total_a + scaling_coefficient * (factors.lora_a.double() - start_a)
        total_b = total_b + scaling_coefficient * factors.lora_b.double()
    return replace(first, lora_a=total_a.to(first.lora_a.dtype), lora_b=total_b.to(first.lora_b.dtype), lora_a0=lora_a0)


def _concatenate(module: str, adapters: Mapping[str, Adapter], lambdas: Mapping[str, float]) -> Factors:
    lefts, rights = [], []
    for task, adapter in adapters.items():
        left, right = adapter.terms(module, torch.float64)
        lefts.append(lambdas[task] * adapter.factors[module].scaling * left)
        rights.append(right)
    first = next(iter(adapters.values())).factors[module]
    dtype = torch.promote_types(first.lora_a.dtype, torch.float32)
    lora_a, lora_b = torch.cat(rights).to(dtype), torch.cat(lefts, dim=1).to(dtype)
    return first.with_matrices(lora_a, lora_b, lora_a.shape[0])


def _alike(adapters: Mapping[str, Adapter]) -> bool:
    """Whether all are of one method and from one start."""
    return len({(adapter.method, adapter.a0_hash) for adapter in adapters.values()}) == 1


def _starts(task: str, adapter: Adapter) -> dict[str, Tensor]:
    """A₀ of every module: as kept, the frozen A itself, or drawn again from the seed and held against the hash."""
    starts, drawn = {}, False
    for module, factors in adapter.factors.items():
        if factors.lora_a0 is not None:
            starts[module] = factors.lora_a0
        elif adapter.method != "lora":
            starts[module] = factors.lora_a
        elif adapter.seed is not None:
            starts[module], drawn = initial_lora_a(module, factors.rank, factors.shape[1], adapter.seed), True
        else:
            raise InputError(
                f"factor space needs the A₀ that {task!r} started from, and the adapter does not say it. " + INSTEAD
            )
    initial = {module: (start, None) for module, start in starts.items()}
    if drawn and adapter.a0_hash and hash_initial(initial) != adapter.a0_hash:
        raise InputError(
            f"factor space needs the A₀ that {task!r} started from; what its seed {adapter.seed} gives is another one, "
            f"or layers are missing (hashes {hash_initial(initial)[:12]} and {adapter.a0_hash[:12]}). {INSTEAD}"
        )
    return starts


def _of(coefficients: Coefficients, module: str, fused_attention: tuple[str, ...]) -> Mapping[str, float]:
    names = (f"{module}.weight", stored_name(module, fused_attention), "*")
    return next((coefficients[name] for name in names if name in coefficients), {})


def fused_attention_of(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """The attentions that any of them splits."""
    return tuple(dict.fromkeys(name for adapter in adapters.values() for name in adapter.fused_attention))


def common_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The further fields of their configurations in which all agree."""
    first = next(iter(adapters.values()))
    return {
        key: value
        for key, value in first.config.items()
        if all(adapter.config.get(key) == value for adapter in adapters.values())
    }


def check_combinable(adapters: Mapping[str, Adapter]) -> None:
    """Raise unless they can act on one base.

    Raises:
        InputError: no adapter, or adapters for different bases.
    """
    if not adapters:
        raise InputError("combining needs at least one adapter, got none")
    bases = {adapter.base_model for adapter in adapters.values()} - {""}
    if len(bases) > 1:
        raise InputError(f"the adapters were made for different bases: {name_list(sorted(bases))}")


def _check(adapters: Mapping[str, Adapter], coefficients: Coefficients) -> None:
    check_combinable(adapters)
    modules = {module for adapter in adapters.values() for module in adapter.factors}
    names = {"*"} | {f"{module}.weight" for module in modules}
    names |= {stored_name(module, fused_attention_of(adapters)) for module in modules}
    unknown = [name for name in coefficients if name not in names]
    if unknown:
        raise InputError(
            f"coefficients for {name_list(unknown)}, which no adapter changes; {did_you_mean(unknown[0], names)}"
        )
    tasks = {task for lambdas in coefficients.values() for task in lambdas}
    if tasks - set(adapters):
        raise InputError(
            f"coefficients for unknown tasks {name_list(sorted(tasks - set(adapters)))}; known: {name_list(adapters)}"
        )
