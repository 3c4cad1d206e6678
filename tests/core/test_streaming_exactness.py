"""The same bits on any number of threads, any block size, and any company in a block."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch

from fusionlab import rules
from fusionlab.blocks import kernels
from fusionlab.blocks.kernels import CUT
from fusionlab.blocks.sums import exact_sum, inner_products, lane_sums, partial_sums, squared_norms
from fusionlab.blocks.task_vectors import TaskVectors
from fusionlab.engine import Resources, StateWeights, TaskInput, fuse, make_plan, passes, run, visiting
from fusionlab.engine.job import Job, block_bytes
from fusionlab.engine.reading import count_changes
from fusionlab.errors import InputError
from fusionlab.rules.base import add_scaled

SIZES = {
    "layers.0.w": (5 * CUT // 64, 64),
    "layers.0.norm": (77,),
    "layers.1.w": (3, CUT + 5),
    "head": (CUT,),
    "one": (),
}
RULES = {
    "average": rules.Average(),
    "task_arithmetic": rules.TaskArithmetic(0.3),
    "halves": rules.TaskArithmetic(0.5),
    "metagpt": rules.Metagpt(),
    "metagpt by tensor": rules.Metagpt(scope="tensor"),
    "ties": rules.Ties(),
    "ties by tensor": rules.Ties(scope="tensor", election="count"),
    "dare, metagpt": rules.Dare(rules.Metagpt(), rescale="l1"),
    "trim, metagpt": rules.Trim(rules.Metagpt(), at_threshold="first"),
    "dare, ties": rules.Dare(rules.Ties(0.3)),
    "breadcrumbs": rules.Breadcrumbs(),
    "lines": rules.Lines(beta=0.5),
    "consensus": rules.Consensus(),
    "localize and stitch": rules.LocalizeAndStitch(),
    "model stock": rules.ModelStock(),
    "sce": rules.Sce(0.3),
    "sce of all": rules.Sce(),
    "karcher": rules.Karcher(),
}


@pytest.fixture(scope="module")
def states() -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SIZES.items()}
    finetuned = {
        task: {
            name: (base[name].float() + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in SIZES.items()
        }
        for task in "abc"
    }
    return base | {"ids": torch.arange(9)}, {
        task: state | {"ids": torch.arange(9)} for task, state in finetuned.items()
    }


@pytest.mark.parametrize("name", RULES)
def test_threads_and_memory_do_not_change_a_bit(name: str, states: tuple[dict, dict]) -> None:
    base, finetuned = states
    smallest = block_bytes(3) * CUT
    one = fuse(RULES[name], base, finetuned=finetuned, threads=1, memory_budget=smallest)
    before = torch.get_num_threads()
    for threads, memory_budget in ((1, 10**9), (2, 3 * smallest), (5, 10**9)):
        torch.set_num_threads(threads)
        other = fuse(RULES[name], base, finetuned=finetuned, threads=threads, memory_budget=memory_budget)
        torch.set_num_threads(before)
        assert all(torch.equal(other.state[key], one.state[key]) for key in base)
        assert (other.scaling_coefficients, other.norms, other.cosines) == (
            one.scaling_coefficients, one.norms, one.cosines,
        )  # fmt: skip


@pytest.mark.parametrize("elements", [1, 77, CUT - 1, CUT, CUT + 1, 3 * CUT + 12_345])
def test_a_cut_has_the_same_sum_in_any_block(elements: int) -> None:
    values = torch.randn(2, elements, dtype=torch.float64, generator=torch.Generator().manual_seed(elements))
    together = partial_sums(values.clone())
    assert together.shape == (2, math.ceil(elements / CUT))
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        for row in range(2):
            alone = [partial_sums(piece.clone().view(1, -1))[0, 0] for piece in values[row].split(CUT)]
            assert torch.equal(together[row], torch.stack(alone))
    torch.set_num_threads(before)
    torch.testing.assert_close(together.sum(1), values.sum(1), rtol=1e-12, atol=1e-10)


def test_squared_norms_and_inner_products_leave_the_task_vectors_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        stacked = torch.randn(3, CUT + 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
        kept = stacked.clone()
        vectors = TaskVectors(("a", "b", "c"), stacked)
        norms, products = squared_norms(vectors), inner_products(vectors)
        assert torch.equal(stacked, kept)
        gram = kept.double() @ kept.double().T
        torch.testing.assert_close(torch.stack([norms[f"squared_norm/{task}"].sum() for task in "abc"]), gram.diag())
        assert products.keys() == {"inner_product/0/1", "inner_product/0/2", "inner_product/1/2"}
        torch.testing.assert_close(products["inner_product/1/2"].sum(), gram[1, 2])


def test_expansions_add_up_like_all_their_parts() -> None:
    parts = (torch.randn(5_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 100).exp2().tolist()
    expansions = [exact_sum(parts[start : start + 97]) for start in range(0, len(parts), 97)]
    assert math.fsum(part for expansion in expansions for part in expansion) == math.fsum(parts)
    assert exact_sum([]) == exact_sum([0.0]) == ()


def test_results_are_summed_in_float32_and_rounded_once() -> None:
    """Eight bf16 steps of a quarter ulp are all lost when they are added one by one."""
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    vectors = {str(k): {"w": torch.full((4,), 2.0**-9)} for k in range(8)}
    assert fuse(rules.TaskArithmetic(1.0), base, vectors).state["w"].tolist() == [1.015625] * 4


def test_float64_states_stay_float64() -> None:
    base = {"w": torch.ones(3, dtype=torch.float64)}
    finetuned = {"a": {"w": torch.ones(3, dtype=torch.float64) + 1e-12}}
    fused = fuse(rules.TaskArithmetic(1.0), base, finetuned=finetuned).state["w"]
    assert torch.equal(fused, finetuned["a"]["w"])


def test_inputs_are_not_changed_and_nothing_needs_gradients(states: tuple[dict, dict]) -> None:
    base, finetuned = states
    base = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in base.items()}
    kept = {name: tensor.detach().clone() for name, tensor in base.items()}
    fused = fuse(rules.Ties(), base, finetuned=finetuned)
    assert all(torch.equal(base[name], kept[name]) for name in base)
    assert not any(tensor.requires_grad for tensor in fused.state.values())
    assert fused.state["ids"].data_ptr() != base["ids"].data_ptr()


def test_a_run_without_a_sink_tells_what_fuse_reports(states: tuple[dict, dict]) -> None:
    base, finetuned = states
    weights, inputs = StateWeights(base), {task: TaskInput(StateWeights(state)) for task, state in finetuned.items()}
    dtypes = {name: info.dtype for name, info in weights.tensors.items()}
    for rule in (rules.Metagpt(), rules.Metagpt(scope="layer"), rules.TaskArithmetic({"a": 0.1, "b": 0.2, "c": 0.3})):
        measured = run(Job(rule, weights, inputs, make_plan(weights, inputs), dtypes), None, Resources())
        fused = fuse(rule, base, finetuned=finetuned)
        assert measured.scaling_coefficients == fused.scaling_coefficients
        assert (measured.norms, measured.cosines) == (fused.norms, fused.cosines)
        assert measured.coefficients["head"].keys() == {"a", "b", "c"}


def test_tied_tensors_are_fused_once_and_stay_tied() -> None:
    tensor, tuned = torch.randn(4, 5), torch.randn(4, 5)
    base = {"embed": tensor, "w": torch.zeros(2), "head": tensor}
    finetuned = {
        "a": {"embed": tuned, "w": torch.ones(2), "head": tuned},
        "b": {"w": torch.ones(2), "head": tensor + 1},
    }
    fused = fuse(rules.TaskArithmetic(1.0), base, finetuned={"a": finetuned["a"]})
    assert fused.state["embed"].data_ptr() == fused.state["head"].data_ptr()
    assert fused.norms["a"] == pytest.approx(math.sqrt((tuned - tensor).double().pow(2).sum().item() + 2))
    both = fuse(rules.TaskArithmetic(1.0), base, finetuned=finetuned)  # b has it under one name only
    torch.testing.assert_close(both.state["embed"], tuned + 1)


def test_tensors_untied_by_one_input_are_fused_apart() -> None:
    tensor = torch.randn(4, 5)
    base = {"embed": tensor, "head": tensor}
    finetuned = {"a": {"embed": tensor + 1, "head": tensor + 2}}
    fused = fuse(rules.TaskArithmetic(1.0), base, finetuned=finetuned).state
    torch.testing.assert_close(fused["embed"], tensor + 1)
    torch.testing.assert_close(fused["head"], tensor + 2)


def test_plan_says_why_a_tensor_is_not_fused() -> None:
    base = {"w": torch.zeros(2), "ids": torch.arange(2), "embed": torch.zeros(5, 2), "empty": torch.zeros(0)}
    tuned = base | {"embed": torch.zeros(6, 2), "extra": torch.zeros(1)}
    plan = make_plan(StateWeights(base), {"a": TaskInput(StateWeights(tuned))}, mismatched_tensors="base")
    assert plan.fused == ("w",)
    assert plan.copied == {
        "ids": "not floating point, equal everywhere",
        "embed": "shape (6, 2) in 'a' (expected (5, 2))",
        "empty": "empty",
    }
    assert plan.ignored == {"a": ("extra",)}


def test_mismatched_tensors_take_the_base() -> None:
    base = {"w": torch.zeros(2), "embed": torch.ones(5, 2), "ids": torch.arange(3)}
    tuned = {"w": torch.ones(2), "embed": torch.zeros(6, 2), "ids": torch.arange(3) + 1}
    fused = fuse(rules.TaskArithmetic(1.0), base, finetuned={"a": tuned}, mismatched_tensors="base").state
    assert torch.equal(fused["w"], tuned["w"])
    assert torch.equal(fused["embed"], base["embed"])
    assert torch.equal(fused["ids"], base["ids"])


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({"w": torch.zeros(3)}, r"w: shape \(3,\) in 'a' \(expected \(2,\)\)"),
        ({}, r"w: missing in 'a'"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, r"not in the base: v"),
        ({"w": torch.tensor([1, 2])}, r"w: dtype torch.int64 in 'a'"),
        ({"w": torch.tensor([1.0, math.nan])}, r"w of 'a' has NaN or Inf"),
        ({"w": torch.tensor([1.0, math.inf])}, r"w of 'a' has NaN or Inf"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(tuned: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fuse(rules.TaskArithmetic(1.0), {"w": torch.zeros(2)}, finetuned={"a": tuned})


@pytest.mark.parametrize("rule", [rules.Metagpt(), rules.Ties(), rules.TsvM()], ids=lambda rule: type(rule).__name__)
def test_nan_in_the_base_is_named_as_such(rule: rules.Rule) -> None:
    base = {"v": torch.ones(3), "w": torch.tensor([[1.0, math.nan]])}
    finetuned = {"a": {"v": torch.zeros(3), "w": torch.ones(1, 2)}}
    with pytest.raises(InputError, match="w of the base has NaN or Inf"):
        fuse(rule, base, finetuned=finetuned)
    untouched = fuse(rule, base, task_vectors={"a": {"v": torch.ones(3)}}).state["w"]
    assert torch.equal(untouched.view(torch.int32), base["w"].view(torch.int32))  # copied, whatever it holds


def test_other_integer_buffers_are_refused() -> None:
    base = {"w": torch.zeros(2), "ids": torch.arange(3)}
    with pytest.raises(InputError, match="ids: an integer buffer with other values in 'a'"):
        fuse(rules.Average(), base, finetuned={"a": {"w": torch.ones(2), "ids": torch.arange(3) + 1}})


def test_values_that_overflow_the_stored_dtype_are_refused() -> None:
    base = {"w": torch.full((2,), 6e4, dtype=torch.float16)}
    with pytest.raises(InputError, match=r"w: the fused values overflow torch\.float16"):
        fuse(rules.TaskArithmetic(1.0), base, task_vectors={"a": {"w": torch.full((2,), 1e4)}})


def test_a_memory_budget_that_is_too_small_is_refused_with_both_numbers() -> None:
    state = {"w": torch.zeros(500, 500)}
    with pytest.raises(InputError, match=r"needs .* bytes, the budget is 1,000"):
        fuse(rules.Average(), state, finetuned={"a": state}, memory_budget=1_000)
    with pytest.raises(InputError, match=r"whole of w \(500, 500\) needs 14,000,000 bytes, the budget is 10,000,000"):
        fuse(rules.TsvM(), state, finetuned={"a": state}, memory_budget=10_000_000)


def test_no_inputs_and_two_kinds_of_one_task_are_refused() -> None:
    state = {"w": torch.zeros(2)}
    with pytest.raises(InputError, match="nothing to fuse"):
        fuse(rules.Average(), state)
    with pytest.raises(InputError, match="both a task vector and a fine-tuned state are given for a"):
        fuse(rules.Average(), state, {"a": state}, finetuned={"a": state})
    with pytest.raises(InputError, match="no parameter is left to fuse"):
        fuse(rules.Average(), state, finetuned={"a": {"w": torch.zeros(3)}}, mismatched_tensors="base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, 255, 2049, CUT, 2 * CUT + 12_345])
def test_compiled_sums_have_the_bits_of_whole_tensor_operations(elements: int, dtype: torch.dtype) -> None:
    """The order of every addition is written out, so a processor's registers do not matter."""
    generator = torch.Generator().manual_seed(elements)
    stacked = torch.randn(3, elements, dtype=dtype, generator=generator) * 10
    found = inner_products(TaskVectors(("a", "b", "c"), stacked), norms=True)
    wide = stacked.double()
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)):
        key = f"squared_norm/{'abc'[i]}" if i == j else f"inner_product/{i}/{j}"
        assert torch.equal(found[key], lane_sums(wide[i] * wide[j]))
        assert torch.equal(found[key], partial_sums(wide[i] * wide[j]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_update_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    base, stacked = (torch.randn(shape, dtype=dtype, generator=generator) for shape in ((5_003,), (3, 5_003)))
    coefficients = {"a": 0.3, "b": -1.7, "c": 1 / 3}
    expected = base
    for row, coefficient in zip(stacked, coefficients.values(), strict=True):
        expected = expected + row * coefficient
    kept = base.clone()
    assert torch.equal(add_scaled(base, TaskVectors(tuple("abc"), stacked), coefficients), expected)
    assert torch.equal(base, kept)


def test_changes_are_counted_where_they_are() -> None:
    base = torch.zeros(5_000)
    fused = base.clone()
    fused[[0, 4_000, 4_999]] = torch.tensor([1.0, 2.0, -1e-9])
    stored = fused.clone()
    stored[4_999] = 0.0
    assert count_changes(fused, stored, base, base).tolist() == [3, 2, 0]
    stored[[1, 2, 4_998]] = torch.tensor([math.inf, math.nan, -math.inf])
    assert count_changes(fused, stored, base, base).tolist() == [3, 5, 3]


LINEAR = ["average", "halves", "task_arithmetic", "metagpt", "metagpt by tensor", "lines"]


@pytest.mark.parametrize("name", LINEAR)
def test_the_short_way_of_bfloat16_gives_the_bits_of_the_general_one(
    name: str, states: tuple[dict, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, finetuned = states
    visited, visit = set(), passes.visit_bfloat16

    def note(job: Job, key: str, *args: int, **options: Any) -> Any:
        visited.add(key)
        return visit(job, key, *args, **options)

    monkeypatch.setattr(passes, "visit_bfloat16", note)
    short = fuse(RULES[name], base, finetuned=finetuned)
    assert visited == set(SIZES)
    monkeypatch.setattr(visiting, "bfloat16_names", lambda job: frozenset())
    general = fuse(RULES[name], base, finetuned=finetuned)
    assert all(torch.equal(short.state[key].view(torch.int16), general.state[key].view(torch.int16)) for key in SIZES)
    assert (short.scaling_coefficients, short.norms, short.cosines) == (
        general.scaling_coefficients, general.norms, general.cosines,
    )  # fmt: skip


def test_one_float32_model_takes_the_general_way(states: tuple[dict, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    base, finetuned = states
    mixed = finetuned | {"b": finetuned["b"] | {key: finetuned["b"][key].float() for key in SIZES}}
    wide = {key: base[key].float() if key in SIZES else base[key] for key in base}
    monkeypatch.setattr(passes, "visit_bfloat16", lambda *args, **options: pytest.fail("taken for a float32 input"))
    expected = fuse(rules.Average(), wide, finetuned=mixed).state
    found = fuse(rules.Average(), base, finetuned=mixed).state
    assert all(torch.equal(found[key], expected[key].bfloat16()) for key in SIZES)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_short_way_names_what_is_not_finite(value: float, states: tuple[dict, dict]) -> None:
    base, finetuned = states
    broken = {key: tensor.clone() for key, tensor in finetuned["c"].items()}
    broken["head"][CUT - 1] = value
    with pytest.raises(InputError, match=r"head of 'c' has NaN or Inf"):
        fuse(rules.TaskArithmetic(0.3), base, finetuned=finetuned | {"c": broken})
    zeros, ones = ({"w": torch.full((4,), size, dtype=torch.bfloat16)} for size in (0.0, 1.0))
    with pytest.raises(InputError, match=r"w: the fused values overflow torch.bfloat16"):
        fuse(rules.TaskArithmetic(3.4e38), zeros, finetuned={"a": ones})


def test_what_large_models_need_is_compiled_at_installation(states: tuple[dict, dict]) -> None:
    kernels.compile_all()
    compiled = {name: value for name, value in vars(kernels).items() if hasattr(value, "signatures")}
    before = {name: set(value.signatures) for name, value in compiled.items()}
    base, finetuned = states
    for rule in (rules.Metagpt(), rules.Ties()):
        fuse(rule, base, finetuned=finetuned)
    assert {name: set(value.signatures) for name, value in compiled.items()} == before


def test_kernels_do_without_a_folder_for_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_folder(**options: Any) -> Any:
        def refuse(function: Any) -> Any:
            raise RuntimeError("cannot cache function: no locator available")

        return refuse if options.get("cache") else numba.njit(**options)

    monkeypatch.setattr(kernels, "numba", SimpleNamespace(njit=without_folder))
    assert kernels._compiled(lambda values: values[0] + 1)(torch.ones(2).numpy()) == 2
