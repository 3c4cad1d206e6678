"""What must be true of every rule, and what a configuration may say."""

from __future__ import annotations

import math

import pytest
import torch

from fusionlab import rules
from fusionlab.engine import fuse
from fusionlab.errors import InputError
from fusionlab.rules.config import known_rules

TASKS = ("a", "b", "c")
EVERY_RULE = {
    "average": rules.Average(),
    "breadcrumbs": rules.Breadcrumbs(keep=0.9, gamma=0.1),
    "consensus": rules.Consensus(),
    "dare": rules.Dare(rules.TaskArithmetic(1.0)),
    "della": rules.Della(rules.TaskArithmetic(1.0)),
    "disjoint_mean": rules.DisjointMean(),
    "passthrough": rules.Passthrough(),
    "iso_c": rules.IsoC(),
    "iso_cts": rules.IsoCts(),
    "karcher": rules.Karcher(),
    "knots": rules.Knots(),
    "lines": rules.Lines(beta=0.3),
    "localize_and_stitch": rules.LocalizeAndStitch(),
    "metagpt": rules.Metagpt(),
    "model_stock": rules.ModelStock(),
    "nuslerp": rules.Nuslerp(),
    "sce": rules.Sce(),
    "slerp": rules.Slerp(),
    "task_arithmetic": rules.TaskArithmetic(0.3),
    "ties": rules.Ties(),
    "trim": rules.Trim(rules.Average()),
    "tsv_m": rules.TsvM(),
    "wudi": rules.Wudi(),
}
ORDER_MATTERS = {"slerp"}
# Sums in another order differ by float32 rounding of values below 4; a decomposition of other columns by a little more.
TOLERANCE = {"rtol": 0, "atol": 4e-6}


def make_states(tasks: tuple[str, ...]) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"layers.0.w": (20, 30), "layers.1.w": (30, 20), "norm": (20,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    vectors = {
        task: {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()} for task in tasks
    }
    return base, vectors


def tasks_of(name: str) -> tuple[str, ...]:
    return TASKS[:2] if name in ("slerp", "nuslerp") else TASKS


def test_every_exported_rule_is_tested_here_and_keeps_the_protocol() -> None:
    assert known_rules().keys() == EVERY_RULE.keys()
    assert len(EVERY_RULE) == 23
    for name, rule in EVERY_RULE.items():
        assert isinstance(rule, rules.Rule), name
        assert rules.rule_name(rule) == name
    linear = {name for name, rule in EVERY_RULE.items() if isinstance(rule, rules.LinearRule)}
    assert linear == {"average", "task_arithmetic", "metagpt", "lines", "model_stock", "nuslerp"}


@pytest.mark.parametrize("name", EVERY_RULE)
def test_configurations_come_back(name: str) -> None:
    assert rules.from_config(rules.to_config(EVERY_RULE[name])) == EVERY_RULE[name]


@pytest.mark.parametrize("name", sorted(EVERY_RULE.keys() - ORDER_MATTERS))
def test_the_order_of_tasks_is_irrelevant(name: str) -> None:
    base, vectors = make_states(tasks_of(name))
    forwards = fuse(EVERY_RULE[name], base, vectors).state
    backwards = fuse(EVERY_RULE[name], base, dict(reversed(vectors.items()))).state
    for key in base:
        torch.testing.assert_close(backwards[key], forwards[key], **TOLERANCE)


@pytest.mark.parametrize("name", sorted(EVERY_RULE.keys() - {"metagpt"}))
def test_zero_task_vectors_give_the_base(name: str) -> None:
    base, vectors = make_states(tasks_of(name))
    zeros = {task: {key: torch.zeros_like(tensor) for key, tensor in state.items()} for task, state in vectors.items()}
    fused = fuse(EVERY_RULE[name], base, zeros).state
    for key in base:
        torch.testing.assert_close(fused[key], base[key], rtol=4e-7, atol=0)  # slerp and karcher add up shares of it


@pytest.mark.parametrize(
    "rule",
    [
        rules.Average(),
        rules.TaskArithmetic(1.0),
        rules.Metagpt(),
        rules.Ties(density=1.0),
        rules.Dare(rules.Average(), drop_rate=0.0),
        rules.Lines(beta=0.0),
        rules.Breadcrumbs(keep=1.0, gamma=0.0),
        rules.TsvM(),
        rules.Knots(density=1.0, scaling_coefficient=1.0),
        rules.LocalizeAndStitch(density=1.0),
        rules.ModelStock(),
        rules.Karcher(),
        rules.Wudi(),
        rules.Wudi(solver="closed_form"),
    ],
    ids=lambda rule: rules.rule_name(rule),
)
def test_one_task_in_full_gives_the_finetuned_model(rule: rules.Rule) -> None:
    base, vectors = make_states(("a",))
    fused = fuse(rule, base, vectors).state
    for key in base:
        torch.testing.assert_close(fused[key], base[key] + vectors["a"][key], **TOLERANCE)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("name", ["task_arithmetic", "metagpt", "ties"])
def test_a_zero_task_vector_added_changes_nothing(name: str, scope: str) -> None:
    """TIES over a tensor or the model keeps no entry of it, MetaGPT gives it a coefficient of zero."""
    rule = {"metagpt": rules.Metagpt(scope), "ties": rules.Ties(scope=scope)}.get(name, EVERY_RULE[name])  # type: ignore[arg-type]
    base, vectors = make_states(TASKS)
    zero = {"zero": {key: torch.zeros_like(tensor) for key, tensor in vectors["a"].items()}}
    alone, beside = (fuse(rule, base, each).state for each in (vectors, vectors | zero))
    assert all(torch.equal(beside[key], alone[key]) for key in base)


@pytest.mark.parametrize("factor", [0.125, 64.0])
@pytest.mark.parametrize("name", ["average", "task_arithmetic", "metagpt", "ties", "lines", "localize_and_stitch"])
def test_larger_task_vectors_give_as_much_larger_an_update(name: str, factor: float) -> None:
    """To the bit, as the factor is a power of two and the base zero."""
    base, vectors = make_states(TASKS)
    zero = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    larger = {task: {key: factor * tensor for key, tensor in state.items()} for task, state in vectors.items()}
    plain, scaled = (fuse(EVERY_RULE[name], zero, each).state for each in (vectors, larger))
    assert all(torch.equal(scaled[key], factor * plain[key]) for key in base)
    assert any(plain[key].any() for key in base)


@pytest.mark.parametrize("scope", ["model", "layer", "tensor"])
def test_metagpt_coefficients_sum_to_the_multiplier(scope: str) -> None:
    base, vectors = make_states(TASKS)
    found = fuse(rules.Metagpt(scope=scope, multiplier=2.0), base, vectors).scaling_coefficients
    by_name = found if scope == "model" else {key: {task: found[task][key] for task in TASKS} for key in base}
    rows = [found] if scope == "model" else by_name.values()
    assert all(sum(row.values()) == pytest.approx(2.0, rel=1e-12) for row in rows)


def test_metagpt_on_zero_task_vectors() -> None:
    base, vectors = make_states(TASKS)
    zeros = {task: {key: torch.zeros_like(tensor) for key, tensor in state.items()} for task, state in vectors.items()}
    with pytest.raises(InputError, match="the task vectors of a, b, c are all zero"):
        fuse(rules.Metagpt(), base, zeros)
    vectors = {task: state | {"norm": torch.zeros(20)} for task, state in vectors.items()}
    for scope in ("layer", "tensor"):
        fused = fuse(rules.Metagpt(scope=scope), base, vectors).state
        assert torch.equal(fused["norm"], base["norm"])
        assert not torch.equal(fused["layers.0.w"], base["layers.0.w"])


def test_coefficients_are_reported_through_transforms() -> None:
    base, vectors = make_states(TASKS)
    rule = rules.Dare(rules.TaskArithmetic({"a": 0.1, "b": 0.2, "c": 0.3}))
    assert fuse(rule, base, vectors).scaling_coefficients == {"a": 0.1, "b": 0.2, "c": 0.3}
    assert fuse(rules.Ties(), base, vectors).scaling_coefficients == {}
    by_name = fuse(rules.TaskArithmetic(0.1, {"layers.*": 0.2}), base, vectors).scaling_coefficients
    assert by_name["a"] == {"layers.0.w": 0.2, "layers.1.w": 0.2, "norm": 0.1}


def test_dare_draws_differ_by_task_name_and_seed() -> None:
    base = {"v": torch.zeros(400), "w": torch.zeros(400)}
    ones = {task: {"v": torch.ones(400), "w": torch.ones(400)} for task in "ab"}
    drops = {}
    for seed in (0, 1):
        for task in "ab":
            fused = fuse(rules.Dare(rules.TaskArithmetic(1.0), seed=seed), base, {task: ones[task]}).state
            drops |= {(seed, task, name): tuple(tensor.tolist()) for name, tensor in fused.items()}
    assert len(set(drops.values())) == 8
    assert all(set(values) == {0.0, 2.0} for values in drops.values())
    assert all(0.4 < sum(values) / 800 < 0.6 for values in drops.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("metagtp", "no such rule; did you mean 'metagpt'"),
        ({"class_path": "fusionlab.rules.Tsv"}, "no such rule; did you mean 'ts"),
        ({"class_path": "ties", "init_arg": {}}, "unknown key 'init_arg'"),
        ({"class_path": "ties", "init_args": {"densty": 0.1}}, "unknown argument 'densty'; did you mean 'density'"),
        ({"class_path": "ties", "init_args": {"density": "much"}}, "ties.density: expected a number .* got 'much'"),
        ({"class_path": "ties", "init_args": {"density": True}}, "ties.density: expected a number .* got True"),
        ({"class_path": "ties", "init_args": {"density": 1.5}}, r"density: expected a number in \[0, 1\], got 1.5"),
        ({"class_path": "ties", "init_args": {"scope": "layer"}}, r"ties.scope: expected model \| tensor, got 'layer'"),
        ({"class_path": "ties", "init_args": [0.1]}, "init_args: expected a mapping"),
        ({"class_path": "lines"}, "init_args lacks beta"),
        ({"class_path": "dare"}, "init_args lacks rule"),
        ({"class_path": "wudi", "init_args": {"num_steps": 0}}, "wudi: num_steps and learning_rate must be positive"),
        ({"class_path": "wudi", "init_args": {"solver": "exact"}}, "wudi.solver: expected gradient"),
        ({"class_path": "sce", "init_args": {"density": -0.1}}, "sce.density: expected a number"),
        (
            {"class_path": "della", "init_args": {"rule": "average", "density": 0.95}},
            "lie between 0 and 1, got density 0.95",
        ),
        ({"class_path": "della", "init_args": {"rule": "average", "density": 1.5}}, "della.density: expected a number"),
        ({"class_path": "dare", "init_args": {"rule": "tie"}}, "rule 'tie': no such rule; did you mean 'ties'"),
        ({"class_path": "dare", "init_args": {"rule": "average", "drop_rate": 1.0}}, "1 drops everything"),
        ({"class_path": "nowhere.Rule"}, "'nowhere.Rule' cannot be imported"),
        ({"class_path": "collections.OrderedDict"}, "is not a fusion rule"),
        (3, "expected a name or"),
        ({"class_path": "average", "init_args": {"weights": {"a": 1.0, "b": -1.0}}}, "sum to 0"),
        ({"class_path": "slerp", "init_args": {"t": -0.1}}, "slerp.t: expected a number"),
        ({"class_path": "nuslerp", "init_args": {"weights": {"a": 1.0, "b": -1.0}}}, "sum to 0"),
        ({"class_path": "karcher", "init_args": {"tolerance": 0.0}}, "must be positive"),
        ({"class_path": "consensus", "init_args": {"mask_threshold": 0.0}}, "expected positive numbers, got 0.0"),
        ({"class_path": "consensus", "init_args": {"min_tasks": 0}}, "expected at least 1, got 0"),
        (
            {"class_path": "localize_and_stitch", "init_args": {"density": 2.0}},
            r"density: expected a number in \[0, 1\]",
        ),
        ({"class_path": "breadcrumbs", "init_args": {"keep": 0.9, "gamma": 0.2}}, "expected at most 1"),
        ({"class_path": "trim", "init_args": {"rule": "ties"}}, "Ties trims already"),
        ({"class_path": "trim", "init_args": {"rule": "tsv_m"}}, "TsvM works on whole tensors"),
        ({"class_path": "trim", "init_args": {"rule": "average", "skip": 0.1}}, "needs at_threshold: first"),
    ],
)
def test_bad_configurations_are_refused(config: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rules.from_config(config)


def test_two_transforms_before_metagpt_are_refused() -> None:
    with pytest.raises(InputError, match="Dare before Trim before Metagpt"):
        rules.Dare(rules.Trim(rules.Metagpt()))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (rules.TaskArithmetic(), "no scaling_coefficient for layers.0.w; give one"),
        (rules.TaskArithmetic({"a": 0.1, "b": 0.2}), "has no value for c"),
        (
            rules.TaskArithmetic({"a": 0.1, "b": 0.2, "c": 0.1, "cc": 0.2}),
            "cc: no such task; did you mean 'c'|known: a",
        ),
        (rules.TaskArithmetic(0.1, {"blocks.*": 0.2}), r"no parameter matches blocks\.\*; names look like layers.0.w"),
        (rules.TaskArithmetic(math.nan), "expected finite numbers, got nan"),
        (rules.Average({"a": 1.0}), "average.weights has no value for b, c"),
        (rules.Slerp(), "slerp is between two models, got 3"),
        (rules.Nuslerp(), "nuslerp is between two task vectors, got 3"),
        (rules.Consensus(min_tasks=4), "at least 4 tasks need, got 3"),
        (rules.Consensus(mask_threshold={"a": 0.4}), "consensus.mask_threshold has no value for b, c"),
        (rules.Dare(rules.Average(), {"a": 0.5}), "dare.drop_rate has no value for 'b'"),
        (rules.DisjointMean(weights={"a": 1.0, "b": 1.0}), "weights has no value for c"),
    ],
)
def test_rules_that_do_not_fit_the_tasks_are_refused(rule: rules.Rule, message: str) -> None:
    base, vectors = make_states(TASKS)
    with pytest.raises(InputError, match=message):
        fuse(rule, base, vectors)
