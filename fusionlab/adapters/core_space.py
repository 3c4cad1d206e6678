"""Rules on matrices over adapters, in the small space that all of them share: no task vector is written out.

With U an orthonormal basis of the columns of all s_t B_t and V one of the rows of all A_t, τ_t is U M_t Vᵀ exactly; the
core M_t has (T·rank)² entries, or (T·rank) x rank where all tasks have one A. What a rule that turns with the bases
makes of the M_t, it makes of the τ_t; the result U M Vᵀ is an adapter. A rule that turns with the left basis only is
given the rows as they are. RegMean's leaves the B of adapters as they are, and makes others of their A.

Source: Accurate and efficient low-rank model merging in core space, arXiv 2509.17786.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionlab.adapters.combining import check_combinable, common_config, fused_attention_of
from fusionlab.adapters.factors import Adapter, Factors
from fusionlab.blocks.matrices import TaskMatrices
from fusionlab.blocks.sums import pair_keys
from fusionlab.engine.job import Outcome
from fusionlab.engine.workers import for_each, one_torch_thread
from fusionlab.errors import InputError
from fusionlab.rules.matrix_rule import MatrixRule
from fusionlab.rules.weighted_by_grams import WeightedByGrams


def fuse_in_core_space(
    rule: MatrixRule | WeightedByGrams,
    adapters: Mapping[str, Adapter],
    *,
    names: Mapping[str, str] | None = None,
    threads: int | None = None,
    on_module: Callable[[str], None] = lambda module: None,
) -> tuple[Adapter, Outcome]:
    """The adapter that ``rule`` makes of adapters, to the rounding of float64 that of the dense task vectors.

    Decompositions are in float64; the factors are cast once to float32 or wider, with lora_alpha = rank. Convolutions,
    which are no matrices, get λ times the mean. Weights are seen as ``(out, in)``, embeddings as they are stored.

    Args:
        rule: one for which :func:`fusionlab.rules.weighted_by_grams.makes_adapters` holds.
        adapters: by task, in recipe order; a module that a task does not adapt is zero there.
        names: name in memory -> name on disk of weights that have another one there.
        threads: worker threads, torch's own number by default; they do not change the result.
        on_module: called with the name of each module that is done.

    Returns:
        the adapter, of rank T·rank, or of the rank of one where all tasks have one A; and what was found out.

    Raises:
        InputError: no adapter, adapters for different bases, ``tangent_lora`` mixed with other methods, NaN or Inf, or
            what the rule refuses.
    """
    check_combinable(adapters)
    if len({adapter.method == "tangent_lora" for adapter in adapters.values()}) > 1:
        raise InputError("tangent_lora adapters can be combined only with one another")
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter.factors))
    found: dict[str, _Fused] = {}

    def work(module: str) -> tuple[str, _Fused]:
        if isinstance(rule, WeightedByGrams):
            own = f"{module}.weight"
            return module, _fuse_by_grams(rule, module, (names or {}).get(own, own), adapters)
        return module, _fuse_module(rule, module, adapters)

    def collect(result: tuple[str, _Fused]) -> None:
        found.update([result])
        on_module(result[0])

    if isinstance(rule, WeightedByGrams):
        own = [f"{module}.weight" for module in modules]
        rule.check(list(adapters), [(names or {}).get(each, each) for each in own])
    threads = threads or torch.get_num_threads()
    with one_torch_thread():
        for_each(modules, work, threads, collect)
    first = next(iter(adapters.values()))
    fused = Adapter(
        {module: found[module].factors for module in modules},
        "tangent_lora" if first.method == "tangent_lora" else "lora",
        first.base_model,
        fused_attention=fused_attention_of(adapters),
        config=common_config(adapters),
    )
    tasks = tuple(adapters)
    sums = {
        key: {module: (found[module].gram[pair].item(),) for module in modules}
        for key, pair in pair_keys(tasks, norms=True, products=True).items()
    }
    remarks = {f"{module}.weight": found[module].remarks for module in modules if found[module].remarks}
    return fused, Outcome(tasks, {}, sums, updated=0, survived=0, exact=0, remarks=remarks)


@dataclass(frozen=True)
class _Fused:
    """One module: its factors, the inner products of its task vectors, and remarks."""

    factors: Factors
    gram: Tensor
    remarks: tuple[str, ...]


def _fuse_module(rule: MatrixRule, module: str, adapters: Mapping[str, Adapter]) -> _Fused:
    terms = [_terms(task, adapter, module) for task, adapter in adapters.items()]
    first = next(adapter.factors[module] for adapter in adapters.values() if module in adapter.factors)
    lefts, left_basis = _in_basis([None if each is None else each[0] for each in terms])
    rights, right_basis = _in_basis([None if each is None else each[1].T for each in terms])
    stacked = torch.stack([left @ right.T for left, right in zip(lefts, rights, strict=True)])
    gram = torch.einsum("tmn,umn->tu", stacked, stacked)
    basis: Tensor | None = right_basis
    if len(first.stored_shape) != 2:
        core = stacked.sum(0).mul_(rule.scaling_coefficient / len(adapters))
        return _Fused(_factors(first, left_basis, core, basis), gram, ())
    if rule.sides == "left":
        stacked, basis = stacked @ right_basis.T, None
    shape = first.shape[::-1] if first.layout == "embedding" else first.shape
    matrices = TaskMatrices(tuple(adapters), stacked, shape)
    core = rule.fuse_matrices(matrices).mul_(rule.scaling_coefficient)
    return _Fused(_factors(first, left_basis, core, basis), gram, tuple(matrices.cuts.near))


def _fuse_by_grams(rule: WeightedByGrams, module: str, name: str, adapters: Mapping[str, Adapter]) -> _Fused:
    """Σ L_t R'_t as B = [L_1 … L_T] and A = [R'_1; …; R'_T]; the mean where no linear layer multiplies the weight."""
    present = [task for task, adapter in adapters.items() if module in adapter.factors]
    first = adapters[present[0]].factors[module]
    lefts, rights = [], []
    for task in present:
        left, right = adapters[task].terms(module, torch.float64)
        check_finite(task, module, left, right)
        lefts.append(adapters[task].factors[module].scaling * left)
        rights.append(right)
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    places = [list(adapters).index(task) for task in present]
    for place, left, right in zip(places, lefts, rights, strict=True):
        for other, its_left, its_right in zip(places, lefts, rights, strict=True):
            gram[place, other] = ((left.T @ its_left) * (right @ its_right.T)).sum()
    if len(adapters) == 1:
        return _Fused(first, gram, ())
    moved = rule.of_factors(name, list(adapters), _of_all(rights, places, len(adapters)))
    others = rights if moved is None else [moved[place] for place in places]
    share = 1 / len(adapters) if moved is None else 1.0
    dtype = torch.promote_types(first.lora_a.dtype, torch.float32)
    lora_b = torch.cat([share * left for left in lefts], dim=1).to(dtype)
    lora_a = torch.cat(others).to(dtype)
    return _Fused(first.with_matrices(lora_a, lora_b, float(len(lora_a))), gram, ())


def _of_all(rights: Sequence[Tensor], places: Sequence[int], num_tasks: int) -> list[Tensor]:
    """By task, nothing where one does not adapt the module: its G counts all the same, with a task vector of zero."""
    found = [rights[0].new_zeros(0, rights[0].shape[1])] * num_tasks
    for place, right in zip(places, rights, strict=True):
        found[place] = right
    return found


def check_finite(task: str, module: str, *parts: Tensor) -> None:
    """Raise for NaN or Inf in the factors of a module.

    Raises:
        InputError: with both names.
    """
    if not all(part.isfinite().all() for part in parts):  # a decomposition would fail on it
        raise InputError(f"{module}.weight of {task!r} has NaN or Inf; leave that model out or repair it.")


def _terms(task: str, adapter: Adapter, module: str) -> tuple[Tensor, Tensor] | None:
    """(left, right) of τ = left @ right ``(out, in)``, of an embedding as it is stored, float64; None where it is 0."""
    if module not in adapter.factors:
        return None
    left, right = adapter.terms(module, torch.float64)
    left = adapter.factors[module].scaling * left
    check_finite(task, module, left, right)
    return (right.T, left.T) if adapter.factors[module].layout == "embedding" else (left, right)


def _in_basis(parts: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
    """Each part ``(size, k)`` by its coordinates in one orthonormal basis of all, and the basis ``(size, dims)``.

    Equal parts, as one A of all tasks, come into the basis once.
    """
    distinct: list[Tensor] = []
    places: list[int | None] = []
    for part in parts:
        equal = [number for number, other in enumerate(distinct) if part is not None and torch.equal(other, part)]
        if part is not None and not equal:
            distinct.append(part)
        places.append(None if part is None else equal[0] if equal else len(distinct) - 1)
    basis, coordinates = torch.linalg.qr(torch.cat(distinct, dim=1))
    pieces = coordinates.split([part.shape[1] for part in distinct], dim=1)
    empty = basis.new_zeros(basis.shape[1], 1)
    return [empty if place is None else pieces[place] for place in places], basis


def _factors(first: Factors, left: Tensor, core: Tensor, right: Tensor | None) -> Factors:
    """left @ core @ rightᵀ as an adapter of the smaller of both ranks; no ``right`` is the identity."""
    if right is None or left.shape[1] < right.shape[1]:
        rows, columns = left, core if right is None else core @ right.T
    else:
        rows, columns = left @ core, right.T
    if first.layout == "embedding":
        rows, columns = columns.T, rows.T
    dtype = torch.promote_types(first.lora_a.dtype, torch.float32)
    return first.with_matrices(columns.to(dtype).contiguous(), rows.to(dtype).contiguous(), float(columns.shape[0]))
