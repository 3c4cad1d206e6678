"""mergekit configurations as recipes: what can be expressed is translated, the rest is refused by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError, did_you_mean, name_list

_TOP = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
_MODEL = ("model", "parameters")
_WITHOUT_EFFECT = ("int8_mask",)
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "task_arithmetic": ("weight", "normalize", "lambda"),
    "ties": ("weight", "density", "normalize", "lambda"),
    "dare_linear": ("weight", "density", "normalize", "rescale", "lambda"),
    "dare_ties": ("weight", "density", "normalize", "rescale", "lambda"),
    "breadcrumbs": ("weight", "density", "gamma", "normalize", "rescale", "lambda"),
}
_ANYWHERE = ("density", "rescale")  # accepted by task_arithmetic, where they do nothing
_DEFAULTS: Mapping[str, Any] = {"density": 1.0, "gamma": 0.01, "lambda": 1.0}


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe (without ``output``) that does what mergekit does with ``config``, computed in float32.

    mergekit loads and computes in ``dtype``: the inputs are rounded to it first here, too, and the result to
    ``out_dtype`` or else ``dtype``. Parameters of a model come before those for all. Where it sorts, the order of equal
    magnitudes is not defined; here the lowest index comes first.

    Args:
        config: a mergekit configuration with scalar parameters.

    Raises:
        InputError: a method or key that is not supported, a value that is no scalar, or a missing weight.

    Example:
        >>> models = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 1}}]
        >>> recipe = translate({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
        >>> recipe["base"], recipe["finetuned"], recipe["rule"]["init_args"]
        ('base', {'a': 'a', 'b': 'b'}, {'scaling_coefficient': {'a': 0.5, 'b': 1.0}})
    """
    method = config["merge_method"]
    for key in ("merge_method", "base_model", "dtype", "out_dtype"):
        if not isinstance(config.get(key), str | None):
            raise InputError(f"{key}: expected text, got {config[key]!r}.")
    if method not in _PARAMETERS:
        raise InputError(f"merge_method {method!r} is not supported; {did_you_mean(str(method), _PARAMETERS)}")
    _refuse_unknown(config, _TOP, "a mergekit configuration")
    parameters = _Parameters(method, config)
    base, models = _base_and_models(method, config, parameters)
    build = {"linear": _linear, "slerp": _slerp}.get(method, _generalized)
    rule = build(method, parameters, list(models))
    dtype = config.get("dtype")
    recipe = {"base": base, "finetuned": models, "rule": rule}
    if dtype is not None:
        recipe["input_dtype"] = dtype
    if (output := config.get("out_dtype", dtype)) is not None:
        recipe["dtype"] = output
    return recipe


class _Parameters:
    """A parameter by task: that of the model, else that for all, else mergekit's default."""

    def __init__(self, method: str, config: Mapping[str, Any]) -> None:
        self.method = method
        self.shared = _scalars(method, config.get("parameters"), "parameters")
        self.of_model: dict[str, dict[str, Any]] = {}

    def switch(self, name: str, default: bool) -> bool:
        value = self.shared.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"parameters.{name}: expected true or false, got {value!r}.")
        return value

    def number(self, name: str, task: str | None = None) -> float:
        own = self.of_model.get(task or "", {})
        value = own.get(name, self.shared.get(name, _DEFAULTS.get(name)))
        where = f"parameters.{name}" + (f" of {task!r}" if task else "")
        if value is None:
            raise InputError(f"{where} is missing; {self.method} needs it.")
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: expected a number, got {value!r}.") from error

    def numbers(self, name: str, tasks: Sequence[str]) -> dict[str, float]:
        return {task: self.number(name, task) for task in tasks}


def _base_and_models(method: str, config: Mapping[str, Any], parameters: _Parameters) -> tuple[str, dict[str, str]]:
    entries = config.get("models")
    if not isinstance(entries, list) or not entries:
        raise InputError("models: expected a list of models; slices and modules are not supported.")
    base = config.get("base_model")
    models: dict[str, str] = {}
    first = ""
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise InputError(f"models: expected entries with model and parameters, got {entry!r}.")
        _refuse_unknown(entry, _MODEL, "an entry of models")
        path = entry["model"]
        first = first or path
        own = _scalars(method, entry.get("parameters"), f"parameters of {path!r}")
        if path == base and method not in ("linear", "slerp"):
            continue
        task = _task_name(path, models)
        models[task] = path
        parameters.of_model[task] = own
    for path in (base or first, *models.values()):
        if "+" in Path(path).name:
            raise InputError(
                f"model {path!r}: write adapters as models of their own: `finetuned` takes them as they are."
            )
    if method == "linear":
        return first, models
    if base is None:
        raise InputError(f"base_model is missing; {method} needs it.")
    if method == "slerp":
        others = {task: path for task, path in models.items() if path != base}
        if len(others) != 1:
            raise InputError(f"slerp is between base_model and one other model, got {name_list(others) or 'none'}.")
        return base, {_task_name(base, others): base} | others
    return base, models


def _task_name(path: str, taken: Mapping[str, str]) -> str:
    stem = Path(path.rstrip("/")).name or path
    name, k = stem, 2
    while name in taken:
        name, k = f"{stem}-{k}", k + 1
    return name


def _scalars(method: str, given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: expected a mapping, got {given!r}.")
    _refuse_unknown(given, (*_PARAMETERS[method], *_WITHOUT_EFFECT, *_ANYWHERE), where)
    for key, value in given.items():
        if isinstance(value, (list, Mapping)):
            raise InputError(f"{where}: {key}: only single values are supported, not gradients or filters.")
    return dict(given)


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(f"{unknown[0]!r} in {where} is not supported; {did_you_mean(str(unknown[0]), known)}")


def _linear(method: str, parameters: _Parameters, tasks: list[str]) -> dict[str, Any]:
    """Σ w θ (/ Σ w): the first model is the base, so that its own task vector is zero."""
    weights = parameters.numbers("weight", tasks)
    total = sum(weights.values())
    if parameters.switch("normalize", True):
        return {"class_path": "average", "init_args": {"weights": weights}}
    if abs(total - 1) > 1e-6:
        raise InputError(f"normalize: false with weights that sum to {total:g} scales the model; not supported.")
    return {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": weights}}


def _slerp(method: str, parameters: _Parameters, tasks: list[str]) -> dict[str, Any]:
    return {"class_path": "slerp", "init_args": {"t": parameters.number("t")}}


def _generalized(method: str, parameters: _Parameters, tasks: list[str]) -> dict[str, Any]:
    weights = parameters.numbers("weight", tasks)
    normalize = parameters.switch("normalize", method == "ties")
    scale = parameters.number("lambda")
    if method.endswith("ties"):
        rule = {
            "class_path": "disjoint_mean",
            "init_args": {"scaling_coefficient": scale, "weights": weights, "normalize": normalize,
                          "zero_sum": "positive", "scope": "tensor"},
        }  # fmt: skip
    else:
        total = sum(weights.values()) if normalize else 1.0
        total = 1.0 if abs(total) < 1e-8 else total
        coefficients = {task: scale * weight / total for task, weight in weights.items()}
        rule = {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": coefficients}}
    densities = parameters.numbers("density", tasks)
    if method.startswith("dare"):
        rescale = "l1" if parameters.switch("rescale", True) else "none"
        rates = {task: 1 - density for task, density in densities.items()}
        return {"class_path": "dare", "init_args": {"rule": rule, "drop_rate": rates, "rescale": rescale}}
    if method == "task_arithmetic" or all(density >= 1 for density in densities.values()):
        return rule
    if parameters.switch("rescale", False):
        raise InputError(f"rescale: true is supported for dare methods only, not for {method}.")
    trim: dict[str, Any] = {"rule": rule, "density": densities, "scope": "tensor", "at_threshold": "first"}
    if method == "breadcrumbs":
        trim["skip"] = {task: parameters.number("gamma", task) * (densities[task] < 1) for task in tasks}
    return {"class_path": "trim", "init_args": trim}
