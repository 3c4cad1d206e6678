"""A model stacked from ranges of blocks of one model or of several, as up-scaling and mergekit's slices do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusionlab.commands.fuse.opened import Opened
from fusionlab.commands.fuse.parts import Part
from fusionlab.errors import InputError, name_list
from fusionlab.rules.settings import comes_before_blocks, stack_and_index
from fusionlab.tensors.lazy import JoinedWeights, Weights

_BY_BLOCK = re.compile(r"^layer|layer_types$|^no_rope_layers$")  # keys of lists with an entry a block
_NUMBERS = re.compile(r"\d+")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def stacked(what: str, parts: Sequence[Part], models: Mapping[str, Opened]) -> Opened:
    """One model of the blocks of the parts, numbered anew; the rest is the first part's before and the last's after.

    A single part that is a whole model is that model itself.

    Args:
        what: how to call it.
        parts: ranges of blocks, in order.
        models: every model that they name, open.

    Raises:
        InputError: an adapter, models of several kinds, several stacks of blocks, blocks that there are not, or a
            configuration that speaks of them by number, so that no model of it loads the stack.
    """
    depths = {name: _depth(what, opened) for name, opened in models.items()}
    for part in parts:
        name, (first, end) = part["model"], part["layers"]
        if end > depths[name]:
            raise InputError(f"{what}: {name!r} has {depths[name]} blocks, layers {[first, end]} were asked for.")
    start, last = models[parts[0]["model"]], models[parts[-1]["model"]]
    if len(parts) == 1 and list(parts[0]["layers"]) == [0, depths[parts[0]["model"]]]:
        return start
    for opened in models.values():
        kinds = [each.config.get("model_type") for each in (start, opened)]
        if kinds[0] != kinds[1]:
            raise InputError(f"{what}: {start.name!r} is of type {kinds[0]!r}, {opened.name!r} of {kinds[1]!r}.")
    found: dict[str, tuple[Weights, str]] = {}
    for name in dict.fromkeys((*start.weights.tensors, *last.weights.tensors)):
        if stack_and_index(name) is None:
            is_first = comes_before_blocks(name) or name not in last.weights.tensors
            owner = start if is_first and name in start.weights.tensors else last
            found[name] = owner.weights, name
    total = 0
    for part in parts:
        opened, (first, end) = models[part["model"]], part["layers"]
        for name in opened.weights.tensors:
            place = stack_and_index(name)
            if place is not None and first <= place[1] < end:
                stack, index = place
                rest = name[len(f"{stack}{index}") :]
                found[f"{stack}{total + index - first}{rest}"] = opened.weights, name
        total += end - first
    files = dict.fromkeys(file for opened in models.values() for file in opened.files)
    text = " + ".join(f"{part['model']}[{part['layers'][0]}:{part['layers'][1]}]" for part in parts)
    config = _config(start.config, parts, models, depths, total)
    if any(name in found and name not in start.weights.tensors for name in start.architecture.may_be_tied(found)):
        config["tie_word_embeddings"] = False  # the last model's head is one of its own
    made = replace(start, name=text, files=tuple(files), weights=JoinedWeights(found), config=config, is_remade=True)
    _check_loads(what, models, made)
    return made


def _check_loads(what: str, models: Mapping[str, Opened], made: Opened) -> None:
    """Raise if transformers' own class does not read of the stack what it reads of the models, names told apart.

    What their classes have under other names in memory, as experts that they put together, or do not read is not
    compared.

    Raises:
        InputError: naming what does not fit.
    """
    try:
        if any(opened.architecture.model is None for opened in models.values()):
            return
        misfits = (names for opened in models.values() for names in _misfits(opened))
        elsewhere = {_NUMBERS.sub("#", name) for names in misfits for name in names}
    except InputError:  # transformers makes no model of one of them either
        return
    try:
        found = _misfits(made)
    except InputError as error:
        raise InputError(
            f"{what}: {error}. Its config.json may speak of blocks by number; stack another model."
        ) from error
    missing, unread = ([name for name in names if _NUMBERS.sub("#", name) not in elsewhere] for names in found)
    if missing or unread:
        raise InputError(
            f"{what}: the stack would not load: {name_list(missing or unread)} "
            f"{'are not there for' if missing else 'have no place in'} a model of its config.json, which may speak of "
            f"blocks by number (as by mlp_only_layers); stack another model, or other blocks."
        )


def _misfits(opened: Opened) -> tuple[list[str], list[str]]:
    """Names that the model lacks in the shape of its class, and those that its class does not have.

    Raises:
        InputError: transformers makes no model of the configuration.
    """
    own = {name: tuple(tensor.shape) for name, tensor in opened.architecture.model.state_dict().items()}
    tied = opened.architecture.may_be_tied(own)
    missing = [name for name, shape in own.items() if name not in tied and opened.shapes.get(name) != shape]
    return missing, [name for name in opened.shapes if name not in own]


def _depth(what: str, opened: Opened) -> int:
    """The number of blocks of a model that has one stack of them."""
    if opened.adapter is not None:
        raise InputError(f"{what}: {opened.name!r} is an adapter, of which no layers can be taken; merge it first.")
    places = [place for name in opened.weights.tensors if (place := stack_and_index(name)) is not None]
    stacks = list(dict.fromkeys(stack for stack, _ in places))
    if len(stacks) != 1:
        raise InputError(
            f"{what}: {opened.name!r} has {len(stacks)} stacks of blocks, expected one: {name_list(stacks)}."
        )
    return max(index for _, index in places) + 1


def _config(
    config: Mapping[str, Any],
    parts: Sequence[Part],
    models: Mapping[str, Opened],
    depths: Mapping[str, int],
    total: int,
) -> dict[str, Any]:
    """``config.json`` with the new number of blocks, and what it lists block by block stacked in the same way."""
    own = depths[parts[0]["model"]]
    found = dict(config)
    for key, value in config.items():
        if key in _DEPTH and value == own:
            found[key] = total
        if isinstance(value, list) and len(value) == own and all(isinstance(each, (str, int)) for each in value):
            lists = [models[part["model"]].config.get(key) or [] for part in parts]
            stacked = [each for part, its in zip(parts, lists, strict=True) for each in its[slice(*part["layers"])]]
            if _BY_BLOCK.search(key) and len(stacked) == total:
                found[key] = stacked
    return found
