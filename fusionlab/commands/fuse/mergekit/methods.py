"""mergekit's merge methods as rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusionlab.commands.fuse.mergekit.models import STACK, Base
from fusionlab.commands.fuse.mergekit.parameters import Parameters
from fusionlab.errors import InputError
from fusionlab.rules.settings import is_setting

Config = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """How a merge method is expressed.

    Args:
        build: the rule's configuration from the parameters.
        base: what ``base_model`` is to it.
        parameters: what it takes, with mergekit's defaults; None: it must be given.
    """

    build: Callable[[Parameters], Config]
    base: Base
    parameters: Mapping[str, Any]


def _rule(name: str, **init_args: Any) -> Config:
    return {"class_path": name, "init_args": init_args}


def _varies(value: Any) -> bool:
    """Whether it differs between tensors, for any task."""
    return isinstance(value, list) or (isinstance(value, dict) and any(map(_varies, value.values())))


def _mapped(setting: Any, change: Callable[[float], float]) -> Any:
    """A number, a setting or those of several tasks with every value changed."""
    if isinstance(setting, list):
        return [_mapped(each, change) for each in setting]
    if not isinstance(setting, dict):
        return change(setting)
    kept = ("filter", "layers") if is_setting(setting) else ()
    return {key: each if key in kept else _mapped(each, change) for key, each in setting.items()}


def _scaled(setting: Any, factor: float) -> Any:
    return _mapped(setting, lambda value: factor * value)


def _linear(parameters: Parameters) -> Config:
    """Σ w θ (/ Σ w): the first model is the base, so that its own task vector is zero."""
    weights = parameters.settings("weight")
    if parameters.switch("normalize"):
        return _rule("average", weights=weights)
    if _varies(weights) or abs(sum(weights.values()) - 1) > 1e-6:
        total = "differ between tensors" if _varies(weights) else f"sum to {sum(weights.values()):g}"
        raise InputError(f"normalize: false with weights that {total} scales the model; not supported.")
    return _rule("task_arithmetic", scaling_coefficient=weights)


def _slerp(parameters: Parameters) -> Config:
    return _rule("slerp", t=parameters.setting("t"))


def _nuslerp(parameters: Parameters) -> Config:
    """Of the task vectors; without a base of the weights, as slerp but for where it is linear."""
    if parameters.switch("nuslerp_row_wise") or not parameters.switch("nuslerp_flatten"):
        raise InputError("nuslerp_flatten: false and nuslerp_row_wise: true are not supported; leave them out.")
    _check_number(parameters, 2, 2)
    weights = parameters.settings("weight")
    if parameters.inputs.has_base:
        return _rule("nuslerp", weights=weights)
    if _varies(weights):
        raise InputError("weight: nuslerp without base_model takes one number a model; give slerp with t.")
    total = sum(weights.values())
    t = 0.5 if abs(total) < 1e-6 else list(weights.values())[1] / total
    return _rule("slerp", t=t, linear_above=1.0)


def _passthrough(parameters: Parameters) -> Config:
    scale = parameters.setting("scale", STACK)
    return _rule("passthrough", scale=scale)


def _karcher(parameters: Parameters) -> Config:
    iterations, tolerance = parameters.single("max_iter"), parameters.number("tol")
    return _rule("karcher", max_iterations=iterations, tolerance=tolerance)


def _model_stock(parameters: Parameters) -> Config:
    if parameters.switch("filter_wise"):
        raise InputError("filter_wise: true is not supported; leave it out for one step a tensor.")
    _check_number(parameters, 2)
    return _rule("model_stock", least_norms=1e-6)


def _sce(parameters: Parameters) -> Config:
    return _rule("sce", density=parameters.setting("select_topk"), equal_below=1e-6)


def _check_number(parameters: Parameters, least: int, most: int | None = None) -> None:
    count = len(parameters.tasks)
    if count < least or count > (most or count):
        wanted = f"{least} models" if most == least else f"{least} models or more"
        raise InputError(f"{parameters.method}: expected {wanted} beside base_model, got {count}.")


def _task_arithmetic(parameters: Parameters) -> Config:
    """θ₀ + λ Σ w τ (/ Σ w)."""
    weights, scale = parameters.settings("weight"), parameters.setting("lambda")
    if not parameters.switch("normalize"):
        if not _varies(scale):
            return _rule("task_arithmetic", scaling_coefficient=_scaled(weights, scale))
        if _varies(weights):
            raise InputError("lambda: it and weight both differ between tensors; give one number for one of them.")
        coefficients = {task: _scaled(scale, weight) for task, weight in weights.items()}
        return _rule("task_arithmetic", scaling_coefficient=coefficients)
    if _varies(weights):
        if scale != 1:
            raise InputError("lambda: 1 is expected with normalize: true and weights that differ between tensors.")
        return _rule("average", weights=weights)
    total = sum(weights.values())
    total = 1.0 if abs(total) < 1e-8 else total
    coefficients = {task: _scaled(scale, weight / total) for task, weight in weights.items()}
    return _rule("task_arithmetic", scaling_coefficient=coefficients)


def _elected(parameters: Parameters) -> Config:
    """The same of entries that agree in sign."""
    return _rule(
        "disjoint_mean",
        scaling_coefficient=parameters.setting("lambda"),
        weights=parameters.settings("weight"),
        normalize=parameters.switch("normalize"),
        zero_sum="positive",
        scope="tensor",
    )


def _dare(parameters: Parameters, rule: Config) -> Config:
    drop_rates = _mapped(parameters.settings("density"), lambda density: 1 - density)
    return _rule("dare", rule=rule, drop_rate=drop_rates, rescale=_rescale(parameters))


def _della(parameters: Parameters, rule: Config) -> Config:
    densities, epsilons = parameters.settings("density"), parameters.settings("epsilon")
    if not _varies(densities) and all(density >= 1 for density in densities.values()):
        return rule
    epsilon = next(iter(epsilons.values()))
    if any(each != epsilon for each in epsilons.values()):
        raise InputError(f"epsilon: expected one for all models, got {epsilons!r}.")
    return _rule("della", rule=rule, density=densities, epsilon=epsilon, rescale=_rescale(parameters))


def _rescale(parameters: Parameters) -> str:
    return "l1" if parameters.switch("rescale") else "none"


def _trimmed(parameters: Parameters, rule: Config) -> Config:
    densities = parameters.settings("density")
    if not _varies(densities) and all(density >= 1 for density in densities.values()):
        return rule
    if parameters.switch("rescale"):
        raise InputError(f"rescale: true is supported for dare and della methods only, not for {parameters.method}.")
    skipped = {"skip": parameters.settings("gamma")} if "gamma" in parameters.defaults else {}
    return _rule("trim", rule=rule, density=densities, scope="tensor", at_threshold="first", **skipped)


_GENERAL = {"weight": None, "density": 1.0, "normalize": False, "rescale": False, "lambda": 1.0}
_NUSLERP = {"weight": None, "nuslerp_row_wise": False, "nuslerp_flatten": True}

METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, "merged", {"weight": None, "normalize": True}),
    "slerp": Method(_slerp, "one of two", {"t": None}),
    "passthrough": Method(_passthrough, "none", {"scale": 1.0}),
    "nuslerp": Method(_nuslerp, "optional", _NUSLERP),
    "karcher": Method(_karcher, "merged", {"max_iter": 10, "tol": 1e-5}),
    "model_stock": Method(_model_stock, "needed", {"filter_wise": False}),
    "sce": Method(_sce, "needed", {"select_topk": 1.0}),
    "task_arithmetic": Method(_task_arithmetic, "needed", _GENERAL),
    "ties": Method(lambda given: _trimmed(given, _elected(given)), "needed", _GENERAL | {"normalize": True}),
    "breadcrumbs": Method(lambda given: _trimmed(given, _task_arithmetic(given)), "needed", _GENERAL | {"gamma": 0.01}),
    "breadcrumbs_ties": Method(lambda given: _trimmed(given, _elected(given)), "needed", _GENERAL | {"gamma": 0.01}),
    "dare_linear": Method(lambda given: _dare(given, _task_arithmetic(given)), "needed", _GENERAL | {"rescale": True}),
    "dare_ties": Method(lambda given: _dare(given, _elected(given)), "needed", _GENERAL | {"rescale": True}),
    "della_linear": Method(
        lambda given: _della(given, _task_arithmetic(given)), "needed", _GENERAL | {"rescale": True, "epsilon": 0.15}
    ),
    "della": Method(
        lambda given: _della(given, _elected(given)),
        "needed",
        _GENERAL | {"rescale": True, "normalize": True, "epsilon": 0.15},
    ),
}
