"""Which fine-tuning methods a sweep fits: those of a module that is given one, or the one of a module that has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusionlab.commands.arguments import check_arguments
from fusionlab.commands.sweep.recipe import METHODS, SweepRecipe
from fusionlab.contracts import as_module
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.modules import FusionModule
from fusionlab.search.workbench import arguments_of, class_given, module_of, parser_of

DEFAULT = ("lora", "l_lora")


def methods_of(recipe: SweepRecipe) -> dict[str, bool]:
    """The methods that a sweep fits, and whether its module is given each one as an argument.

    Raises:
        InputError: no such method, or one that the module does not take; or what the module refuses.
    """
    found: dict[str, bool] = {}
    if recipe.methods is None:
        own = own_method(recipe.config())
        found = dict.fromkeys(DEFAULT if own is None else [own], own is None)
    for method in recipe.methods or ():
        own = own_method(config := recipe.config(method))
        owner = class_given("model", config["model"])
        if issubclass(owner, FusionModule) and method not in METHODS:
            raise InputError(f"methods: no such method {method!r}; {did_you_mean(method, METHODS)}")
        if own is not None and own != method:
            raise InputError(
                f"methods: {owner.__name__} trains by {own!r} and takes no other, got {method!r}; leave methods out"
            )
        found[method] = own is None
    known = dict.fromkeys([*METHODS, *found])
    unknown = [method for method in recipe.by_method if method not in known]
    if unknown:
        raise InputError(f"by_method: no such method {name_list(unknown)}; {did_you_mean(unknown[0], known)}")
    return found


def own_method(config: Mapping[str, Any]) -> str | None:
    """The method of a module that has one only; None where it takes an argument ``method`` that says it.

    Raises:
        InputError: what the module refuses.
    """
    given = config["model"]
    owner = class_given("model", given)
    if issubclass(owner, FusionModule):
        return None
    takes = "method" in arguments_of(owner)
    asked = (given.get("init_args") or {}).get("method", parser_of(owner)[0].get_defaults().get("method"))
    if takes and asked is None:
        return None
    check_arguments(config)
    own = as_module(module_of(config)).method
    return None if takes and own == asked else own  # else the argument means something else
