"""Every rule against a slow version of it in float64: whole arrays, sorting, loops over tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fusionlab import rules
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.engine import fuse

SHAPES = {"layers.0.w": (300, 220), "layers.1.w": (90, 370), "layers.1.norm": (70,), "head.w": (24, 50)}
TASKS = ("a", "b", "c")
# Three float32 additions and products, each off by half an ulp of values below 4.
TOLERANCE = {"rtol": 0, "atol": 2e-6}


def make_states(tasks: tuple[str, ...] = TASKS) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    scales = {task: 0.02 * (k + 1) for k, task in enumerate(tasks)}
    finetuned = {
        task: {name: base[name] + scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for task, scale in scales.items()
    }
    return base, finetuned


def wide(base: dict, finetuned: dict) -> tuple[dict, list[dict]]:
    """Base and task vectors as float64 arrays; the subtraction is the engine's, in float32."""
    taus = [{name: (state[name] - base[name]).double().numpy() for name in base} for state in finetuned.values()]
    return {name: tensor.double().numpy() for name, tensor in base.items()}, taus


def flat(tau: dict) -> np.ndarray:
    return np.concatenate([tau[name].ravel() for name in SHAPES])


def unflat(vector: np.ndarray) -> dict:
    ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])[:-1]
    pieces = np.split(vector, ends)
    return {name: piece.reshape(SHAPES[name]) for name, piece in zip(SHAPES, pieces, strict=True)}


def check(rule: rules.Rule, expected: dict, base: dict, finetuned: dict, **tolerance: float) -> None:
    fused = fuse(rule, base, finetuned=finetuned).state
    for name in base:
        np.testing.assert_allclose(fused[name].double().numpy(), expected[name], **(tolerance or TOLERANCE))


def test_average() -> None:
    base, finetuned = make_states()
    _, taus = wide(base, finetuned)
    expected = {
        name: base[name].double().numpy() + np.average([tau[name] for tau in taus], axis=0, weights=[1, 2, 5])
        for name in base
    }
    check(rules.Average({"a": 1.0, "b": 2.0, "c": 5.0}), expected, base, finetuned)


def test_task_arithmetic_by_name() -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    coefficients = {"layers.0.w": (0.1, 0.1, 0.1), "layers.1.w": (0.5, 0.6, 0.7), "layers.1.norm": (0.5, 0.6, 0.7)}
    expected = {
        name: theta[name] + sum(c * tau[name] for c, tau in zip(coefficients.get(name, (0.3,) * 3), taus, strict=True))
        for name in base
    }
    rule = rules.TaskArithmetic(0.3, {"layers.0.*": 0.1, "layers.*": {"a": 0.5, "b": 0.6, "c": 0.7}})
    check(rule, expected, base, finetuned)


@pytest.mark.parametrize("scope", ["model", "layer", "tensor"])
def test_metagpt(scope: str) -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    groups = {
        "model": dict.fromkeys(SHAPES, "all"),
        "layer": {"layers.0.w": "0", "layers.1.w": "1", "layers.1.norm": "1", "head.w": "rest"},
        "tensor": {name: name for name in SHAPES},
    }[scope]
    expected = {}
    for name in base:
        members = [other for other in SHAPES if groups[other] == groups[name]]
        norms = [sum((tau[other] ** 2).sum() for other in members) for tau in taus]
        expected[name] = theta[name] + 1.5 * sum(n * tau[name] for n, tau in zip(norms, taus, strict=True)) / sum(norms)
    check(rules.Metagpt(scope=scope, multiplier=1.5), expected, base, finetuned)


def test_metagpt_coefficients_are_those_of_ten_lines_of_float64() -> None:
    base, finetuned = make_states()
    _, taus = wide(base, finetuned)
    norms = [float(np.linalg.norm(flat(tau))) ** 2 for tau in taus]
    coefficients = fuse(rules.Metagpt(), base, finetuned=finetuned).scaling_coefficients
    assert list(coefficients.values()) == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-13)


def trim(vector: np.ndarray, density: float) -> np.ndarray:
    """TIES's own definition: keep what is at least the k-th smallest magnitude, k = n - int(density n)."""
    k = len(vector) - int(density * len(vector))
    return vector if k == 0 else np.where(np.abs(vector) >= np.sort(np.abs(vector))[k - 1], vector, 0)


def elect_and_mean(vectors: np.ndarray, election: str) -> np.ndarray:
    vote = np.sign(vectors).sum(0) if election == "count" else vectors.sum(0)
    signs = np.sign(vote)
    signs[signs == 0] = 1 if signs.sum() >= 0 else -1
    agree = np.sign(vectors) == signs
    return (vectors * agree).sum(0) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("election", ["mass", "count"])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_ties_over_the_model(density: float, election: str) -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    update = unflat(elect_and_mean(np.stack([trim(flat(tau), density) for tau in taus]), election))
    expected = {name: theta[name] + 0.7 * update[name] for name in base}
    check(rules.Ties(density, 0.7, election=election), expected, base, finetuned)


def test_ties_by_tensor() -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    expected = {}
    for name in base:
        update = elect_and_mean(np.stack([trim(tau[name].ravel(), 0.3) for tau in taus]), "mass")
        expected[name] = theta[name] + update.reshape(SHAPES[name])
    check(rules.Ties(0.3, scope="tensor"), expected, base, finetuned)


def test_ties_gives_votes_that_cancel_out_to_the_majority() -> None:
    """Signs elected plus on two entries, minus on one; the fourth is a tie and goes to plus."""
    base = {"w": torch.zeros(4)}
    finetuned = {"a": {"w": torch.tensor([1.0, 1.0, -1.0, 2.0])}, "b": {"w": torch.tensor([1.0, 1.0, -1.0, -2.0])}}
    assert fuse(rules.Ties(1.0), base, finetuned=finetuned).state["w"].tolist() == [1.0, 1.0, -1.0, 2.0]
    negated = {task: {"w": -state["w"]} for task, state in finetuned.items()}
    assert fuse(rules.Ties(1.0), base, finetuned=negated).state["w"].tolist() == [-1.0, -1.0, 1.0, -2.0]


def largest(vector: np.ndarray, count: int) -> np.ndarray:
    """1 for the ``count`` largest magnitudes, the lowest index first among equals."""
    order = np.argsort(-np.abs(vector), kind="stable")
    mask = np.zeros(len(vector))
    mask[order[:count]] = 1
    return mask


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_trim_keeps_exactly_the_lowest_indices_among_equals(scope: str) -> None:
    """Task vectors with few different magnitudes, so that thousands of entries are at the threshold."""
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    state = {name: torch.randint(-4, 5, shape, generator=generator).float() for name, shape in SHAPES.items()}
    tau = {name: tensor.double().numpy() for name, tensor in state.items()}
    rule = rules.Trim(rules.TaskArithmetic(1.0), density=0.37, scope=scope, at_threshold="first")
    if scope == "model":
        expected = unflat(flat(tau) * largest(flat(tau), int(0.37 * len(flat(tau)))))
    else:
        expected = {n: v * largest(v.ravel(), int(0.37 * v.size)).reshape(v.shape) for n, v in tau.items()}
    check(rule, expected, base, {"a": state}, rtol=0, atol=0)


def test_breadcrumbs() -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    expected = {}
    for name in base:
        masked = []
        for tau in taus:
            vector = tau[name].ravel()
            skipped, kept = int(0.05 * len(vector)), int(0.3 * len(vector))
            masked.append(vector * (largest(vector, skipped + kept) - largest(vector, skipped)))
        expected[name] = theta[name] + 0.4 * sum(masked).reshape(SHAPES[name])
    check(rules.Breadcrumbs(keep=0.3, gamma=0.05, scaling_coefficient=0.4), expected, base, finetuned)


@pytest.mark.parametrize("gamma", [0.0, 0.006])
def test_breadcrumbs_keep_nothing_where_the_share_is_less_than_one_entry(gamma: float) -> None:
    base = {"scale": torch.tensor(2.0), "bias": torch.ones(6), "weight": torch.ones(7)}
    vectors = {"a": {name: torch.arange(1.0, 1 + each.numel()).view(each.shape) for name, each in base.items()}}
    fused = fuse(rules.Breadcrumbs(keep=0.15, gamma=gamma), base, vectors).state
    torch.testing.assert_close(fused, base | {"weight": torch.tensor([1.0] * 6 + [8.0])})  # int(.15 * 7) = 1


def splitmix64(seed: int, count: int) -> np.ndarray:
    """The generator in Python's integers, after Vigna's splitmix64.c."""
    mask, drawn = (1 << 64) - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        mixed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
        drawn.append((mixed + (1 << 63)) & mask)
    return np.array(drawn, dtype=np.uint64)


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
def test_dare(rescale: str) -> None:
    from fusionlab.samplers import derive_seed

    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    expected = {}
    for name in base:
        expected[name] = theta[name].copy()
        for task, tau in zip(TASKS, taus, strict=True):
            draws = splitmix64(derive_seed(5, task, name), tau[name].size).reshape(SHAPES[name])
            kept = tau[name] * (draws >= np.uint64(round(0.7 * 2.0**64)))
            scale = {"probability": 1 / 0.3, "l1": np.abs(tau[name]).sum() / np.abs(kept).sum(), "none": 1.0}[rescale]
            expected[name] += 0.5 * scale * kept
    rule = rules.Dare(rules.TaskArithmetic(0.5), drop_rate=0.7, seed=5, rescale=rescale)
    check(rule, expected, base, finetuned)


def test_transforms_before_metagpt_leave_its_norms_alone() -> None:
    base, finetuned = make_states()
    plain = fuse(rules.Metagpt(), base, finetuned=finetuned).scaling_coefficients
    for rule in (rules.Dare(rules.Metagpt()), rules.Dare(rules.Metagpt(), rescale="l1"), rules.Trim(rules.Metagpt())):
        assert fuse(rule, base, finetuned=finetuned).scaling_coefficients == plain


def test_trim_before_metagpt() -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    norms = [(flat(tau) ** 2).sum() for tau in taus]
    update = unflat(sum(n / sum(norms) * trim(flat(tau), 0.25) for n, tau in zip(norms, taus, strict=True)))
    check(rules.Trim(rules.Metagpt(), 0.25), {n: theta[n] + update[n] for n in base}, base, finetuned)


def test_slerp() -> None:
    base, finetuned = make_states(("a", "b"))
    near = {"b": {name: finetuned["a"][name] * 1.5 for name in base}}  # parallel: interpolated linearly
    far = {
        "b": {name: torch.randn(shape, generator=torch.Generator().manual_seed(8)) for name, shape in SHAPES.items()}
    }
    for other, linear in ((near, True), (far, False)):
        states = {"a": finetuned["a"]} | other
        expected = {}
        for name in base:
            first, second = (states[task][name].double().numpy().ravel() for task in "ab")
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert (cosine > 0.9995) == linear
            angle = math.acos(min(cosine, 1.0))
            scales = (
                (0.7, 0.3)
                if linear
                else (math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle))
            )
            expected[name] = (scales[0] * first + scales[1] * second).reshape(SHAPES[name])
        check(rules.Slerp(0.3), expected, base, states)


def test_lines() -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    scale = {"layers.0.w": 1 / 3, "layers.1.w": 1 / 3 + 0.6, "layers.1.norm": 1 / 3 + 0.6, "head.w": 1 / 3}
    expected = {name: theta[name] + scale[name] * sum(tau[name] for tau in taus) for name in base}
    check(rules.Lines(beta=0.6), expected, base, finetuned)


def test_iso_c_and_tsv_m() -> None:
    base, finetuned = make_states()
    theta, taus = wide(base, finetuned)
    iso, tsv = {}, {}
    for name in base:
        if theta[name].ndim == 1:
            iso[name] = tsv[name] = theta[name] + 0.5 * sum(tau[name] for tau in taus) / 3
            continue
        left, sigma, right = np.linalg.svd(sum(tau[name] for tau in taus), full_matrices=False)
        iso[name] = theta[name] + 0.5 * sigma.mean() * left @ right
        parts = [np.linalg.svd(tau[name], full_matrices=False) for tau in taus]
        k = min(theta[name].shape) // 3
        whitened = []
        for matrix in (np.hstack([p[0][:, :k] for p in parts]), np.vstack([p[2][:k] for p in parts])):
            values, vectors = np.linalg.eigh(
                matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
            )
            root = vectors @ np.diag(values**-0.5) @ vectors.T
            whitened.append(matrix @ root if matrix.shape[0] > matrix.shape[1] else root @ matrix)
        sigmas = np.concatenate([p[1][:k] for p in parts])
        tsv[name] = theta[name] + 0.5 * whitened[0] @ np.diag(sigmas) @ whitened[1]
    check(rules.IsoC(0.5), iso, base, finetuned)
    check(rules.TsvM(0.5), tsv, base, finetuned)


def low_rank_states(merged: bool) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(4)
    base = {"w": torch.randn(60, 80, generator=generator)}
    vectors = {
        task: {"w": 0.1 * torch.randn(60, 2, generator=generator) @ torch.randn(2, 80, generator=generator)}
        for task in TASKS
    }
    return base, {task: {"w": base["w"] + tau["w"]} for task, tau in vectors.items()} if merged else vectors


@pytest.mark.parametrize("rule", [rules.IsoC(), rules.TsvM(), rules.Knots()], ids=lambda rule: type(rule).__name__)
def test_low_rank_task_vectors_stay_in_their_own_space(rule: rules.Rule) -> None:
    """Null-space vectors of the decompositions must not come in: the result has the summed rank and does not change
    when the same task vectors come out of merged weights, with the rounding of a sum."""
    base, vectors = low_rank_states(merged=False)
    fused = fuse(rule, base, vectors).state["w"]
    assert torch.linalg.matrix_rank((fused - base["w"]).double(), rtol=1e-4) == 6
    _, merged = low_rank_states(merged=True)
    torch.testing.assert_close(fuse(rule, base, finetuned=merged).state["w"], fused, rtol=0, atol=2e-5)


def test_knots() -> None:
    base, vectors = low_rank_states(merged=False)
    taus = [tau["w"].double().numpy() for tau in vectors.values()]
    left, sigma, right = np.linalg.svd(np.hstack(taus), full_matrices=False)
    rank = (sigma > 1e-5).sum()
    blocks = np.split(np.diag(sigma[:rank]) @ right[:rank], 3, axis=1)
    fused = elect_and_mean(np.stack([trim(block.ravel(), 0.4) for block in blocks]), "mass").reshape(rank, -1)
    expected = base["w"].double().numpy() + 0.6 * left[:, :rank] @ fused
    np.testing.assert_allclose(fuse(rules.Knots(0.4), base, vectors).state["w"].numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knots_of_tasks_that_meet_in_no_entry_is_their_sum(dtype: torch.dtype) -> None:
    """Of matrices that fall apart into blocks; half of all entries are zeros, of which rounding leaves 1e-16."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(4, 10, 8, generator=generator, dtype=dtype)
    zeros = torch.zeros(10, 8, dtype=dtype)
    along = torch.cat([torch.cat([corners[0], zeros], 1), torch.cat([zeros, corners[1]], 1)])
    across = torch.cat([torch.cat([zeros, corners[2]], 1), torch.cat([corners[3], zeros], 1)])
    rows, columns = torch.randperm(20, generator=generator), torch.randperm(16, generator=generator)
    vectors = {task: {"w": each[rows][:, columns]} for task, each in (("a", along), ("b", across))}
    fused = fuse(rules.Knots(1.0, 1.0), {"w": torch.zeros(20, 16, dtype=dtype)}, vectors).state["w"]
    torch.testing.assert_close(fused, vectors["a"]["w"] + vectors["b"]["w"], rtol=0, atol=1e-5)


def test_a_linear_rule_is_its_coefficients() -> None:
    """``fuse`` of a linear rule adds exactly what ``coefficients`` says, so that adapters get the same."""
    base, finetuned = make_states()
    for rule in (rules.Average(), rules.TaskArithmetic(0.2), rules.Lines(0.5)):
        statistics = Statistics(TASKS, tuple(SHAPES))
        stacked = torch.stack([finetuned[task]["head.w"] - base["head.w"] for task in TASKS])
        found = rule.fuse("head.w", base["head.w"], TaskVectors(TASKS, stacked), statistics)
        expected = base["head.w"].clone()
        for task, tau in zip(TASKS, stacked, strict=True):
            expected += rule.coefficients("head.w", TASKS, statistics)[task] * tau
        assert torch.equal(found, expected)
