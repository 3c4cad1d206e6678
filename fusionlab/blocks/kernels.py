"""The engine's inner loops, compiled: each reads its inputs once, and lets other threads run meanwhile.

They work on numpy arrays. Nothing here depends on the width of the processor's registers: where numbers are summed, the
order is written out, so that the same inputs give the same bits on every machine. The machine code is kept beside this
file, or in the user's cache folder, and made again by every process where neither can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

CUT = 32_768
"""Elements in one cut: sums are taken per cut, in flat order, and meet in ``math.fsum``."""

LANES = 256
"""Running sums in a cut: element k goes to sum k mod 256; then the upper half goes onto the lower, again and again."""

_PIECE = 2048  # elements that are worked on while they are in the processor's nearest cache


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder that it may write
        return numba.njit(nogil=True)(function)


@_compiled
def _clear(lanes):  # type: ignore[no-untyped-def]
    for row in range(lanes.shape[0]):
        for k in range(lanes.shape[1]):
            lanes[row, k] = 0.0


@_compiled
def _add_products(first, second, lanes):  # type: ignore[no-untyped-def]
    for k in range(first.size):
        lanes[k] += np.float64(first[k]) * np.float64(second[k])


@_compiled
def _add(values, lanes):  # type: ignore[no-untyped-def]
    for k in range(values.size):
        lanes[k] += values[k]


@_compiled
def _halved(lanes):  # type: ignore[no-untyped-def]
    width = lanes.size // 2
    while width > 0:
        for k in range(width):
            lanes[k] += lanes[k + width]
        width //= 2
    return lanes[0]


@_compiled
def partial_sums(values, sums):  # type: ignore[no-untyped-def]
    """Fill ``sums``, float64 ``(rows, cuts)``, with the sum of every cut of float64 ``values`` ``(rows, elements)``."""
    lanes = np.empty((1, LANES))
    for row in range(values.shape[0]):
        for cut in range(sums.shape[1]):
            _clear(lanes)
            inside = values[row, cut * CUT : (cut + 1) * CUT]
            for k in range(0, inside.size, LANES):
                _add(inside[k : k + LANES], lanes[0])
            sums[row, cut] = _halved(lanes[0])


@_compiled
def _add_pairs(stacked, start, stop, with_norms, with_products, lanes):  # type: ignore[no-untyped-def]
    num_rows = stacked.shape[0]
    pair = 0
    for i in range(num_rows):
        for j in range(i if with_norms else i + 1, num_rows if with_products else i + 1):
            first, second = stacked[i, start:stop], stacked[j, start:stop]
            for k in range(0, first.size, LANES):
                _add_products(first[k : k + LANES], second[k : k + LANES], lanes[pair])
            pair += 1


@_compiled
def pair_sums(stacked, with_norms, with_products, sums):  # type: ignore[no-untyped-def]
    """The sums of x_i·x_j per cut, float64 ``(pairs, cuts)``, of ``stacked`` ``(rows, elements)``.

    The pairs are those with i = j (``with_norms``) and with i < j (``with_products``), ordered by i and then j. They
    have the same bits as :func:`partial_sums` of the float64 products.
    """
    num_elements = stacked.shape[1]
    lanes = np.empty((sums.shape[0], LANES))
    for cut in range(sums.shape[1]):
        _clear(lanes)
        for start in range(cut * CUT, min(num_elements, (cut + 1) * CUT), _PIECE):
            _add_pairs(stacked, start, min(start + _PIECE, num_elements), with_norms, with_products, lanes)
        for pair in range(sums.shape[0]):
            sums[pair, cut] = _halved(lanes[pair])


@_compiled
def _copy(values, out):  # type: ignore[no-untyped-def]
    for k in range(out.size):
        out[k] = values[k]


@_compiled
def _add_row(row, coefficient, total):  # type: ignore[no-untyped-def]
    for k in range(total.size):
        total[k] += coefficient * row[k]


@_compiled
def add_scaled(base, stacked, coefficients, out):  # type: ignore[no-untyped-def]
    """``out`` = base + Σ coefficient·row, row after row, product and sum rounded apart, all of one dtype."""
    for start in range(0, base.size, _PIECE):
        total = out[start : start + _PIECE]
        _copy(base[start : start + _PIECE], total)
        for row in range(stacked.shape[0]):
            _add_row(stacked[row, start : start + _PIECE], coefficients[row], total)


@_compiled
def _num_different(first, second):  # type: ignore[no-untyped-def]
    count = np.uint32(0)
    for k in range(first.size):
        count += np.uint32(first[k] != second[k])
    return np.int64(count)


@_compiled
def _num_unbounded(values):  # type: ignore[no-untyped-def]
    count = np.uint32(0)
    for k in range(values.size):
        count += np.uint32(values[k] - values[k] != 0)  # infinity less itself is NaN
    return np.int64(count)


@_compiled
def num_exact(wanted, kept, stored_base):  # type: ignore[no-untyped-def]
    """How many values differ from the base once stored, and are stored as they were wanted."""
    count = np.uint32(0)
    for k in range(kept.size):
        count += np.uint32((kept[k] != stored_base[k]) & (kept[k] == wanted[k]))
    return np.int64(count)


@_compiled
def count_changes(fused, stored, base, stored_base):  # type: ignore[no-untyped-def]
    """How many values fusion changed, how many still differ once stored, and how many stored ones are not finite."""
    updated, survived, unbounded = 0, 0, 0
    for start in range(0, fused.size, _PIECE):
        kept = stored[start : start + _PIECE]
        updated += _num_different(fused[start : start + _PIECE], base[start : start + _PIECE])
        survived += _num_different(kept, stored_base[start : start + _PIECE])
        unbounded += _num_unbounded(kept)
    return updated, survived, unbounded


@_compiled
def _widen(values, wide):  # type: ignore[no-untyped-def]
    bits = wide.view(np.uint32)
    for k in range(bits.size):
        bits[k] = np.uint32(values[k]) << np.uint32(16)


@_compiled
def _subtract(base, values):  # type: ignore[no-untyped-def]
    for k in range(values.size):
        values[k] -= base[k]


@_compiled
def _narrow(values, out):  # type: ignore[no-untyped-def]
    bits = values.view(np.uint32)
    for k in range(out.size):
        to_even = np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))
        out[k] = np.uint16((bits[k] + to_even) >> np.uint32(16))


@_compiled
def fuse_bfloat16(stored, coefficients, with_norms, with_products, sums, fused):  # type: ignore[no-untyped-def]
    """All that a linear rule does with a block of bfloat16 models, in one pass over what was read.

    The same bits as widening to float32, subtracting the base, :func:`pair_sums`, :func:`add_scaled`, rounding to
    bfloat16 and :func:`count_changes` one after the other.

    Args:
        stored: bits of the base and of every model, uint16 ``(1 + rows, elements)``.
        coefficients: float32 ``(rows,)``.
        with_norms: see :func:`pair_sums`.
        with_products: see :func:`pair_sums`.
        sums: see :func:`pair_sums`; one column per cut also where there are no pairs.
        fused: to fill with the bits of the result, uint16 ``(elements,)``; an empty one to measure only.

    Returns:
        what :func:`count_changes` gives, and what :func:`num_exact` gives.
    """
    num_rows, num_elements = stored.shape[0] - 1, stored.shape[1]
    lanes = np.empty((sums.shape[0], LANES))
    wide, task_vectors = np.empty((3, _PIECE), np.float32), np.empty((num_rows, _PIECE), np.float32)
    updated, survived, unbounded, exact = 0, 0, 0, 0
    for cut in range(sums.shape[1]):
        _clear(lanes)
        for start in range(cut * CUT, min(num_elements, (cut + 1) * CUT), _PIECE):
            stop = min(start + _PIECE, num_elements)
            size = stop - start
            base, total, rounded = wide[0, :size], wide[1, :size], wide[2, :size]
            _widen(stored[0, start:stop], base)
            for row in range(num_rows):
                _widen(stored[1 + row, start:stop], task_vectors[row, :size])
                _subtract(base, task_vectors[row, :size])
            _add_pairs(task_vectors, 0, size, with_norms, with_products, lanes)
            if fused.size > 0:
                _copy(base, total)
                for row in range(num_rows):
                    _add_row(task_vectors[row, :size], coefficients[row], total)
                _narrow(total, fused[start:stop])
                _widen(fused[start:stop], rounded)
                changes = count_changes(total, rounded, base, base)
                updated, survived, unbounded = updated + changes[0], survived + changes[1], unbounded + changes[2]
                exact += num_exact(total, rounded, base)
        for pair in range(sums.shape[0]):
            sums[pair, cut] = _halved(lanes[pair])
    return updated, survived, unbounded, exact


@_compiled
def add_upper_bits(values, counts):  # type: ignore[no-untyped-def]
    """Count float32 ``values`` by the upper 15 of the 31 bits of their magnitudes, into int64 ``(32768,)``."""
    bits = values.view(np.uint32)
    for k in range(bits.size):
        counts[(bits[k] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1


@_compiled
def add_lower_bits(values, upper_bits, counts):  # type: ignore[no-untyped-def]
    """Count those float32 ``values`` that have these upper bits by their lower 16 bits, into int64 ``(65536,)``."""
    bits = values.view(np.uint32)
    for k in range(bits.size):
        magnitude = bits[k] & np.uint32(0x7FFFFFFF)
        if magnitude >> np.uint32(16) == upper_bits:
            counts[magnitude & np.uint32(0xFFFF)] += 1


def compile_all() -> None:
    """Compile for float32 and bfloat16 now, so that the first large model need not wait for it."""
    rows, one = np.zeros((2, 1), np.float32), np.zeros(1, np.float32)
    bits, sums = np.zeros((3, 1), np.uint16), np.zeros((3, 1))
    fuse_bfloat16(bits, rows[:, 0].copy(), True, True, sums, bits[0].copy())
    pair_sums(rows, True, True, sums)
    partial_sums(rows.astype(np.float64), sums[:2])
    add_scaled(one, rows, rows[:, 0].copy(), one.copy())
    count_changes(one, one, one, one)
    add_upper_bits(one, np.zeros(1 << 15, np.int64))
    add_lower_bits(one, 0, np.zeros(1 << 16, np.int64))
