"""mergekit configurations: what they mean here, against mergekit's definitions written out; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionlab import rules
from fusionlab.commands.fuse.mergekit import translate
from fusionlab.engine import fuse
from fusionlab.errors import InputError

SHAPES = {"w": (30, 40), "v": (50,)}
WEIGHTS = {"a": 0.5, "b": 1.5}


BLOCKS = 3
PLAIN: dict[str, Any] = {"base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
GRADED = [{"model": name, "parameters": {"weight": [0, 1]}} for name in "ab"]
FILTERED = {"scale": [{"filter": "layers.1.", "value": 0.5}, {"value": 1}]}
MOVED = [
    {"sources": [{"model": "a", "layer_range": [first, first + 2], "parameters": FILTERED}]} for first in (0, 1)
]  # of which the second makes block 1 of a to block 2
UNLIKE = [
    {"model": name, "parameters": {"weight": 1, "density": 0.5, "epsilon": e}}
    for name, e in zip("ab", (0.1, 0.2), strict=True)
]


def states() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        model: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for model in ("base", "a", "b")
    }


def config(method: str, parameters: dict[str, Any] | None = None, **own: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": weight} | own} for name, weight in WEIGHTS.items()]
    content = {"merge_method": method, "models": models, "parameters": parameters or {}}
    return content if method == "linear" else content | {"base_model": "base"}


def fused(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    recipe, of = translate(content), states()
    finetuned = {task: of[path] for task, path in recipe["finetuned"].items()}
    return fuse(rules.from_config(recipe["rule"]), of[recipe["base"]], finetuned=finetuned).state


def largest(tensor: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros(tensor.numel())
    mask[tensor.abs().flatten().argsort(descending=True, stable=True)[:count]] = 1
    return mask.view(tensor.shape)


def deltas(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of = states()
    return of["base"][name], of["a"][name] - of["base"][name], of["b"][name] - of["base"][name]


@pytest.mark.parametrize("normalize", [None, True, False])
def test_task_arithmetic(normalize: bool | None) -> None:
    given = {"lambda": 0.8} if normalize is None else {"lambda": 0.8, "normalize": normalize}
    found = fused(config("task_arithmetic", given))
    for name in SHAPES:
        base, a, b = deltas(name)
        expected = base + 0.8 * (0.5 * a + 1.5 * b) / (2 if normalize else 1)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6)


def test_linear_has_no_base() -> None:
    found = fused(config("linear"))
    for name in SHAPES:
        expected = (0.5 * states()["a"][name] + 1.5 * states()["b"][name]) / 2
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(normalize: bool) -> None:
    found = fused(config("ties", {"lambda": 0.9, "normalize": normalize, "int8_mask": True}, density=0.33))
    for name in SHAPES:
        base, a, b = deltas(name)
        rows = torch.stack([0.5 * a * largest(a, int(0.33 * a.numel())), 1.5 * b * largest(b, int(0.33 * b.numel()))])
        agree = rows.sign() == torch.where(rows.sum(0) >= 0, 1.0, -1.0)
        divisor = (torch.tensor([0.5, 1.5]).view(-1, *[1] * a.dim()) * agree).sum(0)
        divisor[divisor == 0] = 1
        expected = base + 0.9 * (rows * agree).sum(0) / (divisor if normalize else 1)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6)


def test_breadcrumbs() -> None:
    found = fused(config("breadcrumbs", density=0.4, gamma=0.1))
    for name in SHAPES:
        base, a, b = deltas(name)
        total = base.clone()
        for weight, delta in ((0.5, a), (1.5, b)):
            skipped, kept = int(0.1 * delta.numel()), int(0.4 * delta.numel())
            total += weight * delta * (largest(delta, skipped + kept) - largest(delta, skipped))
        torch.testing.assert_close(found[name], total, rtol=0, atol=2e-6)


def test_dare_keeps_the_l1_norm_of_every_tensor() -> None:
    rule = translate(config("dare_linear", density=0.4))["rule"]
    assert rule["class_path"] == "dare"
    assert rule["init_args"]["rescale"] == "l1"
    assert rule["init_args"]["drop_rate"] == pytest.approx({"a": 0.6, "b": 0.6})
    one = config("dare_linear", density=0.4) | {
        "models": [{"model": "a", "parameters": {"weight": 1.0, "density": 0.4}}]
    }
    found = fused(one)
    for name in SHAPES:
        base, a, _ = deltas(name)
        assert (found[name] - base).abs().sum() == pytest.approx(a.abs().sum().item(), rel=1e-4)
    ties = translate(config("dare_ties", {"rescale": False}, density=0.4))["rule"]["init_args"]
    assert (ties["rescale"], ties["rule"]["class_path"]) == ("none", "disjoint_mean")
    assert ties["rule"]["init_args"]["normalize"] is False


def test_slerp_goes_from_the_base_to_the_other_model() -> None:
    models = [{"model": "a"}, {"model": "base"}]
    content = {"merge_method": "slerp", "base_model": "base", "models": models, "parameters": {"t": 0.0}}
    torch.testing.assert_close(fused(content)["w"], states()["base"]["w"], rtol=0, atol=1e-6)
    torch.testing.assert_close(fused(content | {"parameters": {"t": 1.0}})["w"], states()["a"]["w"], rtol=0, atol=1e-6)


def test_dtypes_shared_parameters_and_names() -> None:
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [{"model": "org/base"}, {"model": "x/same"}, {"model": "y/same", "parameters": {"weight": "2e-1"}}],
        "parameters": {"weight": 1},
        "dtype": "float32",
    }
    recipe = translate(content)
    assert recipe["finetuned"] == {"same": "x/same", "same-2": "y/same"}
    assert recipe["rule"]["init_args"]["scaling_coefficient"] == {"same": 1.0, "same-2": 0.2}
    assert (recipe["input_dtype"], recipe["dtype"]) == ("float32", "float32")
    assert translate(content | {"out_dtype": "bfloat16"})["dtype"] == "bfloat16"
    assert translate(content | {"out_dtype": None})["dtype"] == "float32"
    assert "dtype" not in translate({key: value for key, value in content.items() if key != "dtype"})


def test_a_block_that_keeps_its_number_may_be_filtered_by_it() -> None:
    rule = translate({"merge_method": "passthrough", "slices": MOVED[:1]})["rule"]
    assert rule["init_args"]["scale"] == [{"filter": "layers.1.", "value": 0.5}, {"value": 1.0}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (config("nearswap"), "merge_method 'nearswap' is not supported"),
        (config("linear") | {"modules": {}}, "'modules' in .* is not supported; give the same models"),
        (config("ties") | {"tokenizer": {}}, "'tokenizer' in .* is not supported; give tokenizer_source"),
        (config("ties") | {"models": []}, "models: expected a list of models"),
        (config("ties", {"normalize": [True, False]}), "normalize: one value for all tensors is expected"),
        (config("ties", density=[0.1, [0.2]]), "models.0.parameters.density: expected .*, got .0.1, .0.2.."),
        (config("ties", {"lambda": {"value": 1, "filters": "mlp"}}), "'filters' in parameters.lambda is not supported"),
        (config("ties", {"lambda": {"value": 1, "filter": "*mlp*"}}), "filter '.mlp.': mergekit compares plain text"),
        (config("task_arithmetic", {"lambda": [0, 1]}) | {"models": GRADED}, "lambda: it and weight both differ"),
        (config("task_arithmetic", {"lambda": 2, "normalize": True}) | {"models": GRADED}, "lambda: 1 is expected"),
        (config("linear", {"normalize": False}) | {"models": GRADED}, "weights that differ between tensors scales"),
        (config("della", {"rescale": False}, density=0.5) | {"models": UNLIKE}, "epsilon: expected one for all models"),
        (PLAIN | {"merge_method": "nuslerp"}, "weight of 'a' is missing; nuslerp needs it"),
        (config("nuslerp", {"nuslerp_flatten": False}), "nuslerp_flatten: false and"),
        (PLAIN | {"merge_method": "model_stock", "models": [{"model": "a"}]}, "model_stock: expected 2 models or more"),
        (PLAIN | {"merge_method": "model_stock", "parameters": {"filter_wise": True}}, "filter_wise: true is not"),
        (
            {"merge_method": "passthrough", "slices": MOVED},
            "'layers.1.': mergekit looks for the block's number in the model",
        ),
        (PLAIN | {"merge_method": "karcher", "parameters": {"tol": "x"}}, "parameters.tol: expected a number, got 'x'"),
        (config("sce"), "'weight' in parameters of 'a' is not supported"),
        (config("ties", {"normalise": True}), "'normalise' in parameters is not supported; did you mean 'normalize'"),
        (config("ties", {"normalize": 1}), "normalize: expected true or false, got 1"),
        (config("ties", density="much"), "density of 'a': expected a number, got 'much'"),
        (config("ties") | {"models": [{"model": "a"}]}, "weight of 'a' is missing; ties needs it"),
        (config("ties") | {"models": [{"model": "a+lora", "parameters": {"weight": 1}}]}, r"model 'a\+lora'"),
        ({"merge_method": "ties", "models": config("ties")["models"]}, "base_model is missing; ties needs it"),
        (config("linear", {"normalize": False}), "weights that sum to 2 scales the model"),
        (
            config("breadcrumbs", {"rescale": True}, density=0.5),
            "rescale: true is supported for dare and della methods",
        ),
        (PLAIN | {"merge_method": "slerp", "parameters": {"t": 0.5}}, "slerp is between base_model and one other"),
        (config("slerp") | {"models": config("slerp")["models"][:1]}, "'weight' in parameters of 'a' is not supported"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_key(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        translate(content)


def test_a_value_for_some_names_only_is_for_these_only() -> None:
    content = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}]}
    some = translate(content | {"parameters": {"t": [{"filter": "mlp", "value": 0.9}]}})
    rule = rules.from_config(some["rule"])
    of = {name: {"mlp.w": tensor["w"], "other.w": tensor["w"].clone()} for name, tensor in states().items()}
    with pytest.raises(InputError, match=r"slerp\.t has no value for other\.w"):
        fuse(rule, of["base"], finetuned={"base": of["base"], "a": of["a"]})
    both = translate(content | {"parameters": {"t": [{"filter": "mlp", "value": 0.9}, {"value": 0.0}]}})
    made = fuse(rules.from_config(both["rule"]), of["base"], finetuned={"base": of["base"], "a": of["a"]}).state
    torch.testing.assert_close(made["other.w"], of["base"]["other.w"])
    assert not torch.allclose(made["mlp.w"], of["base"]["mlp.w"], atol=0.1)


@pytest.mark.parametrize("method", ["linear", "nuslerp", "task_arithmetic"])
def test_weights_that_cross_are_taken_as_they_meet(method: str) -> None:
    parameters = {"normalize": True} if method == "task_arithmetic" else {}
    models = [{"model": name, "parameters": {"weight": w}} for name, w in (("a", [0, 1]), ("b", [1, 0]))]
    content = {"merge_method": method, "models": models, "parameters": parameters}
    recipe = translate(content | ({} if method == "linear" else {"base_model": "base"}))
    of = {name: {f"layers.{i}.w": tensor["w"].clone() for i in range(2)} for name, tensor in states().items()}
    finetuned = {task: of[path] for task, path in recipe["finetuned"].items()}
    made = fuse(rules.from_config(recipe["rule"]), of[recipe["base"]], finetuned=finetuned).state
    torch.testing.assert_close(made["layers.0.w"], of["b"]["layers.0.w"])
    torch.testing.assert_close(made["layers.1.w"], of["a"]["layers.1.w"])


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_a_model_of_density_1_is_left_whole(method: str) -> None:
    content = config(method, {"epsilon": 0.1, "rescale": False, "normalize": False})
    for model, density in zip(content["models"], (1.0, 0.5), strict=True):
        model["parameters"] |= {"density": density, "weight": 1.0 if density == 1 else 0.0}
    base, update, _ = deltas("w")
    torch.testing.assert_close(fused(content)["w"], base + update)
