"""Read back what a run or ``fuse`` wrote: adapters, fused adapters, fused and fine-tuned models, whole run folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fusionlab import adapters
from fusionlab.adapters import Adapter
from fusionlab.backbones.layout import from_disk
from fusionlab.checkpoints import open_checkpoint
from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_there, path_of
from fusionlab.foreign import OwnRecord, Results, RunConfig, read_json, read_yaml
from fusionlab.linearize import LINEARIZED_METHODS, LinearizedState
from fusionlab.runs import CONFIG, RESULTS
from fusionlab.state import check_same_names
from fusionlab.weights import Weights


@dataclass(frozen=True)
class LoadedWeights:
    """Weights from a folder.

    Args:
        weights: an adapter, or a state of base weights by name, as it is or to act to first order only.
        labels: what the folder says of itself, as fields of a result row (``model``, ``rule``, ``method``, ...).
    """

    weights: Weights
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
    if is_there(folder / CONFIG):
        return _load_run(folder)
    loaded = load_weights(folder)
    is_plain_adapter = isinstance(loaded.weights, Adapter) and loaded.labels["model"] == "finetuned"
    return loaded.weights if is_plain_adapter else loaded  # type: ignore[return-value]


def load_weights(folder: Path, base_model: nn.Module | None = None) -> LoadedWeights:
    """An adapter or a full model from ``folder``, checked against ``base_model`` where one is given.

    Raises:
        InputError: no such folder, not a weights folder, or made for another base.
    """
    if not path_of(folder).is_dir():
        raise InputError(
            f"no folder {str(folder)!r}; give an adapter's, a fused model's or a fine-tuned model's folder"
        )
    own = own_record(folder)
    labels = {"model": "finetuned"} | (own.get("row") or {})
    if adapters.is_adapter(folder):
        adapter = adapters.load_adapter(folder)
        if base_model is not None:
            adapters.check_fits(base_model, adapter)
            adapter = adapters.laid_out(base_model, adapter)
            _check_base_hash(folder, own.get("base_hash"), base_model, adapter)
            _check_point(folder, own.get("linearization_point"), base_model)
        return LoadedWeights(adapter, {"method": adapter.method} | labels)
    if any(is_there(folder / name) for name in ("config.json", "open_clip_config.json")):
        state = open_checkpoint(folder).state()
        if base_model is not None:
            tied = adapters.tied_names(base_model)  # stored under all their names by some
            state = {name: tensor for name, tensor in state.items() if name not in tied}
            state = from_disk(base_model, state)
            check_same_names(adapters.base_state(base_model), state, what=f"the model in {str(folder)!r}")
            _check_point(folder, own.get("linearization_point"), base_model)
        linearized = labels.get("method") in LINEARIZED_METHODS
        return LoadedWeights(LinearizedState(state) if linearized else state, labels)
    with accessed(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise InputError(
        f"{str(folder)!r} holds neither adapter_config.json nor config.json; expected an adapter or a model folder"
        + (f". It has the folders {name_list(inside)}: give one below them." if inside else "")
    )


def own_record(folder: Path) -> dict[str, Any]:
    """What fusionlab wrote of the folder itself; empty for folders of other tools."""
    for name in ("fusion.json", "fusionlab.json"):
        if is_there(folder / name):
            return read_json(folder / name, OwnRecord)
    return {}


def _check_base_hash(folder: Path, expected: str | None, base_model: nn.Module, adapter: Adapter) -> None:
    if expected is not None and expected != base_hash(base_model, adapter.factors):
        raise InputError(
            f"{str(folder)!r} was made for another base ({adapter.base_model or 'unknown'}): the weights that it "
            f"adapts differ from this model's. Give the base it was made for with --model.backbone."
        )


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
    return adapters.hash_initial({module: (base[f"{module}.weight"], None) for module in module_names})[:16]


def _load_run(folder: Path) -> Run:
    results = folder / RESULTS
    return Run(
        path=folder,
        config=read_yaml(folder / CONFIG, RunConfig),
        rows=read_json(results, Results)["rows"] if is_there(results) else [],
        adapters={path.name: adapters.load_adapter(path) for path in _folders(folder / "adapters")},
        finetuned={path.name: load_weights(path) for path in _folders(folder / "finetuned")},
        fused={path.name: load_weights(path) for path in _folders(folder / "fused")},
    )


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
