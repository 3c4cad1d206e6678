"""The rules that the field compares with, each against a slow version of it in numpy and float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fusionlab import rules
from fusionlab.adapters import Adapter, Factors
from fusionlab.engine import fuse
from fusionlab.errors import InputError
from fusionlab.fusion.making import fuse_weights
from fusionlab.samplers import derive_seed

KINDS = ["full", "low rank", "equal A", "equal B", "A apart by 1e-2", "one zero", "all zero", "one task", "twice"]
Array = np.ndarray
Reference = Callable[[list[Array]], Array]


@pytest.fixture(params=KINDS)
def inputs(request: pytest.FixtureRequest, task_matrices: Any) -> list[dict[str, Array]]:
    """Task vectors of one structure: matrices that are tall and wide, a vector and a convolution."""
    kind = request.param
    tall, wide = task_matrices(kind, 30, 22), task_matrices(kind, 18, 26, seed=1)
    generator = torch.Generator().manual_seed(2)
    found = []
    for first, second in zip(tall, wide, strict=True):
        others = {"norm": torch.randn(40, generator=generator), "conv": torch.randn(4, 3, 2, 2, generator=generator)}
        zero = kind == "all zero" or not first.any()
        state = {"tall": first, "wide": second} | {name: 0.0 * v if zero else 0.1 * v for name, v in others.items()}
        found.append({name: value.double().numpy() for name, value in state.items()})
    return found


def check(rule: Any, inputs: list[dict[str, Array]], reference: Reference, of_others: Reference | None = None) -> None:
    """The rule's update in float64 to 1e-10, in float32 to 1e-5 of the largest entry."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        base = {name: torch.zeros(value.shape, dtype=dtype) for name, value in inputs[0].items()}
        vectors = {
            f"task {number}": {name: torch.from_numpy(value).to(dtype) for name, value in each.items()}
            for number, each in enumerate(inputs)
        }
        fused = fuse(rule, base, vectors).state
        for name in base:
            taus = [each[name].double().numpy() for each in vectors.values()]
            formula = reference if taus[0].ndim == 2 or of_others is None else of_others
            expected = formula(taus)
            scale = max(float(np.abs(each).max()) for each in (*taus, expected)) or 1.0
            np.testing.assert_allclose(fused[name].double().numpy(), expected, rtol=0, atol=tolerance * scale)


def mean(taus: list[Array]) -> Array:
    return sum(taus) / len(taus)


def kept(matrix: Array, scale: float | None = None) -> tuple[Array, Array, Array]:
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int((sigma > 1e-5 * (sigma.max(initial=0.0) if scale is None else scale)).sum())
    return left[:, :rank], sigma[:rank], right[:rank]


def polar(matrix: Array) -> Array:
    """M (MᵀM)^(-1/2) over the directions that M has: X ← (X + X⁻ᵀ)/2 between its range and its row space."""
    left, sigma, right = kept(matrix)
    inner = left.T @ matrix @ right.T
    for _ in range(60):
        inner = (inner + np.linalg.inv(inner).T) / 2 if len(sigma) else inner
    return left @ inner @ right


def tsv_m(taus: list[Array]) -> Array:
    count = min(taus[0].shape) // len(taus)
    parts = [kept(tau) for tau in taus]
    lefts, rights = np.hstack([p[0][:, :count] for p in parts]), np.vstack([p[2][:count] for p in parts])
    return polar(lefts) @ np.diag(np.concatenate([p[1][:count] for p in parts])) @ polar(rights.T).T


def iso_cts(taus: list[Array]) -> Array:
    left, sigma, right = kept(sum(taus))
    rank, num_tasks = len(sigma), len(taus)
    if rank == 0:
        return 0 * taus[0]
    common = int(0.8 * rank)
    common = rank - round((rank - common) / num_tasks) * num_tasks
    count = (rank - common) // num_tasks
    space = left[:, :common]
    lefts, sigmas, rights = [space], [sigma[:common]], [right[:common]]
    for tau in taus:
        own = kept(tau - space @ space.T @ tau, np.linalg.norm(tau, 2))
        lefts, rights = [*lefts, own[0][:, :count]], [*rights, own[2][:count]]
        sigmas.append(own[1][:count])
    return np.concatenate(sigmas).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights).T).T


def consensus(taus: list[Array]) -> Array:
    total = sum(taus)
    masks = [np.abs(tau) > 0.4 * np.abs(total - tau) for tau in taus]
    return 0.3 * total * (np.sum(masks, axis=0) >= 2)


def model_stock(taus: list[Array]) -> Array:
    count, flat = len(taus), [tau.ravel() for tau in taus]
    norms = [np.linalg.norm(tau) for tau in flat]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosines = [flat[i] @ flat[j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0 for i, j in pairs]
    cosine = np.mean(cosines) if pairs else 1.0
    return count * cosine / (1 + (count - 1) * cosine) * mean(taus)


def nuslerp(taus: list[Array], t: float = 1 / 3) -> Array:
    first, second = taus
    norm = np.linalg.norm(first) * np.linalg.norm(second)
    angle = math.acos(np.clip(np.sum(first * second) / norm, -1, 1)) if norm else math.pi / 2
    if math.sin(angle) < 1e-6:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def karcher(thetas: list[Array]) -> Array:
    """On the vectors themselves, each step by logarithms and the exponential map."""
    lengths = [np.linalg.norm(theta) for theta in thetas]
    units = [theta / length for theta, length in zip(thetas, lengths, strict=True) if length > 0]
    if not units:
        return 0 * thetas[0]
    point = sum(units) / np.linalg.norm(sum(units))
    for _ in range(10):
        logarithms = []
        for unit in units:
            across = unit - np.sum(unit * point) * point
            size = np.linalg.norm(across)
            angle = math.atan2(size, np.sum(unit * point))
            logarithms.append(angle / size * across if angle > 1e-5 else 0 * across)
        step = sum(logarithms) / len(units)
        size = np.linalg.norm(step)
        if size < 1e-5:
            break
        point = math.cos(size) * point + math.sin(size) * step / size
    return np.mean(lengths) * point


def largest(vector: Array, count: int) -> Array:
    order = np.argsort(-np.abs(vector), kind="stable")
    mask = np.zeros(len(vector), dtype=bool)
    mask[order[:count]] = True
    return mask


def at_least(vector: Array, density: float) -> Array:
    """TIES's trim: what is at least as large as the k-th smallest, k = n - int(density n)."""
    k = len(vector) - int(density * len(vector))
    return np.where(np.abs(vector) >= np.sort(np.abs(vector))[k - 1], vector, 0) if k else vector


def test_tsv_m(inputs: list[dict[str, Array]]) -> None:
    check(rules.TsvM(), inputs, tsv_m, mean)


def test_iso_cts(inputs: list[dict[str, Array]]) -> None:
    check(rules.IsoCts(), inputs, iso_cts, mean)


def test_iso_cts_has_room_for_tasks_in_low_rank_only_by_the_rank_of_the_sum(task_matrices: Any) -> None:
    """With min(m, n) for the rank, as the official code takes it, adapters get Iso-C; k is 0 for many tasks."""
    for kind, differs in (("low rank", True), ("equal A", False)):
        taus = task_matrices(kind, 40, 36, num_tasks=4)
        base = {"w": torch.zeros(40, 36, dtype=torch.float64)}
        vectors = {str(number): {"w": tau} for number, tau in enumerate(taus)}
        found, plain = (fuse(rule, base, vectors).state["w"] for rule in (rules.IsoCts(), rules.IsoC()))
        assert torch.allclose(found, plain) != differs  # of rank 12: c = 8 and k = 1; of rank 3: k = round(1/4) = 0


def test_consensus(inputs: list[dict[str, Array]]) -> None:
    if len(inputs) > 1:
        check(rules.Consensus(), inputs, consensus)
    else:
        with pytest.raises(InputError, match="at least 2 tasks need, got 1: task 0; give more tasks"):
            check(rules.Consensus(), inputs, consensus)


def test_consensus_by_task(task_matrices: Any) -> None:
    thresholds = {"task 0": 0.2, "task 1": 0.6, "task 2": 1.0, "task 3": 0.4}
    taus = [each.numpy() for each in task_matrices("full")]
    total = sum(taus)
    masks = [np.abs(tau) > share * np.abs(total - tau) for tau, share in zip(taus, thresholds.values(), strict=True)]
    expected = total * (np.sum(masks, axis=0) >= 3)
    check(rules.Consensus(1.0, thresholds, min_tasks=3), [{"w": tau} for tau in taus], lambda _: expected)
    assert 0.05 < (expected != 0).mean() < 0.95


def test_localize_and_stitch(inputs: list[dict[str, Array]]) -> None:
    names = list(inputs[0])
    flat = [np.concatenate([each[name].astype(np.float32).ravel() for name in names]) for each in inputs]
    kept_entries = [at_least(tau, 0.1) for tau in flat]
    count = np.sum([tau != 0 for tau in kept_entries], axis=0)
    whole = sum(tau.astype(float) for tau in kept_entries) / np.maximum(count, 1)
    ends = np.cumsum([inputs[0][name].size for name in names])[:-1]
    parts = dict(zip(names, np.split(whole, ends), strict=True))
    rounded = [{name: value.astype(np.float32).astype(float) for name, value in each.items()} for each in inputs]
    shapes = {value.shape: name for name, value in inputs[0].items()}
    check(rules.LocalizeAndStitch(), rounded, lambda taus: parts[shapes[taus[0].shape]].reshape(taus[0].shape))


def test_localize_and_stitch_by_tensor(inputs: list[dict[str, Array]]) -> None:
    def reference(taus: list[Array]) -> Array:
        chosen = [at_least(tau.ravel(), 0.3).reshape(tau.shape) for tau in taus]
        return sum(chosen) / np.maximum(np.sum([tau != 0 for tau in chosen], axis=0), 1)

    check(rules.LocalizeAndStitch(0.3, "tensor"), inputs, reference)


def test_model_stock(inputs: list[dict[str, Array]]) -> None:
    check(rules.ModelStock(), inputs, model_stock)


def test_model_stock_names_what_works_against_one_another() -> None:
    """A negative mean cosine, and task vectors that cancel out, where the formula has a pole."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])
    vectors = {"a": {"v": one, "w": one, "x": one}, "b": {"v": other, "w": -one, "x": one + other}}
    base = {name: torch.zeros(2) for name in "vwx"}
    fused = fuse(rules.ModelStock(), base, vectors)
    assert list(fused.remarks) == ["v", "w"]
    assert "mean cosine of the task vectors is -0.6000: a step of -3.0000" in fused.remarks["v"][0]
    assert "cancel out" in fused.remarks["w"][0]
    torch.testing.assert_close(fused.state["v"], -3.0 * (one + other) / 2)
    assert not fused.state["w"].any()


def test_nuslerp(inputs: list[dict[str, Array]]) -> None:
    pair = {"task 0": 2.0, "task 1": 1.0}
    if len(inputs) > 1:
        check(rules.Nuslerp(pair), inputs[:2], nuslerp)
        check(rules.Nuslerp(pair), [inputs[0], {name: -2 * value for name, value in inputs[0].items()}], nuslerp)
    else:
        with pytest.raises(InputError, match="between two task vectors, got 1: task 0"):
            check(rules.Nuslerp(), inputs, nuslerp)


def test_karcher(inputs: list[dict[str, Array]]) -> None:
    """Over a base of zeros the weights are the task vectors: far apart on the sphere."""
    check(rules.Karcher(), inputs, karcher)


@pytest.mark.parametrize("near", [1.0, 1e-2, 1e-4])
def test_karcher_of_models_near_one_another(near: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(30, 20, generator=generator, dtype=torch.float64)}
    taus = [near * torch.randn(30, 20, generator=generator, dtype=torch.float64) for _ in range(4)]
    fused = fuse(rules.Karcher(), base, {str(number): {"w": tau} for number, tau in enumerate(taus)}).state["w"]
    expected = karcher([(base["w"] + tau).numpy() for tau in taus])
    np.testing.assert_allclose(fused.numpy(), expected, rtol=0, atol=1e-10)


def test_karcher_where_directions_cancel_out() -> None:
    base = {"w": torch.zeros(3), "v": torch.zeros(3)}
    one = torch.tensor([1.0, 2.0, 3.0])
    fused = fuse(rules.Karcher(), base, {"a": {"w": one, "v": one}, "b": {"w": -3 * one, "v": one}})
    torch.testing.assert_close(fused.state, {"w": -one, "v": one})
    assert fused.remarks == {"w": ("the directions of the weights cancel out: their plain mean is taken",)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [(1.0, 2.0, 3.0, -1.0), (1.3, 0.7, 0.2, 0.9, -0.4, 1.1, 0.8, -0.6)])
def test_karcher_of_weights_of_which_some_are_opposite(scales: tuple[float, ...], dtype: torch.dtype) -> None:
    """On one line, as all numbers are, the direction of most; the others count by their length."""
    generator = torch.Generator().manual_seed(0)
    lines = {"vector": torch.randn(50, generator=generator).to(dtype), "number": torch.ones(1, dtype=dtype)}
    tuned = {str(task): {name: scale * line for name, line in lines.items()} for task, scale in enumerate(scales)}
    fused = fuse(rules.Karcher(), {name: torch.zeros_like(line) for name, line in lines.items()}, finetuned=tuned)
    length = sum(map(abs, scales)) / len(scales)
    for name, line in lines.items():
        torch.testing.assert_close(fused.state[name], length * line, rtol=1e-5, atol=1e-6)
        assert "opposite to the mean" in fused.remarks[name][0]


def sce(taus: list[Array], density: float) -> Array:
    taus = np.stack(taus)
    if density < 1:
        variance = ((taus - sum(taus) / len(taus)) ** 2).sum(0) / len(taus)
        count = int(density * np.count_nonzero(variance))
        ranked = np.sqrt(variance).astype(np.float32).ravel()  # equal but for the rounding of a mean is equal
        taus = taus * largest(ranked, count).reshape(variance.shape)
    weights = np.array([(tau**2).mean() for tau in taus])
    weights = weights / weights.sum() if weights.sum() else np.full(len(taus), 1 / len(taus))
    elected = np.where(taus.sum(0) >= 0, 1, -1)
    agreeing = (np.sign(taus) == elected) * weights.reshape(-1, *[1] * (taus.ndim - 1))
    divisor = agreeing.sum(0)
    return (agreeing * taus).sum(0) / np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_sce(inputs: list[dict[str, Array]], density: float) -> None:
    check(rules.Sce(density), inputs, lambda taus: sce(taus, density))
    check(rules.Sce(density, 0.5), inputs, lambda taus: 0.5 * sce(taus, density))


def test_sce_counts_entries_that_differ_over_many_blocks() -> None:
    """A tensor of many blocks of which one half is equal in all tasks, with variances that are often equal."""
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randint(-2, 3, (400, 500), generator=generator).double() for _ in range(3)]
    for tau in taus[1:]:
        tau[:200] = taus[0][:200]
    check(rules.Sce(0.3), [{"w": tau.numpy()} for tau in taus], lambda found: sce(found, 0.3))


def della(tau: Array, name: str, task: str, density: float, epsilon: float, seed: int) -> Array:
    rows = tau.reshape(len(tau) if tau.ndim > 1 else 1, -1)
    kept = np.empty_like(rows)
    for row, found in zip(np.abs(rows), kept, strict=True):
        for rank, position in enumerate(np.argsort(row, kind="stable")):
            found[position] = density - epsilon + rank / max(1, len(row) - 1) * 2 * epsilon
    if rows.shape[1] == 1:
        kept[:] = density
    draws = splitmix64(derive_seed(seed, task, name), tau.size)  # uniform over 0..2^64
    remains = np.array(
        [draw >= round((1 - float(share)) * 2**64) for draw, share in zip(draws, kept.ravel(), strict=True)]
    )
    return (rows.ravel() * remains / kept.ravel()).reshape(tau.shape)


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator in Python's integers, after Vigna's splitmix64.c, with the upper half of its range first."""
    mask, drawn = (1 << 64) - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        mixed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        drawn.append(((mixed ^ (mixed >> 31)) + (1 << 63)) & mask)
    return drawn


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_della(inputs: list[dict[str, Array]], density: float) -> None:
    names = {value.shape: name for name, value in inputs[0].items()}
    rounded = [{name: value.astype(np.float32).astype(float) for name, value in each.items()} for each in inputs]

    def reference(taus: list[Array]) -> Array:
        name = names[taus[0].shape]
        return 0.4 * sum(della(tau, name, f"task {number}", density, 0.2, 5) for number, tau in enumerate(taus))

    check(rules.Della(rules.TaskArithmetic(0.4), density, epsilon=0.2, seed=5), rounded, reference)


def test_della_keeps_large_entries_more_often_and_the_sum_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(300, 400, generator=generator)
    base = {"w": torch.zeros(300, 400)}
    fused = [
        fuse(rules.Della(rules.TaskArithmetic(1.0), 0.4, 0.3, seed=seed), base, {"a": {"w": tau}}).state["w"]
        for seed in range(40)
    ]
    rank = tau.abs().argsort(1).argsort(1) / 399
    often = sum((each != 0).float() for each in fused) / len(fused)
    for low, high in ((0.0, 0.1), (0.45, 0.55), (0.9, 1.0)):
        chosen = (rank >= low) & (rank <= high)
        assert float(often[chosen].mean()) == pytest.approx(0.1 + 0.6 * (low + high) / 2, abs=0.01)
    assert float(sum(each.double().sum() for each in fused) / len(fused)) == pytest.approx(float(tau.sum()), abs=300)


def test_della_before_rules_of_every_kind(task_matrices: Any) -> None:
    """Trims, elections, norms and whole matrices come after it as after DARE; MetaGPT's norms are those before."""
    base = {"w": torch.zeros(36, 28), "v": torch.zeros(30)}
    generator = torch.Generator().manual_seed(1)
    vectors = {
        f"task {number}": {"w": each.float(), "v": torch.randn(30, generator=generator)}
        for number, each in enumerate(task_matrices("full"))
    }
    dropped = {
        task: {
            name: torch.from_numpy(della(tau.double().numpy(), name, task, 0.5, 0.1, 0)).float()
            for name, tau in state.items()
        }
        for task, state in vectors.items()
    }
    inner: Any
    for inner in (rules.Ties(), rules.DisjointMean(), rules.TsvM(), rules.Knots(), rules.ModelStock()):
        found, expected = fuse(rules.Della(inner), base, vectors).state, fuse(inner, base, dropped).state
        for name in base:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for rescale in ("probability", "l1", "none"):
        found = fuse(rules.Della(rules.Metagpt(), rescale=rescale), base, vectors).scaling_coefficients
        assert found == fuse(rules.Metagpt(), base, vectors).scaling_coefficients
    kept = fuse(rules.Della(rules.TaskArithmetic(1.0), rescale="l1"), base, {"a": vectors["task 0"]}).state
    for name in base:
        assert float(kept[name].abs().sum()) == pytest.approx(float(vectors["task 0"][name].abs().sum()), rel=1e-5)


def wudi(taus: list[Array], solver: str, steps: int = 300, rate: float = 0.003) -> Array:
    """Descent on the objective as it stands, with the gradient of each task's part by itself."""
    taus = [tau for tau in taus if tau.any()]
    if not taus:
        return np.zeros(())
    if solver == "closed_form":
        inputs = np.vstack([tau / np.linalg.norm(tau) for tau in taus])
        outputs = np.vstack([tau @ tau.T / np.linalg.norm(tau) for tau in taus])
        return np.linalg.lstsq(inputs, outputs, rcond=1e-5)[0].T
    point, first, second = sum(taus), 0.0, 0.0
    unit = math.sqrt(sum(np.sum(tau**2) for tau in taus) / point.size)
    scale = np.linalg.norm(sum(tau @ tau.T @ tau / np.sum(tau**2) for tau in taus))
    for step in range(1, steps + 1):
        gradient = sum((point - tau) @ tau.T @ tau / np.sum(tau**2) for tau in taus)
        if np.linalg.norm(gradient) <= 1e-6 * scale:
            break
        square = gradient**2 if solver == "adam" else np.mean(gradient**2)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * square
        corrected = np.sqrt(second / (1 - 0.999**step)) + 1e-8 * unit
        point = point - rate * unit * first / (1 - 0.9**step) / corrected
    return point


def objective(point: Array, taus: list[Array]) -> float:
    return sum(np.sum(((point - tau) @ tau.T) ** 2) / np.sum(tau**2) for tau in taus)


@pytest.mark.parametrize("solver", ["gradient", "adam"])
def test_wudi(inputs: list[dict[str, Array]], solver: Any) -> None:
    check(rules.Wudi(solver=solver), inputs, lambda taus: wudi(taus, solver), mean)


@pytest.mark.parametrize("kind", KINDS)
def test_wudi_in_closed_form(kind: str, task_matrices: Any) -> None:
    inputs = [{"w": each.numpy()} for each in task_matrices(kind, 30, 28)]
    check(rules.Wudi(solver="closed_form"), inputs, lambda taus: wudi(taus, "closed_form"))


def test_wudi_disturbs_the_tasks_less_and_less(task_matrices: Any) -> None:
    """The objective falls with the steps to that of the closed form, whatever the size of the task vectors."""
    for kind in ("full", "low rank", "equal A"):
        taus = task_matrices(kind, 30, 28)
        base = {"w": torch.zeros(30, 28, dtype=torch.float64)}

        def update(rule: Any, size: float = 1.0, taus: list = taus, base: dict = base) -> Array:
            vectors = {str(number): {"w": size * tau} for number, tau in enumerate(taus)}
            return fuse(rule, base, vectors).state["w"].numpy() / size

        arrays = [tau.numpy() for tau in taus]
        start = objective(sum(arrays), arrays)
        found = [objective(update(rules.Wudi(num_steps=steps)), arrays) / start for steps in (1, 30, 300, 3000)]
        assert all(later < earlier for earlier, later in itertools.pairwise(found)), found
        limit = objective(update(rules.Wudi(solver="closed_form")), arrays) / start
        assert limit <= found[-1] < limit + 0.05
        for solver in ("gradient", "adam"):
            rule = rules.Wudi(solver=solver)
            for size in (100.0, 1e-4):
                np.testing.assert_allclose(update(rule, size), update(rule), rtol=1e-9, atol=1e-9)


def test_zero_task_vectors_added_change_nothing(task_matrices: Any) -> None:
    taus = task_matrices("low rank", 30, 24)
    base = {"w": torch.zeros(30, 24, dtype=torch.float64)}
    vectors = {str(number): {"w": tau} for number, tau in enumerate(taus)}
    more = vectors | {"zero": {"w": torch.zeros(30, 24, dtype=torch.float64)}}
    for rule in (
        rules.TaskArithmetic(0.3), rules.Metagpt(), rules.Ties(), rules.Wudi(), rules.Wudi(solver="adam"),
        rules.Wudi(solver="closed_form"), rules.Consensus(), rules.LocalizeAndStitch(),
    ):  # fmt: skip
        torch.testing.assert_close(fuse(rule, base, more).state, fuse(rule, base, vectors).state, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rank", "num_tasks", "refused"), [(3, 4, False), (3, 7, True), (10, 4, True), (10, 5, False), (24, 2, False)]
)
def test_the_closed_form_is_refused_where_ranks_fill_the_width(rank: int, num_tasks: int, refused: bool) -> None:
    """30 x 24, of which up to 12 dimensions used, or twice the width, are safe."""
    generator = torch.Generator().manual_seed(0)
    vectors = {
        str(task): {"w": torch.randn(30, rank, generator=generator) @ torch.randn(rank, 24, generator=generator)}
        for task in range(num_tasks)
    }
    base = {"w": torch.zeros(30, 24)}
    if refused:
        with pytest.raises(InputError, match="together, near the width of 24; say solver: gradient"):
            fuse(rules.Wudi(solver="closed_form"), base, vectors)
    else:
        assert fuse(rules.Wudi(solver="closed_form"), base, vectors).state["w"].any()


@pytest.mark.parametrize("size", [1e3, 1e-3])
@pytest.mark.parametrize(
    "rule",
    [
        rules.TsvM(), rules.IsoC(), rules.IsoCts(), rules.Wudi(), rules.Wudi(solver="adam"),
        rules.Wudi(solver="closed_form"), rules.Consensus(), rules.LocalizeAndStitch(), rules.ModelStock(),
        rules.Sce(0.3), rules.Della(rules.TaskArithmetic(0.5)), rules.Metagpt(),
    ],
    ids=str,
)  # fmt: skip
def test_larger_task_vectors_give_as_much_larger_an_update(rule: Any, size: float, task_matrices: Any) -> None:
    """Not KnOTS, whose cut is absolute, nor what turns the weights themselves."""
    base = {"w": torch.zeros(40, 36, dtype=torch.float64)}
    taus = task_matrices("low rank", 40, 36)
    updates = [
        fuse(rule, base, {str(number): {"w": scale * tau} for number, tau in enumerate(taus)}).state["w"] / scale
        for scale in (1.0, size)
    ]
    torch.testing.assert_close(*updates, rtol=1e-9, atol=1e-9)


def test_remarks_come_with_adapters_too() -> None:
    """A linear rule over adapters writes no weights, and says what it found all the same."""
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.6, 0.8]])
    made = {task: Adapter({"w": Factors(lora_a, torch.ones(3, 1), 1.0)}) for task, lora_a in (("a", one), ("b", other))}
    fused = fuse_weights(rules.ModelStock(), {"w.weight": torch.zeros(3, 2)}, made)
    assert isinstance(fused.weights, Adapter)
    assert "mean cosine of the task vectors is -0.6000: a step of -3.0000" in fused.remarks["w.weight"][0]
    torch.testing.assert_close(fused.weights.task_vector()["w.weight"], -1.5 * torch.ones(3, 1) @ (one + other))
