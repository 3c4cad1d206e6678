"""mergekit configurations as recipes: what can be expressed is translated, the rest is refused by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionlab.commands.fuse.mergekit.methods import METHODS
from fusionlab.commands.fuse.mergekit.models import inputs_of, refuse_unknown
from fusionlab.commands.fuse.mergekit.parameters import Parameters
from fusionlab.errors import InputError, did_you_mean
from fusionlab.foreign import MergekitConfig, checked

_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "chat_template")  # fmt: skip
_NOT_DONE = {
    "tokenizer": "give tokenizer_source: base, union or a model",
    "modules": "give the same models to all modules, under models",
}


def translate(config: Mapping[str, Any], file: Path = Path("a mergekit configuration")) -> dict[str, Any]:
    """A recipe (without ``output``) that does what mergekit does with ``config``, computed in float32.

    mergekit loads and computes in ``dtype``: the inputs are rounded to it first here, too, and the result to
    ``out_dtype`` or else ``dtype``. Parameters of a model come before those of its slice, and they before those for
    all. A list of numbers changes evenly over the blocks of the model or of a slice, its first number being for what
    is outside of them; of a list with filters the first that is in a tensor's name counts. Where mergekit sorts, the
    order of equal magnitudes is not defined; here the lowest index comes first.

    Args:
        config: a mergekit configuration.
        file: where it is from, for messages.

    Raises:
        InputError: a method or key that is not supported, a value of another type, or a missing weight.

    Example:
        >>> models = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": [0, 1]}}]
        >>> recipe = translate({"merge_method": "task_arithmetic", "base_model": "base", "models": models})
        >>> recipe["base"], recipe["finetuned"], recipe["rule"]["init_args"]
        ('base', {'a': 'a', 'b': 'b'}, {'scaling_coefficient': {'a': 0.5, 'b': [0.0, 1.0]}})
    """
    checked(file, dict(config), MergekitConfig)
    name = config["merge_method"]
    if name not in METHODS:
        raise InputError(f"merge_method {name!r} is not supported; {did_you_mean(name, METHODS)}")
    for key, advice in _NOT_DONE.items():
        if config.get(key) is not None:
            raise InputError(f"{key!r} in {str(file)!r} is not supported; {advice}.")
    refuse_unknown(config, _TOP, "a mergekit configuration")
    method = METHODS[name]
    inputs = inputs_of(name, method.base, config)
    parameters = Parameters(name, method.parameters, inputs)
    recipe = {"base": inputs.base, "finetuned": dict(inputs.models), "rule": method.build(parameters)}
    dtype = config.get("dtype")
    if dtype is not None:
        recipe["input_dtype"] = dtype
    if (output := config.get("out_dtype") or dtype) is not None:
        recipe["dtype"] = output
    given = {"tokenizer": config.get("tokenizer_source"), "chat_template": config.get("chat_template")}
    return recipe | {key: value for key, value in given.items() if value is not None}
