"""Every merge method of mergekit that is translated, with filters and gradients, against slow references in float64.

The references are written from the formulas, tensor by tensor; ``value`` says what a parameter is at a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionlab import rules
from fusionlab.commands.fuse.mergekit import translate
from fusionlab.engine import fuse

BLOCKS = 4
NAMES = ["embed.weight", "norm.weight"] + [
    f"layers.{block}.{part}.weight" for block in range(BLOCKS) for part in ("self_attn", "mlp")
]
GRADIENT = [0.1, 0.9, 0.4]
FILTERED = [{"filter": "self_attn", "value": [0.2, 0.8]}, {"filter": "layers.2.", "value": 0.6}, {"value": 0.3}]
Values = dict[str, float]


def depth(name: str) -> float:
    return int(name.split(".")[1]) / (BLOCKS - 1) if name.startswith("layers") else 0.0


def value(setting: Any, name: str) -> float:
    """What a parameter is at a tensor, in the words of mergekit's documentation."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        return value(next(each["value"] for each in setting if each.get("filter", "") in name), name)
    if not isinstance(setting, list):
        return setting
    place = depth(name) * (len(setting) - 1)
    below = min(int(place), len(setting) - 2)
    return setting[below] + (place - below) * (setting[below + 1] - setting[below])


def states(scale: float = 0.1) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(6, 7, generator=generator) for name in NAMES}
    tuned = {
        model: {name: theta + scale * torch.randn(6, 7, generator=generator) for name, theta in base.items()}
        for model in "abc"
    }
    return {"base": base} | tuned


def angle(first: Tensor, second: Tensor) -> float:
    return math.acos(float((first * second).sum() / (first.norm() * second.norm())))


def turned(t: float, first: Tensor, second: Tensor, linear_above: float) -> Tensor:
    omega = angle(first, second)
    if abs(math.cos(omega)) > linear_above:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * omega) * first + math.sin(t * omega) * second) / math.sin(omega)


def largest(delta: Tensor, skipped: int, kept: int) -> Tensor:
    mask = torch.zeros(delta.numel())
    mask[delta.abs().flatten().argsort(descending=True, stable=True)[skipped : skipped + kept]] = 1
    return delta * mask.view(delta.shape)


def elected(deltas: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    total, out = sum(w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0])
    for place in itertools.product(*map(range, out.shape)):
        sign = 1.0 if total[place] >= 0 else -1.0
        agreeing = [(w, w * float(d[place])) for w, d in zip(weights, deltas, strict=True) if w * d[place] * sign > 0]
        divisor = sum(w for w, _ in agreeing) if normalize and agreeing else 1.0
        out[place] = sum(part for _, part in agreeing) / divisor
    return out


def weighted(deltas: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True)) / (sum(weights) if normalize else 1)


def general(name: str, of: dict[str, Tensor], given: dict[str, Any], how: Callable[..., Tensor]) -> Tensor:
    deltas, weights = [], []
    for model in "abc":
        at = {key: value(setting, name) for key, setting in given[model].items()}
        delta, size = of[model] - of["base"], of["base"].numel()
        density = at.get("density", 1)
        if density < 1 and "gamma" in at:
            delta = largest(delta, min(int(at["gamma"] * size), size - int(density * size)), int(density * size))
        elif density < 1:
            delta = largest(delta, 0, max(1, int(density * size)))
        deltas.append(delta)
        weights.append(at["weight"])
    return of["base"] + value(given["all"].get("lambda", 1), name) * how(deltas, weights, given["all"]["normalize"])


def karcher(tensors: list[Tensor]) -> Tensor:
    """The mean of the directions by small steps of gradient descent, at the mean length."""
    lengths = [float(each.norm()) for each in tensors]
    units = [each / length for each, length in zip(tensors, lengths, strict=True)]
    mean = sum(units) / sum(units).norm()
    for _ in range(200):
        step = sum(angle(mean, u) / math.sin(angle(mean, u)) * (u - (mean * u).sum() * mean) for u in units) / 30
        mean = (mean + step) / (mean + step).norm()
    return sum(lengths) / len(lengths) * mean


def model_stock(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = [each - base for each in tuned]
    pairs = [float((x * y).sum() / max(1e-6, x.norm() * y.norm())) for x, y in itertools.combinations(deltas, 2)]
    cosine, count = sum(pairs) / len(pairs), len(tuned)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(tuned) / count + (1 - t) * base


def sce(base: Tensor, tuned: list[Tensor], topk: float) -> Tensor:
    stack = torch.stack([each - base for each in tuned])
    spread = stack.var(dim=0, unbiased=False).flatten()
    kept = torch.zeros_like(spread)
    kept[spread.argsort(descending=True, stable=True)[: int(topk * spread.count_nonzero())]] = 1
    stack = stack * (kept.view(base.shape) if topk < 1 else 1)
    squares = [float((each**2).mean()) for each in stack]
    weights = [s / sum(squares) if sum(squares) >= 1e-6 else 1 / len(squares) for s in squares]
    out = torch.zeros_like(base)
    for place in itertools.product(*map(range, base.shape)):
        sign = 1.0 if stack[(slice(None), *place)].sum() >= 0 else -1.0
        agreeing = [(w, float(t[place])) for w, t in zip(weights, stack, strict=True) if t[place] * sign > 0]
        out[place] = sum(w * t for w, t in agreeing) / max(1e-6, sum(w for w, _ in agreeing))
    return base + out


def content(method: str, shared: dict[str, Any], own: dict[str, Any], models: str = "abc") -> dict[str, Any]:
    listed = [{"model": model, "parameters": {k: v[model] for k, v in own.items()}} for model in models]
    base = {} if method == "linear" or method == "karcher" or shared.pop("no_base", False) else {"base_model": "base"}
    return {"merge_method": method, "models": listed, "parameters": shared} | base


def fused(config: dict[str, Any], of: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    recipe = translate(config)
    finetuned = {task: of[path] for task, path in recipe["finetuned"].items()}
    return fuse(rules.from_config(recipe["rule"]), of[recipe["base"]], finetuned=finetuned).state


def agrees(found: dict[str, Tensor], expected: Callable[[str, dict[str, Tensor]], Tensor], of: Any) -> None:
    for name in NAMES:
        double = {model: state[name].double() for model, state in of.items()}
        torch.testing.assert_close(
            found[name].double(), expected(name, double), rtol=0, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


WEIGHT = {"a": GRADIENT, "b": FILTERED, "c": 0.7}
DENSITY = {"a": [0.2, 1.0], "b": 0.5, "c": [{"filter": "mlp", "value": 0.9}, {"value": [0.3, 0.6]}]}
GAMMA = {"a": 0.05, "b": [0.0, 0.2], "c": 0.1}
PARTS: dict[str, tuple[dict[str, Any], Callable[..., Tensor], bool]] = {
    "task_arithmetic": ({"weight": WEIGHT}, weighted, False),
    "ties": ({"weight": WEIGHT, "density": DENSITY}, elected, True),
    "breadcrumbs": ({"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA}, weighted, False),
    "breadcrumbs_ties": ({"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA}, elected, False),
}


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("method", PARTS)
def test_task_vectors(method: str, normalize: bool | None) -> None:
    own, how, default = PARTS[method]
    shared = {} if normalize is None else {"normalize": normalize}
    given = {model: {key: each[model] for key, each in own.items()} for model in "abc"}
    given["all"] = {"normalize": default if normalize is None else normalize}
    agrees(fused(content(method, shared, own), states()), lambda name, of: general(name, of, given, how), states())


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_lambda(method: str) -> None:
    own = {"weight": {"a": 0.5, "b": 0.3, "c": 0.7}}
    given = {model: {"weight": own["weight"][model]} for model in "abc"}
    given["all"] = {"normalize": True, "lambda": FILTERED}
    how = PARTS[method][1]
    found = fused(content(method, {"normalize": True, "lambda": FILTERED}, own), states())
    agrees(found, lambda name, of: general(name, of, given, how), states())


def test_linear() -> None:
    def expected(name: str, of: dict[str, Tensor]) -> Tensor:
        weights = {model: value(WEIGHT[model], name) for model in "abc"}
        return sum(weight * of[model] for model, weight in weights.items()) / sum(weights.values())

    agrees(fused(content("linear", {}, {"weight": WEIGHT}), states()), expected, states())


@pytest.mark.parametrize("scale", [0.01, 2.0], ids=["nearly parallel", "apart"])
@pytest.mark.parametrize("t", [0.3, GRADIENT, FILTERED], ids=["number", "gradient", "filters"])
def test_slerp(t: Any, scale: float) -> None:
    of = states(scale)
    found = fused(content("slerp", {"t": t}, {}, "a"), of)
    agrees(found, lambda name, at: turned(value(t, name), at["base"], at["a"], 0.9995), of)


@pytest.mark.parametrize("has_base", [True, False])
def test_nuslerp(has_base: bool) -> None:
    weight = WEIGHT if has_base else {"a": 0.5, "b": 0.3}
    found = fused(content("nuslerp", {} if has_base else {"no_base": True}, {"weight": weight}, "ab"), states(0.01))

    def expected(name: str, of: dict[str, Tensor]) -> Tensor:
        first, second = value(weight["a"], name), value(weight["b"], name)
        start = of["base"] if has_base else 0
        return start + turned(second / (first + second), of["a"] - start, of["b"] - start, 1.0)

    agrees(found, expected, states(0.01))


def test_karcher_takes_every_model() -> None:
    of = states(1.0)
    agrees(
        fused(content("karcher", {"max_iter": 50, "tol": 1e-9}, {}), of),
        lambda _, at: karcher([at[m] for m in "abc"]),
        of,
    )
    with_base = content("karcher", {"max_iter": 50, "tol": 1e-9}, {}) | {"base_model": "base"}
    agrees(fused(with_base, of), lambda _, at: karcher([at[m] for m in ("a", "b", "c", "base")]), of)


@pytest.mark.parametrize("scale", [0.1, 1e-4], ids=["by cosines", "norms too small: nearly orthogonal"])
def test_model_stock(scale: float) -> None:
    of = states(scale)
    found = fused(content("model_stock", {}, {}), of)
    agrees(found, lambda _, at: model_stock(at["base"], [at[model] for model in "abc"]), of)


@pytest.mark.parametrize("scale", [0.1, 1e-4], ids=["weights by squares", "squares too small: equal weights"])
@pytest.mark.parametrize("topk", [1.0, 0.4, [{"filter": "mlp", "value": [1.0, 0.2]}, {"value": 1.0}]])
def test_sce(topk: Any, scale: float) -> None:
    of = states(scale)
    found = fused(content("sce", {"select_topk": topk}, {}), of)
    agrees(found, lambda name, at: sce(at["base"], [at[m] for m in "abc"], value(topk, name)), of)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "dare_ties", "della"])
def test_what_is_dropped_at_random(method: str, rescale: bool) -> None:
    """One model: what is left is the task vector's own, so many entries as the density says, of the same L1 norm."""
    of = {model: {name: torch.randn(60, 70, generator=torch.Generator().manual_seed(k)) for name in NAMES}
          for k, model in enumerate(("base", "a"))}  # fmt: skip
    density = {"a": [{"filter": "mlp", "value": [0.3, 0.6]}, {"value": 0.5}]}
    shared = {"rescale": rescale} | ({"epsilon": 0.2} if method.startswith("della") else {})
    found = fused(content(method, shared, {"weight": {"a": 1.0}, "density": density}, "a"), of)
    for name in NAMES:
        delta, left = of["a"][name] - of["base"][name], found[name] - of["base"][name]
        kept = left != 0
        assert float(kept.float().mean()) == pytest.approx(value(density["a"], name), abs=0.03)
        factor = float(delta.abs().sum() / delta[kept].abs().sum()) if rescale else 1.0
        torch.testing.assert_close(left[kept], factor * delta[kept], rtol=0, atol=2e-5)
        if method.startswith("della"):  # large ones stay more often
            assert float(delta[kept].abs().mean()) > 1.05 * float(delta.abs().mean())
