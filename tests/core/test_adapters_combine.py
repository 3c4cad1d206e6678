"""Adapters as low-rank task vectors: sums, inner products, merging and truncation against dense weights."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fusionlab.adapters import (
    Adapter,
    Factors,
    combine,
    combine_factors,
    extract,
    hash_initial,
    inject,
    inner_product,
    truncate,
)
from fusionlab.errors import InputError

SHAPES = {"encoder.q_proj": (6, 5), "encoder.v_proj": (4, 5)}


def make(
    seed: int, *, rank: int = 2, alpha: float = 3.0, method: str = "lora", start: str = "", rslora: bool = False
) -> Adapter:
    """A random adapter; ``start`` is "a0" for a shared frozen A, or "trained" for one that started from it."""
    generator, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    factors = {}
    for module, (rows, columns) in SHAPES.items():
        a0 = torch.randn(rank, columns, generator=shared)
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        if start == "a0":
            a = a0
        factors[module] = Factors(a, b, alpha, rslora, a0 if start else None)
    return Adapter(factors, method=method, a0_hash="hash" if start else "")


def dense(adapter: Adapter, module: str) -> Tensor:
    """τ written out in float64."""
    f = adapter.factors[module]
    scaling = f.lora_alpha / (f.rank**0.5 if f.use_rslora else f.rank)
    return scaling * f.lora_b.double() @ f.lora_a.double()


KINDS = [
    {"method": "lora"},
    {"method": "lora", "rank": 3, "rslora": True},
    {"method": "lora", "start": "trained"},
    {"method": "l_lora", "start": "a0"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_task_vector_is_the_dense_product(kind: dict[str, object]) -> None:
    adapter = make(0, **kind)
    task_vector = adapter.task_vector()
    assert list(task_vector) == [f"{module}.weight" for module in SHAPES]
    assert "encoder.q_proj" not in task_vector
    for module in SHAPES:
        delta_weight = task_vector[f"{module}.weight"]
        assert delta_weight.dtype == torch.float32
        torch.testing.assert_close(delta_weight.double(), dense(adapter, module), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_inner_products_in_factor_form_are_those_of_dense_weights(
    first: dict[str, object], second: dict[str, object]
) -> None:
    one, two = make(0, **first), make(1, **second)
    expected = sum((dense(one, module) * dense(two, module)).sum().item() for module in SHAPES)
    assert inner_product(one, two) == pytest.approx(expected, rel=1e-12, abs=1e-10)
    assert inner_product(one, two) == pytest.approx(inner_product(two, one), rel=1e-12, abs=1e-10)


def test_inner_product_counts_shared_modules_only() -> None:
    one, two = make(0), make(1)
    part = replace(two, factors={"encoder.q_proj": two.factors["encoder.q_proj"]})
    expected = (dense(one, "encoder.q_proj") * dense(two, "encoder.q_proj")).sum().item()
    assert inner_product(one, part) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, {"method": "lora", "start": "a0"}])
def test_combining_is_exact_and_keeps_the_rank_where_it_can(kind: dict[str, object]) -> None:
    adapters = {task: make(seed, **kind) for seed, task in enumerate(("x", "y", "z"))}
    lambdas = {"x": 0.4, "y": -0.7, "z": 1.3}
    fused = combine(adapters, {"*": lambdas, "encoder.v_proj.weight": {"x": 1.0, "z": 2.0}})
    for module, used in {"encoder.q_proj": lambdas, "encoder.v_proj": {"x": 1.0, "z": 2.0}}.items():
        expected = sum(scaling * dense(adapters[task], module) for task, scaling in used.items())
        torch.testing.assert_close(dense(fused, module), expected, rtol=1e-5, atol=1e-5)
        rank = adapters["x"].factors[module].rank
        shared = kind.get("start") == "a0" or kind["method"] == "l_lora"
        assert fused.factors[module].rank == (rank if shared else rank * len(used))


@pytest.mark.parametrize("kind", KINDS)
def test_coefficient_one_on_one_task_gives_that_task_bit_for_bit(kind: dict[str, object]) -> None:
    adapters = {task: make(seed, **kind) for seed, task in enumerate(("x", "y"))}
    fused = combine(adapters, {"*": {"x": 0.0, "y": 1.0}})
    assert fused.method == kind["method"]
    for module, factors in adapters["y"].factors.items():
        assert torch.equal(fused.factors[module].lora_b, factors.lora_b)
        assert torch.equal(fused.factors[module].lora_a, factors.lora_a)
        assert torch.equal(fused.delta_weight(module), adapters["y"].delta_weight(module))


@pytest.mark.parametrize("kind", KINDS)
def test_coefficient_zero_gives_the_base(kind: dict[str, object]) -> None:
    fused = combine({"x": make(0, **kind), "y": make(1, **kind)}, {})
    assert not any(fused.delta_weight(module).any() for module in SHAPES)


def test_different_scalings_share_a_rank_where_a_is_shared() -> None:
    adapters = {"x": make(0, start="a0"), "y": make(1, start="a0", alpha=8.0, rslora=True)}
    fused = combine(adapters, {"*": {"x": 0.5, "y": 0.5}})
    for module in SHAPES:
        expected = 0.5 * dense(adapters["x"], module) + 0.5 * dense(adapters["y"], module)
        torch.testing.assert_close(dense(fused, module), expected, rtol=1e-5, atol=1e-5)
        assert fused.factors[module].rank == 2


def test_methods_ranks_starts_and_modules_may_differ() -> None:
    part = make(3, rank=3)
    part = replace(part, factors={"encoder.q_proj": part.factors["encoder.q_proj"]})
    adapters = {"x": make(0, method="l_lora", start="a0"), "y": make(1, start="trained"), "z": part}
    fused = combine(adapters, {"*": {"x": 0.5, "y": 2.0, "z": 1.0}})
    assert fused.method == "lora"
    for module in SHAPES:
        expected = 0.5 * dense(adapters["x"], module) + 2.0 * dense(adapters["y"], module)
        expected = expected + (dense(part, module) if module in part.factors else 0)
        torch.testing.assert_close(dense(fused, module), expected, rtol=1e-5, atol=1e-5)


def test_factor_space_is_exact_for_l_lora_and_differs_by_cross_terms_for_trained_a() -> None:
    coefficients = {"*": {"x": 0.5, "y": 0.8}}
    for kind, exact in (({"method": "l_lora", "start": "a0"}, True), ({"start": "trained"}, False)):
        adapters = {"x": make(0, **kind), "y": make(1, **kind)}
        fused = combine_factors(adapters, coefficients)
        assert fused.space == "factor"
        for module, f in fused.factors.items():
            a0 = f.lora_a0
            sums = [
                (0.5 * x + 0.8 * y)
                for x, y in (
                    (adapters["x"].factors[module].lora_a - a0, adapters["y"].factors[module].lora_a - a0),
                    (adapters["x"].factors[module].lora_b, adapters["y"].factors[module].lora_b),
                )
            ]
            torch.testing.assert_close(f.lora_a, a0 + sums[0])
            torch.testing.assert_close(f.lora_b, sums[1])
            of_sum = 0.5 * dense(adapters["x"], module) + 0.8 * dense(adapters["y"], module)
            assert torch.allclose(dense(fused, module), of_sum, rtol=1e-4, atol=1e-4) == exact


def test_factor_space_refuses_unequal_or_unknown_starts() -> None:
    other = make(1, start="a0")
    shifted = {module: replace(factors, lora_a0=factors.lora_a0 + 1) for module, factors in other.factors.items()}
    with pytest.raises(InputError, match="started from different A₀"):
        combine_factors({"x": make(0, start="a0"), "y": replace(other, factors=shifted)}, {"*": {"x": 1, "y": 1}})
    with pytest.raises(InputError, match="needs the A₀ that 'x' started from"):
        combine_factors({"x": make(0)}, {"*": {"x": 1}})
    with pytest.raises(InputError, match=r"one rank and scaling; 'x', 'y' differ at encoder\.q_proj"):
        combine_factors({"x": make(0, start="a0"), "y": make(1, start="a0", alpha=9)}, {"*": {"x": 1, "y": 1}})


@pytest.mark.parametrize("known", [True, False])
def test_a_start_is_drawn_again_only_where_it_gives_the_same(known: bool) -> None:
    """The adapter keeps only the hash of its A₀, and an earlier version could start from another one."""
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    inject(model, ["x"], method="lora", rank=2, lora_alpha=4, target_modules=["q_proj"], seed=3)
    adapter = extract(model, "x")
    factors = {name: replace(each, lora_a0=None) for name, each in adapter.factors.items()}
    stored = {"x": replace(adapter, factors=factors, a0_hash=adapter.a0_hash if known else "of another")}
    if known:
        assert combine_factors(stored, {"*": {"x": 1.0}}).space == "factor"
    else:
        with pytest.raises(InputError, match="what its seed 3 gives is another one"):
            combine_factors(stored, {"*": {"x": 1.0}})


def test_tangent_lora_is_combined_with_its_own_kind_only() -> None:
    tangent = {"x": make(0, method="tangent_lora", start="a0"), "y": make(1, method="tangent_lora", start="a0")}
    fused = combine(tangent, {"*": {"x": 0.5, "y": 0.5}})
    assert (fused.method, fused.factors["encoder.q_proj"].rank) == ("tangent_lora", 2)
    with pytest.raises(InputError, match="tangent_lora adapters can be combined only with one another"):
        combine({**tangent, "z": make(2)}, {"*": {"x": 1.0, "z": 1.0}})
    with pytest.raises(InputError, match="cannot be truncated"):
        truncate(fused, 1)


@pytest.mark.parametrize(
    ("adapters", "coefficients", "message"),
    [
        ({}, {}, "at least one adapter"),
        ({"x": make(0)}, {"*": {"z": 1.0}}, "unknown tasks z; known: x"),
        ({"x": make(0)}, {"encoder.q_prj.weight": {"x": 1.0}}, "did you mean 'encoder.q_proj.weight'"),
        (
            {"x": replace(make(0), base_model="m1"), "y": replace(make(1), base_model="m2")},
            {"*": {"x": 1.0, "y": 1.0}},
            "different bases: m1, m2",
        ),
    ],
)
def test_bad_combinations_are_refused(
    adapters: dict[str, Adapter], coefficients: dict[str, dict[str, float]], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        combine(adapters, coefficients)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_the_best_approximation_and_states_its_error(kind: dict[str, object]) -> None:
    adapter = make(0, **kind)
    for rank in (1, 2, 10):
        truncated, error = truncate(adapter, rank)
        dropped, total = 0.0, 0.0
        for module in SHAPES:
            u, sigma, v = torch.linalg.svd(dense(adapter, module), full_matrices=False)
            best = (u[:, :rank] * sigma[:rank]) @ v[:rank]
            torch.testing.assert_close(dense(truncated, module), best, rtol=1e-4, atol=1e-4)
            dropped += sigma[rank:].square().sum().item()
            total += sigma.square().sum().item()
        assert error == pytest.approx((dropped / total) ** 0.5, abs=1e-7)
    with pytest.raises(InputError, match="got 0"):
        truncate(adapter, 0)


def test_the_hash_of_a_start_sees_names_shapes_values_and_b0_but_not_the_order() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(4, 2)
    first = hash_initial({"x": (a, None), "y": (b, None)})
    assert first == hash_initial({"y": (b, None), "x": (a.clone(), None)})
    others = [
        {"x": (b, None), "y": (a, None)},
        {"x": (a.view(3, 2), None), "y": (b, None)},
        {"x": (a + 1e-6, None), "y": (b, None)},
        {"x": (a, b), "y": (b, None)},
    ]
    assert len({first, *(hash_initial(other) for other in others)}) == 5
