"""The folders of a run's weights: what was trained for a task, and what was fused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fusionlab.adapters import Adapter, base_state, save_adapter, save_fused_adapter, under_first_names
from fusionlab.adapters.routed import RoutedWeights
from fusionlab.adapters.routed_files import save_routed
from fusionlab.adapters.weights import Weights, is_linearized, state_of
from fusionlab.backbones import CausalBackbone, own_folder
from fusionlab.backbones.layout import names_on_disk, to_disk
from fusionlab.blocks.sums import squared_norm
from fusionlab.cards import Origin, write_card
from fusionlab.contracts import Backbone, Module
from fusionlab.files import write_folder
from fusionlab.fusion.adapted import task_vector
from fusionlab.fusion.fused import FusedModel
from fusionlab.layout import ADAPTERS, FINETUNED, FUSION, OWN, STATS
from fusionlab.rules.config import to_config
from fusionlab.runs.loading import base_hash, masked_base_hash, point_hash, routed_names
from fusionlab.tensors import save_state
from fusionlab.tensors.companions import carry
from fusionlab.tensors.dtypes import say_dtype
from fusionlab.tensors.fingerprints import file_records
from fusionlab.tensors.masked import MaskedVectors, save_masked
from fusionlab.tensors.state import State
from fusionlab.tensors.stats import adapter_files, task_vector_key, write_squared_norms

_CONFIGS = ("config.json", "open_clip_config.json")  # which says how the weights are laid out
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_PIXELS = ("preprocessor_config.json", "processor_config.json")


def export_finetuned(module: Module, root: Path, tasks: list[str], origin: Origin | None = None) -> None:
    """Write what is trained for each task to ``adapters/<task>/`` or ``finetuned/<task>/`` of a run folder.

    All processes call it, as split weights are gathered; the first one writes.

    Args:
        module: holds what is trained.
        root: the run folder.
        tasks: names of the tasks.
        origin: what their cards tell of the run.
    """
    for task in tasks:
        weights = module.finetuned(task)
        if module.global_rank == 0:
            kind = ADAPTERS if isinstance(weights, Adapter) else FINETUNED
            row = {"model": "finetuned", "finetuned_on": task, "method": module.method, "seed": module.seed}
            known = module.adapted_base_hash
            save_finetuned(root / kind / task, weights, module.backbone, row, known, origin)
    module.export(root, tasks)


def save_finetuned(
    folder: Path,
    weights: Weights,
    backbone: Backbone,
    row: dict[str, Any],
    known_hash: str | None = None,
    origin: Origin | None = None,
) -> None:
    """Write what was trained for a task, whole or not at all: an adapter, or a full model in the base's own layout.

    Args:
        folder: where to; what is there is replaced.
        weights: an adapter, or base weights by name.
        backbone: the base.
        row: its fields of a result row.
        known_hash: the hash of the base weights that the adapter changes, where it was made before.
        origin: what the card tells of the run; its base is the backbone.
    """
    own: dict[str, Any] = {"schema": 1, "base": backbone.name, "row": row}
    if known_hash is not None:
        own["base_hash"] = known_hash
    with write_folder(folder, overwrite=True) as unfinished:
        _write_weights(unfinished, weights, backbone, own)
        path = unfinished / OWN
        written = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(written | own, indent=2, sort_keys=True) + "\n")
        if isinstance(weights, Adapter):
            _write_stats(unfinished, weights, backbone)
        _write_card(unfinished, backbone, row, origin)


def _write_stats(folder: Path, adapter: Adapter, backbone: Backbone) -> None:
    """Keep the task vector's squared norms beside it, so that MetaGPT need not measure it again."""
    units = task_vector(adapter, names_on_disk(backbone.model), apart=True)
    squared_norms = {name: squared_norm(tensor) for name, tensor in units.items()}
    write_squared_norms(folder / STATS, task_vector_key(file_records(adapter_files(folder)), None), squared_norms)


def save_fused(
    folder: Path,
    fused: FusedModel,
    backbone: Backbone,
    row: dict[str, Any],
    more: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> None:
    """Write a fused model, whole or not at all: an adapter, a full model in the base's layout, experts, or masks.

    Args:
        folder: where to; what is there is replaced.
        fused: the fused model.
        backbone: the base, whose configuration and tokenizer files are written beside full weights.
        row: its fields of a result row.
        more: further entries of ``fusion.json``.
        origin: what the card tells of the run; its base is the backbone.
    """
    record = (
        {
            "schema": 1,
            "rule": to_config(fused.rule),
            "base": backbone.name,
            "scaling_coefficients": fused.scaling_coefficients,
            "norms": fused.norms,
            "cosines": fused.cosines,
            "remarks": fused.remarks,
            "row": row,
            "versions": {name: version(name) for name in ("fusionlab", "torch", "transformers", "peft")},
        }
        | dict(fused.rounding)
        | dict(more or {})
    )
    with write_folder(folder, overwrite=True) as unfinished:
        if isinstance(fused.weights, MaskedVectors):
            _write_masks(unfinished, fused, backbone, record)
            _write_template(unfinished, backbone)
        elif isinstance(fused.weights, RoutedWeights):
            record |= write_routed(unfinished, fused, backbone)
            _write_template(unfinished, backbone)
        else:
            _write_weights(unfinished, fused.weights, backbone, record, save_fused_adapter)
        (unfinished / FUSION).write_text(json.dumps(record, indent=2) + "\n")
        _write_card(unfinished, backbone, row, origin)


def _write_card(folder: Path, backbone: Backbone, row: Mapping[str, Any], origin: Origin | None) -> None:
    parts = (Path(backbone.name).name, row.get("method"), row.get("rule") or row.get("finetuned_on"))
    told, name = origin or Origin(backbone.name), "-".join(filter(None, parts))
    write_card(folder, replace(told, base=backbone.name, base_folder=own_folder(backbone), name=name))


def _write_weights(
    folder: Path,
    weights: Weights,
    backbone: Backbone,
    record: dict[str, Any],
    save: Callable[[Path, Adapter], Any] = save_adapter,
) -> None:
    """Write the weights themselves, and into ``record`` what base they belong to."""
    if isinstance(weights, Adapter):
        save(folder, weights)
        _write_template(folder, backbone)
        if "base_hash" not in record:
            record["base_hash"] = base_hash(backbone.model, weights.factors)
    else:
        _write_companions(folder, backbone)
        state, dtype = _in_one_dtype(base_state(backbone.model), under_first_names(backbone.model, state_of(weights)))
        save_state(folder, to_disk(backbone.model, state))
        say_dtype(folder, dtype)
    if is_linearized(weights):
        record["linearization_point"] = point_hash(backbone.model)


def _write_masks(folder: Path, fused: FusedModel, backbone: Backbone, record: dict[str, Any]) -> None:
    """Write u and the masks, and into ``record`` what base they belong to and how large they are."""
    masked = fused.weights
    assert isinstance(masked, MaskedVectors)
    save_masked(folder, masked)
    record["base_hash"] = masked_base_hash(backbone.model, masked.unified.tensors)
    record["masks"] = fused.masks
    if masked.is_linearized:
        record["linearization_point"] = point_hash(backbone.model)


def write_routed(folder: Path, fused: FusedModel, backbone: Backbone) -> dict[str, Any]:
    """Write experts, routers and the rest into an existing folder.

    Returns:
        what ``fusion.json`` tells of them: the base that they belong to, and how large they are.
    """
    weights = fused.weights
    assert isinstance(weights, RoutedWeights)
    rest = weights.rest if isinstance(weights.rest, Adapter) else to_disk(backbone.model, weights.rest)
    save_routed(folder, replace(weights, rest=rest))
    names = routed_names(backbone.model, weights)
    return {"base_hash": masked_base_hash(backbone.model, names), "routed": dict(fused.routed)}


def _write_companions(folder: Path, backbone: Backbone) -> None:
    """Write what belongs beside full weights: what the backbone knows of itself, all else as its own folder has it."""
    backbone.save_files(folder)
    source = own_folder(backbone)
    if source is not None:
        if any((source / name).is_file() for name in _PIXELS):
            (folder / _PIXELS[0]).unlink(missing_ok=True)  # the base's own says more
        replaced = isinstance(backbone, CausalBackbone) and backbone.has_other_template
        carry(source, folder, without=(*_CONFIGS, *(_TEMPLATES if replaced else ())))


def _write_template(folder: Path, backbone: Backbone) -> None:
    """Write the tokenizer beside what belongs on the base, where its chat template is not the base's."""
    if isinstance(backbone, CausalBackbone) and backbone.has_other_template:
        backbone.tokenizer.save_pretrained(folder)


def _in_one_dtype(base: State, weights: State) -> tuple[State, torch.dtype | None]:
    """The whole model, the base's floating-point tensors in the dtype of the weights where that is another one.

    Returns:
        the state, and its dtype where that or the base's is narrower than float32, for its configuration to say.
    """
    dtypes = {value.dtype for name, value in weights.items() if value.dtype != base[name].dtype}
    assert len(dtypes) < 2, f"weights of several dtypes: {dtypes}"
    for dtype in dtypes:
        base = {name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()}
    state = {**base, **weights}
    floats = {value.dtype for value in state.values() if value.is_floating_point()}
    says = bool(dtypes) or any(dtype.itemsize < 4 for dtype in floats)
    return state, floats.pop() if says and len(floats) == 1 else None
