"""Read back what a run or ``fuse`` wrote: adapters, fused adapters, fused and fine-tuned models, whole run folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionlab import adapters
from fusionlab.adapters import Adapter
from fusionlab.adapters.routed import FusedWeights, RoutedWeights
from fusionlab.adapters.routed_files import load_routed
from fusionlab.adapters.same_base import GivenBase, check_base, layers_hash, layers_of
from fusionlab.backbones.layout import Layout, first_names, from_disk, names_on_disk
from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_there, path_of
from fusionlab.foreign import Results, read_json
from fusionlab.layout import ADAPTER_CONFIG, ADAPTERS, CONFIG, FINETUNED, FUSED, RESULTS, ROUTED_OWN
from fusionlab.linearize import LINEARIZED_METHODS, LinearizedState
from fusionlab.runs.folder import RunFolder
from fusionlab.tensors import masked, open_checkpoint
from fusionlab.tensors.hub import is_hub_id, resolve
from fusionlab.tensors.lazy import StateWeights
from fusionlab.tensors.masked import MaskedVectors, open_masked
from fusionlab.tensors.records import own_record
from fusionlab.tensors.state import State, check_same_names

_log = logging.getLogger(__name__)
_GIVE_ITS_BASE = "Give the base that it was made for (--model.backbone)."


@dataclass(frozen=True)
class LoadedWeights:
    """Weights from a folder.

    Args:
        weights: an adapter, a state of base weights by name, as it is or to act to first order only, weights that are
            weighed anew for every sample, or masks of one vector, of which each task has its own weights.
        labels: what the folder says of itself, as fields of a result row (``model``, ``rule``, ``method``, ...).
    """

    weights: FusedWeights | MaskedVectors
    labels: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder: its configuration, its result rows, and its adapters, fine-tuned and fused models by name."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    adapters: dict[str, Adapter]
    finetuned: dict[str, LoadedWeights]
    fused: dict[str, LoadedWeights]


def load(folder: str | Path) -> Run | LoadedWeights | Adapter:
    """Read any folder that fusionlab or PEFT wrote.

    Args:
        folder: a run folder, an adapter, a fused adapter, or a model in transformers' layout.

    Returns:
        A :class:`Run`, an :class:`Adapter`, or :class:`LoadedWeights` for what was fused or is a full model.

    Raises:
        InputError: nothing there, or nothing that fusionlab can read.
    """
    folder = path_of(folder)
    if is_there(folder / CONFIG) and not own_record(folder):  # which may have come with the base
        return _load_run(folder)
    loaded = load_weights(folder)
    is_plain_adapter = isinstance(loaded.weights, Adapter) and loaded.labels["model"] == "finetuned"
    return loaded.weights if is_plain_adapter else loaded  # type: ignore[return-value]


def weights_folder(name: str) -> Path:
    """The folder of weights that ``name`` stands for: one here, or a hub id ``owner/name``, which is downloaded.

    Raises:
        InputError: a hub id that cannot be had; whether a folder holds weights is told by :func:`load_weights`.
    """
    path = path_of(name)
    return resolve(name) if not path.exists() and "/" in name and is_hub_id(name) else path


def load_weights(
    folder: Path, base: nn.Module | State | None = None, *, base_name: str = "", allow_other_base: bool = False
) -> LoadedWeights:
    """An adapter, a full model or masks from ``folder``, checked against ``base`` where one is given.

    Args:
        folder: what is read.
        base: the model in memory that it is for; or a state under its names on disk, for adapters alone.
        base_name: what the user calls the base, which the adapter then names as its own.
        allow_other_base: warn of an adapter that was made for another base, and go on.

    Raises:
        InputError: no such folder, not a weights folder, or made for another base.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        raise InputError(
            f"no folder {str(folder)!r}; give an adapter's, a fused model's or a fine-tuned model's folder"
        )
    own = own_record(folder)
    labels = {"model": "finetuned"} | (own.get("row") or {})
    if adapters.is_adapter(folder):
        adapter = adapters.load_adapter(folder, None if base is None else _by_name(base))
        if base is not None:
            adapter = _for_base(folder, adapter, base, base_name, allow_other_base)
        if isinstance(base, nn.Module):
            _check_point(folder, own.get("linearization_point"), base)
        return LoadedWeights(adapter, {"method": adapter.method, "seed": adapter.seed} | labels)
    if own.get("masks"):
        return _load_masked(folder, own, labels, base, allow_other_base)
    if is_there(folder / ROUTED_OWN):
        return _load_routed(folder, own, labels, base, allow_other_base)
    if own or any(is_there(folder / name) for name in ("config.json", "open_clip_config.json")):
        state: State = open_checkpoint(folder).state()
        if isinstance(base, nn.Module):
            state = adapters.under_first_names(base, from_disk(base, state))  # some store a tensor under all its names
            check_same_names(adapters.base_state(base), state, what=f"the model in {str(folder)!r}")
            _check_point(folder, own.get("linearization_point"), base)
        linearized = labels.get("method") in LINEARIZED_METHODS
        return LoadedWeights(LinearizedState(state) if linearized else state, labels)
    with accessed(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise InputError(
        f"{str(folder)!r} holds neither {ADAPTER_CONFIG} nor config.json; expected an adapter or a model folder"
        + (f". It has the folders {name_list(inside)}: give one below them." if inside else "")
    )


def _load_masked(
    folder: Path,
    own: Mapping[str, Any],
    labels: dict[str, Any],
    base: nn.Module | State | None,
    allow_other_base: bool,
) -> LoadedWeights:
    """Masks of one vector, which hold on their own base only.

    Raises:
        InputError: files that do not fit one another, or another base.
    """
    vectors = open_masked(folder, own["masks"]["scales"]).as_read()
    vectors = replace(vectors, is_linearized=labels.get("method") in LINEARIZED_METHODS)
    if base is not None:
        if isinstance(base, nn.Module):
            _check_point(folder, own.get("linearization_point"), base)
        _check_hash(folder, own, base, vectors.unified.tensors, "masks", allow_other_base)
    return LoadedWeights(vectors, labels)


def _load_routed(
    folder: Path,
    own: Mapping[str, Any],
    labels: dict[str, Any],
    base: nn.Module | State | None,
    allow_other_base: bool,
) -> LoadedWeights:
    """Experts and routers over their own base.

    Raises:
        InputError: files that do not fit one another, or another base.
    """
    weights = load_routed(folder)
    if isinstance(base, nn.Module):
        parts = {name for name, _ in base.named_modules()}
        missing = [name for name in (*weights.mlps, *weights.experts) if name not in parts]
        if missing:
            raise InputError(f"{str(folder)!r} routes {name_list(missing)}, which this model lacks. {_GIVE_ITS_BASE}")
        _check_hash(folder, own, base, routed_names(base, weights), "experts", allow_other_base)
        if not isinstance(weights.rest, Adapter):
            weights = replace(weights, rest=from_disk(base, weights.rest))
    return LoadedWeights(weights, labels)


def routed_names(base: nn.Module, weights: RoutedWeights) -> list[str]:
    """What a base's files call the weights that experts are added to."""
    names = names_on_disk(base)
    return [names.get(f"{layer}.weight", f"{layer}.weight") for layer in weights.experts]


def _check_hash(
    folder: Path,
    own: Mapping[str, Any],
    base: nn.Module | State,
    names: Iterable[str],
    what: str,
    allow_other_base: bool,
) -> None:
    """Raise, or warn, unless the base has the tensors of these names on disk that ``folder`` was made for."""
    rounded, names = (None, torch.bfloat16, torch.float16), list(names)
    if not any(masked_base_hash(base, names, dtype) == own.get("base_hash") for dtype in rounded):
        told = f"{str(folder)!r} was made for another base ({own.get('base')!r}): its {what} hold on that one only."
        if not allow_other_base:
            raise InputError(f"{told} {_GIVE_ITS_BASE}")
        _log.warning("%s", told)


def masked_base_hash(base: nn.Module | State, names: Iterable[str], dtype: torch.dtype | None = None) -> str:
    """Short SHA-256 over the base's tensors of these names on disk, as they are or rounded."""
    stored, firsts = base, {name: name for name in names}
    if isinstance(base, nn.Module):
        stored, firsts = Layout.of(base).to_disk(adapters.base_state(base)), first_names(base, firsts)
    assert isinstance(stored, Mapping)
    return masked.base_hash(StateWeights(dict(stored)), firsts, dtype)


def _by_name(base: nn.Module | State) -> Callable[[str], Tensor | None]:
    """What gives a tensor of the base by any of its names."""
    return (adapters.base_tensors(base) if isinstance(base, nn.Module) else base).get


def _for_base(
    folder: Path, adapter: Adapter, base: nn.Module | State, base_name: str, allow_other_base: bool
) -> Adapter:
    """The adapter as the layers of ``base`` are laid out, after it was found to be for it.

    Raises:
        InputError: it does not fit, or was made for another base.
    """
    if isinstance(base, nn.Module):
        model, own = base, adapters.base_state(base)
        adapters.check_fits(model, adapter)
        adapter = adapters.laid_out(model, adapter)
        layers: Mapping[str, Tensor] = {module: own[f"{module}.weight"] for module in adapter.factors}
        given = GivenBase(base_name or "this model", layers, lambda: names_on_disk(model), None, _GIVE_ITS_BASE)
    else:
        layers = layers_of(StateWeights(base), adapter, {})
        given = GivenBase(base_name or "this state", layers, dict, None, _GIVE_ITS_BASE)
    recorded = own_record(folder).get("base_hash")
    note = check_base(f"the adapter in {str(folder)!r}", adapter, recorded, given, allow_other=allow_other_base)
    if note is not None:
        _log.warning("%s", note)
    return replace(adapter, base_model=base_name) if base_name else adapter


def _check_point(folder: Path, expected: str | None, base_model: nn.Module) -> None:
    if expected is not None and expected != point_hash(base_model):
        raise InputError(
            f"{str(folder)!r} acts to first order about another model: its linearization point is {expected}, this "
            f"model's weights are {point_hash(base_model)}. Give the base it was trained on with --model.backbone."
        )


def point_hash(base_model: nn.Module) -> str:
    """Short SHA-256 over all base weights: the point about which a tangent model is expanded."""
    base = adapters.base_state(base_model)
    return adapters.hash_initial({name: (value, None) for name, value in base.items() if value.is_floating_point()})[
        :16
    ]


def base_hash(base_model: nn.Module, module_names: Iterable[str]) -> str:
    """Short SHA-256 over the weights of the base's modules that an adapter changes."""
    base = adapters.base_state(base_model)
    return layers_hash({module: base[f"{module}.weight"] for module in module_names})


def _load_run(folder: Path) -> Run:
    results = folder / RESULTS
    return Run(
        path=folder,
        config=RunFolder(folder).config(),
        rows=read_json(results, Results)["rows"] if is_there(results) else [],
        adapters={path.name: adapters.load_adapter(path) for path in _folders(folder / ADAPTERS)},
        finetuned={path.name: load_weights(path) for path in _folders(folder / FINETUNED)},
        fused={path.name: load_weights(path) for path in _folders(folder / FUSED)},
    )


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
