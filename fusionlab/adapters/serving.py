"""A fused adapter on disk as every engine serves it: lora_alpha = r in all modules, so that no pattern is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from fusionlab.adapters.combining import truncate
from fusionlab.adapters.exchange import in_peft_form, write_adapter
from fusionlab.adapters.factors import Adapter, Factors
from fusionlab.adapters.fused_attention import STORED_OUT, times_out_counts


def save_fused_adapter(folder: str | Path, adapter: Adapter, rank: int | None = None) -> tuple[dict[str, int], float]:
    """Write a fused adapter in PEFT's format with s = 1 everywhere: s·B for B, in float32, lora_alpha = r, no rsLoRA.

    PEFT reads the same function, and so does a reader that takes ranks from shapes and ``lora_alpha / r`` from the top
    level, as serving engines do. :func:`fusionlab.adapters.load_adapter` gives ``adapter`` itself back, with its
    method and A₀, unless something was cut off.

    Args:
        folder: where to.
        adapter: what tasks were fused into.
        rank: the rank of every module as it is written: below, zeros are added; above, the nearest matrix of that rank
            is taken, and the adapter becomes an ordinary ``lora``.

    Returns:
        the rank of each module as it is written, and the relative error of what was cut off (0 if nothing was).

    Raises:
        InputError: ``rank`` is below 1, or is below that of a ``tangent_lora``.
    """
    stored, rows = in_peft_form(adapter)
    stored = {module: _unit_scaled(factors) for module, factors in stored.items()}
    error, unpadded = 0.0, {}
    if rank is not None:
        served = replace(adapter, factors=stored)
        cut, error = truncate(replace(served, factors=_times_out(stored, times_out_counts())), rank)
        if any(factors.rank > rank for factors in stored.values()):
            whole = {name: parts for name, parts in rows.items() if stored[name].rank <= rank}
            rows = {name: {part: [0, rank] for part in parts} for name, parts in rows.items()} | whole
            stored, adapter = _times_out(cut.factors, 1 / times_out_counts()), cut
        by_rows = {name for attention in rows for name in (attention, f"{attention}.{STORED_OUT}")}
        unpadded = {module: of.rank for module, of in stored.items() if of.rank < rank and module not in by_rows}
        stored = {module: _padded(factors, rank) for module, factors in stored.items()}
    write_adapter(folder, adapter, stored, rows, unpadded)
    return {module: factors.rank for module, factors in stored.items()}, error


def _times_out(stored: Mapping[str, Factors], times: float) -> dict[str, Factors]:
    """With B of fused attentions' output projections multiplied: PEFT adds them more than once."""
    return {
        name: factors.with_matrices(factors.lora_a, factors.lora_b * times, factors.lora_alpha)
        if name.endswith(f".{STORED_OUT}")
        else factors
        for name, factors in stored.items()
    }


def _unit_scaled(factors: Factors) -> Factors:
    dtype = torch.promote_types(factors.lora_a.dtype, torch.float32)
    lora_b = factors.lora_b if factors.scaling == 1 else factors.lora_b.double() * factors.scaling
    return factors.with_matrices(factors.lora_a.to(dtype), lora_b.to(dtype), factors.rank)


def _padded(factors: Factors, rank: int) -> Factors:
    """The same product at a larger rank: rows of zeros below A, columns of zeros beside B."""
    more = rank - factors.rank
    return factors.with_matrices(F.pad(factors.lora_a, (0, 0, 0, more)), F.pad(factors.lora_b, (0, more)), rank)
