"""Whether an adapter is given the base that it was made for: by what it records, and by values where they are at hand.

Names and paths decide nothing. A base is the same under another path or id, as a copy in another dtype, or packed to
four bits; it is another one where the values of the layers that the adapter changes differ by more than rounding does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusionlab.adapters.factors import Adapter, hash_initial
from fusionlab.adapters.fused_attention import adapted_weight, stored_name, stored_shapes
from fusionlab.errors import InputError
from fusionlab.tensors import open_checkpoint
from fusionlab.tensors.hub import at_hand
from fusionlab.tensors.lazy import Weights
from fusionlab.tensors.state import Computed, State

_AT_ONE_POINT = ("l_lora", "tangent_lora")
_ROUNDED = (torch.bfloat16, torch.float16)
_PIECE = 1 << 22  # elements


def layers_of(weights: Weights, adapter: Adapter, names: Mapping[str, str]) -> State:
    """The base weights that an adapter changes, by module, each read when it is asked for; those that fit it.

    Args:
        weights: of the base, as they are stored.
        adapter: with the layout that its layers have there.
        names: name in memory -> name in ``weights``, where it is another one.
    """

    def place(name: str) -> str:
        own = names.get(name, name)
        return own if own in weights.tensors else name

    fitting, shapes = {}, stored_shapes(adapter)
    for module in adapter.factors:
        stored = stored_name(module, adapter.fused_attention)
        info = weights.tensors.get(place(stored))
        if info is not None and info.dtype.is_floating_point and info.shape == shapes[stored]:
            fitting[module] = module
    return Computed(fitting, lambda module: adapted_weight(lambda name: weights.read(place(name)), adapter, module))


@dataclass(frozen=True)
class GivenBase:
    """The base that adapters are given.

    Args:
        name: as the user says it.
        layers: the weights in it that the adapter changes, by module.
        names: gives name in memory -> name in files of this architecture, where it is another one.
        path: where it is; None for a model in memory.
        advice: what to do where it is another one.
    """

    name: str
    layers: Mapping[str, Tensor]
    names: Callable[[], Mapping[str, str]]
    path: Path | None
    advice: str


def check_base(
    what: str, adapter: Adapter, recorded: str | None, base: GivenBase, *, allow_other: bool = False
) -> str | None:
    """A note where it is not known that ``adapter`` was made for ``base``; None where it was.

    The recorded hash decides where it is that of the base, as it is or rounded to 16 bits. Else the base that the
    adapter names does, where its values are at hand without a network. Where they are not, shapes and names must do,
    but for an adapter that holds at one point only and records another one.

    Args:
        what: how to call the adapter.
        adapter: with the layout that its layers have in the base.
        recorded: the hash of the weights that it was trained on, as it records it.
        base: what it is given.
        allow_other: note that it is another base, and go on.

    Raises:
        InputError: it was made for another base.
    """
    named, is_whole = adapter.base_model, set(base.layers) == set(adapter.factors)
    recorded = recorded if is_whole else None  # what does not fit is told where the shapes are compared
    if not base.layers or (recorded is not None and _is_hashed(base.layers, recorded)):
        return None
    if recorded is None and (not named or named.partition("@")[0] == base.name.partition("@")[0]):
        return None
    theirs, unknown = _named_layers(adapter, base)
    different = next((module for module in theirs if not agree(base.layers[module], theirs[module])), None)
    shown = named or "unknown"
    if different is not None:
        problem = f"{different} has other values there than in {base.name!r}"
    elif recorded is None or (not unknown and _is_hashed(theirs, recorded)):
        problem = ""
    elif not unknown:
        problem = f"the values that it records (hash {recorded}) are no longer there, nor in {base.name!r}"
    elif adapter.method in _AT_ONE_POINT:
        problem = (
            f"it records other weights (hash {recorded}) than those of {base.name!r}, {unknown}, and an adapter of "
            f"{adapter.method} holds at the point where it was trained only"
        )
    else:
        problem = ""
        unknown += f", and it records other weights (hash {recorded})"
    if not problem:
        return _unknown_note(what, shown, base.name, unknown) if unknown else None
    message = f"{what} was made for another base ({shown}): {problem}"
    if allow_other:
        return f"{message}; it is used with {base.name!r} all the same, as allow_other_base says"
    raise InputError(f"{message}. {base.advice}")


def _unknown_note(what: str, named: str, base: str, unknown: str) -> str:
    return (
        f"{what} was made for {named!r}, and whether {base!r} is the same model is not known: {unknown}. Names and "
        "shapes fit; on another model's values the adapter means nothing"
    )


def _named_layers(adapter: Adapter, base: GivenBase) -> tuple[State, str]:
    """The layers of the base that the adapter names, and what of them is not at hand."""
    if not adapter.base_model:
        return {}, "the adapter names no base"
    path = at_hand(adapter.base_model, adapter.config.get("revision"))
    if path is None:
        return {}, f"{adapter.base_model!r} is not at hand"
    if base.path is not None and path.resolve() == base.path.resolve():
        return {}, ""
    try:
        layers = layers_of(open_checkpoint(path).weights, adapter, base.names())
    except InputError as error:  # told in the note: only the values decide, and there are none
        return {}, str(error).rstrip(".")
    missing = len(set(base.layers) - set(layers))
    return layers, f"{missing} of its layers are missing, packed or of other shapes there" if missing else ""


def _is_hashed(layers: Mapping[str, Tensor], recorded: str) -> bool:
    return any(layers_hash(layers, dtype) == recorded for dtype in (None, *_ROUNDED))


def layers_hash(layers: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Short SHA-256 over the weights that an adapter changes, rounded to ``dtype``, as adapters record it."""
    wide = dtype or torch.float32
    return hash_initial(Computed({name: name for name in layers}, lambda name: (layers[name].to(wide), None)))[:16]


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two copies of a weight differ by no more than what rounding to the dtypes of both leaves."""
    if ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs.cpu()):
        return True
    pieces = (each.detach().cpu().reshape(-1).split(_PIECE) for each in (ours, theirs))
    return all(_near(*(piece.to(torch.float64) for piece in both)) for both in zip(*pieces, strict=True))


def _near(ours: Tensor, theirs: Tensor) -> bool:
    (unit, least), (other_unit, other_least) = _rounding(ours), _rounding(theirs)
    bound = unit * ours.abs() + other_unit * theirs.abs() + least + other_least
    return bool(((ours - theirs).abs() <= bound).all())


def _rounding(values: Tensor) -> tuple[float, float]:
    """Unit roundoff, and half of the least step, of the narrowest dtype that holds all of ``values`` as they are."""
    for dtype in (*_ROUNDED, torch.float32):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            break
    else:
        dtype = torch.float64
    info = torch.finfo(dtype)
    return info.eps / 2, info.smallest_normal * info.eps / 2
