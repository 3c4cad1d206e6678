"""EMR and TALL, entry by entry, against loops in float64; and what must be true of masks of one vector."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusionlab
from fusionlab import rules
from fusionlab.blocks.bits import pack, packed_size, unpack
from fusionlab.engine import Resources
from fusionlab.errors import InputError
from fusionlab.fusion.by_task import acting
from fusionlab.fusion.making import fuse_weights
from fusionlab.tensors.masked import MaskedVectors

KINDS = ["full", "low rank", "equal A", "equal B", "A apart by 1e-2", "one zero", "all zero", "one task", "twice"]
States = dict[str, dict[str, Tensor]]
RULES = {"emr": rules.Emr(), "tall": rules.Tall(0.35), "tall by task": rules.Tall()}


def drawn(kind: str, task_matrices: Any, dtype: torch.dtype = torch.float64) -> States:
    """Task vectors of one structure: two matrices and a vector, of numbers of entries that no 8 divides."""
    first, second = task_matrices(kind, 15, 11), task_matrices(kind, 9, 13, seed=1)
    return {
        f"task {number}": {"first": one.to(dtype), "second": other.to(dtype), "norm": one.sum(0).to(dtype)}
        for number, (one, other) in enumerate(zip(first, second, strict=True))
    }


def thresholds(rule: Any, vectors: States) -> Any:
    """TALL with a threshold of its own for each task, where it has none."""
    if isinstance(rule, rules.Tall) and rule.mask_threshold is None:
        return rules.Tall({task: 0.2 + 0.1 * number for number, task in enumerate(vectors)})
    return rule


def masked(rule: Any, vectors: States, base: dict[str, Tensor] | None = None, **more: Any) -> MaskedVectors:
    base = base or {name: torch.zeros_like(each) for name, each in next(iter(vectors.values())).items()}
    finetuned = {task: {name: base[name] + each for name, each in of.items()} for task, of in vectors.items()}
    weights = fuse_weights(rule, base, finetuned, **more).weights
    assert isinstance(weights, MaskedVectors)
    return weights


def vectors_of(weights: MaskedVectors) -> States:
    return {task: {name: weights.of(task).read(name) for name in weights.unified.tensors} for task in weights.tasks}


def emr(taus: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    tasks, found = list(taus), {task: {} for task in taus}
    absolute, kept = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0.0)
    for name in taus[tasks[0]]:
        for task in tasks:
            found[task][name] = np.zeros_like(taus[task][name])
        for place in np.ndindex(taus[tasks[0]][name].shape):
            values = {task: taus[task][name][place] for task in tasks}
            sign = 1.0 if math.fsum(values.values()) > 0 else -1.0
            largest = max((abs(value) for value in values.values() if value * sign > 0), default=0.0)
            for task, value in values.items():
                absolute[task] += abs(value)
                if value * sign > 0:
                    kept[task] += largest
                    found[task][name][place] = sign * largest
    scales = {task: absolute[task] / kept[task] if kept[task] else 0.0 for task in tasks}
    return {task: {name: scales[task] * each for name, each in of.items()} for task, of in found.items()}


def tall(taus: dict[str, dict[str, np.ndarray]], lambdas: Any) -> dict[str, dict[str, np.ndarray]]:
    found = {task: {name: np.zeros_like(each) for name, each in of.items()} for task, of in taus.items()}
    for task, of in found.items():
        for name, values in of.items():
            for place in np.ndindex(values.shape):
                total = sum(each[name][place] for each in taus.values())
                own = taus[task][name][place]
                threshold = lambdas[task] if isinstance(lambdas, dict) else lambdas
                if abs(own) > threshold * abs(total - own):
                    values[place] = total
    return found


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_entry_of_every_task(
    name: str, kind: str, dtype: torch.dtype, tolerance: float, task_matrices: Any
) -> None:
    vectors = drawn(kind, task_matrices, dtype)
    rule = thresholds(RULES[name], vectors)
    taus = {task: {key: each.double().numpy() for key, each in of.items()} for task, of in vectors.items()}
    expected = emr(taus) if name == "emr" else tall(taus, rule.mask_threshold)
    for task, of in vectors_of(masked(rule, vectors)).items():
        for key, found in of.items():
            assert found.dtype == dtype
            scale = max(float(np.abs(each[key]).max()) for each in taus.values()) or 1.0
            np.testing.assert_allclose(found.double().numpy(), expected[task][key], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", RULES)
def test_zero_task_vectors_added_change_nothing(name: str, task_matrices: Any) -> None:
    vectors = drawn("full", task_matrices)
    rule = rules.Tall(0.35) if name != "emr" else rules.Emr()
    zeros = {"zero": {key: torch.zeros_like(each) for key, each in vectors["task 0"].items()}}
    alone, beside = vectors_of(masked(rule, vectors)), vectors_of(masked(rule, vectors | zeros))
    for task, of in alone.items():
        assert all(torch.equal(beside[task][key], each) for key, each in of.items())
    assert not any(each.any() for each in beside["zero"].values())


@pytest.mark.parametrize("rule", [rules.Emr(), rules.Tall(0.6)])
def test_one_task_gives_its_model(rule: Any, task_matrices: Any) -> None:
    vectors = drawn("one task", task_matrices, torch.float32)
    base = {
        key: torch.randn(each.shape, generator=torch.Generator().manual_seed(3))
        for key, each in vectors["task 0"].items()
    }
    weights = masked(rule, vectors, base)
    assert weights.scales == {"task 0": 1.0}
    found = fusionlab.weights_of(weights, "task 0", base)
    assert all(
        torch.equal(found[key], base[key] + ((base[key] + each) - base[key])) for key, each in vectors["task 0"].items()
    )


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_tasks_is_irrelevant(name: str, task_matrices: Any) -> None:
    vectors = drawn("full", task_matrices)
    rule = thresholds(RULES[name], vectors)
    forwards, backwards = masked(rule, vectors), masked(rule, dict(reversed(vectors.items())))
    assert backwards.tasks == tuple(reversed(forwards.tasks))
    for task, of in vectors_of(forwards).items():
        for key, each in of.items():
            torch.testing.assert_close(vectors_of(backwards)[task][key], each, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [1e-30, 100.0])
def test_larger_task_vectors_give_as_much_larger_ones(name: str, size: float, task_matrices: Any) -> None:
    vectors = drawn("full", task_matrices, torch.float32)
    larger = {task: {key: size * each for key, each in of.items()} for task, of in vectors.items()}
    rule = thresholds(RULES[name], vectors)
    found, expected = vectors_of(masked(rule, larger)), vectors_of(masked(rule, vectors))
    for task, of in expected.items():
        for key, each in of.items():
            torch.testing.assert_close(found[task][key] / size, each, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_tasks", [1, 7, 8, 9, 20])
def test_any_number_of_tasks_and_any_block(num_tasks: int) -> None:
    """A bit an entry and task; the same bits whatever is read at once."""
    generator = torch.Generator().manual_seed(num_tasks)
    vectors = {f"{task}": {"w": torch.randn(3, 40_001, generator=generator)} for task in range(num_tasks)}
    whole, pieces = (masked(rules.Emr(), vectors, resources=Resources(*each)) for each in ((1, 10**9), (2, 10**8)))
    assert whole.masks.tensors["w"].shape == (num_tasks, packed_size(120_003))
    assert torch.equal(whole.masks.read("w"), pieces.masks.read("w"))
    assert torch.equal(whole.unified.read("w"), pieces.unified.read("w"))
    assert whole.scales == pieces.scales
    stacked = torch.stack([of["w"] for of in vectors.values()])
    agree = torch.sign(stacked) == torch.where(stacked.sum(0) > 0, 1.0, -1.0)
    for row, (task, of) in enumerate(vectors_of(whole).items()):
        assert torch.equal(of["w"] != 0, agree[row])
        part = torch.empty(501)
        whole.of(task).read_into("w", 32_771, part)
        assert torch.equal(part, of["w"].flatten()[32_771:33_272])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_bits_come_back(count: int) -> None:
    mask = torch.rand(3, count, generator=torch.Generator().manual_seed(count)) > 0.5
    packed = pack(mask)
    assert packed.shape == (3, packed_size(count))
    for row, bits in zip(packed, mask, strict=True):
        assert torch.equal(unpack(row, 0, count).bool(), bits)
        assert torch.equal(unpack(row, count // 2, count - count // 2).bool(), bits[count // 2 :])


def test_equal_masks_of_a_block_are_chosen_by_its_own_entries() -> None:
    """A sum of zero counts as minus, and nothing of a task leaves the base."""
    vectors = {"a": {"w": torch.tensor([1.0, 2.0, 0.0])}, "b": {"w": torch.tensor([-1.0, 1.0, 0.0])}}
    found = masked(rules.Emr(), vectors)
    assert found.unified.read("w").tolist() == [-1.0, 2.0, 0.0]
    assert found.scales == {"a": 3 / 2, "b": 2 / 3}
    assert vectors_of(found)["b"]["w"].tolist() == pytest.approx([-2 / 3, 4 / 3, 0.0])
    lost = {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([-2.0])}}
    assert masked(rules.Emr(), lost).scales == {"a": 0.0, "b": 1.0}


def test_each_task_acts_under_its_own_weights(task_matrices: Any) -> None:
    vectors = drawn("full", task_matrices)
    base = {name: torch.zeros_like(each) for name, each in vectors["task 0"].items()}
    weights = masked(rules.Emr(), vectors)
    found = {task: state for state, [task] in acting(weights, ["task 2", "task 0"], base)}
    assert list(found) == ["task 2", "task 0"]
    for task, state in found.items():
        assert all(torch.equal(state[name], each) for name, each in vectors_of(weights)[task].items())
    assert list(acting(base, ["a", "b"], base)) == [(base, ["a", "b"])]


def test_what_does_not_fit_is_refused(task_matrices: Any) -> None:
    vectors = drawn("full", task_matrices)
    with pytest.raises(InputError, match=r"tall.mask_threshold has no value for task 1"):
        masked(rules.Tall({"task 0": 0.2}), vectors)
    with pytest.raises(InputError, match=r"expected positive numbers, got 0"):
        rules.Tall(0)
    weights = masked(rules.Emr(), vectors)
    with pytest.raises(InputError, match=r"no mask for task 'tusk 1': these weights know task 0"):
        weights.of("tusk 1")
    with pytest.raises(InputError, match=r"the unified vector has second, the base not"):
        fusionlab.weights_of(weights, "task 1", {"first": torch.zeros(15, 11), "norm": torch.zeros(11)})
    with pytest.raises(InputError, match=r"dare.rule: emr makes a model for each task, not one of all"):
        rules.from_config({"class_path": "dare", "init_args": {"rule": "emr"}})
    with pytest.raises(InputError, match=r"tall.mask_threshold: expected one value for all tensors"):
        rules.from_config({"class_path": "tall", "init_args": {"mask_threshold": [0.2, 0.4]}})
    bad = {"a": {"w": torch.tensor([1.0, math.nan])}}
    with pytest.raises(InputError, match="w of 'a' has NaN or Inf"):
        masked(rules.Tall(0.4), bad)
