"""Opening what a recipe names: the base, full checkpoints and adapters, checked against one another from headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionlab.commands.fuse.layouts import placed_in
from fusionlab.commands.fuse.opened import Opened, full_model
from fusionlab.commands.fuse.parts import Part
from fusionlab.commands.fuse.stacks import stacked
from fusionlab.commands.fuse.vocabulary import Shapes, adapter_shapes, check_vocabulary, vocabulary_sizes
from fusionlab.engine import Job, StateWeights, TensorInfo
from fusionlab.errors import InputError, name_list
from fusionlab.files import is_there
from fusionlab.foreign import PeftConfig, read_json
from fusionlab.layout import ADAPTER_CONFIG, FUSION, MASKS, ROUTED_OWN, UNIFIED
from fusionlab.tensors import open_checkpoint
from fusionlab.tensors.hub import embedded, resolve
from fusionlab.tensors.lazy import NamedWeights
from fusionlab.tensors.masked import base_hash, open_masked
from fusionlab.tensors.parts import relation
from fusionlab.tensors.records import own_record
from fusionlab.tensors.stats import adapter_files
from fusionlab.tensors.weight_files import unread_weights

_OTHER_BASE = "Give the base that it was made for, or insist on this one with --allow_other_base."
_RESIZE = (
    "Resize one of them in transformers (resize_token_embeddings) and save it with its tokenizer, or say "
    "mismatched_tensors: base to take these tensors from the base."
)
_MERGE = (
    "Merge it into the model that it was trained on, resized as there (PEFT's merge_and_unload), save that with its "
    "tokenizer, and fuse full models."
)
_SAME_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def open_base(name: str | Sequence[Part], variant: str | None = None) -> Opened:
    """The model that fusion adds to: an embedded name, a path or a hub id, the first of these that there is.

    Args:
        name: any of them; or ranges of blocks of such models.
        variant: of its weight files.

    Raises:
        InputError: not there, not readable, or an adapter; ranges that do not fit.
    """
    if not isinstance(name, str):
        return _open_stack("base", name, variant)
    path = embedded(name) or resolve(name, variant)
    if is_there(path / ADAPTER_CONFIG):
        raise InputError(f"base {name!r} is an adapter; give the full model it was made for, and it under finetuned.")
    return full_model(name, path, open_checkpoint(path, variant))


def _open_stack(what: str, parts: Sequence[Part], variant: str | None) -> Opened:
    models = dict.fromkeys(part["model"] for part in parts)
    return stacked(what, parts, {name: open_base(name, variant) for name in models})


def open_input(
    task: str,
    name: str | Sequence[Part],
    base: Opened,
    cache_bytes: int,
    variant: str | None = None,
    *,
    allow_other_base: bool = False,
) -> Opened:
    """A fine-tuned model or an adapter, checked against ``base`` as far as names and shapes do not say it.

    Args:
        task: its task.
        name: a path or a hub id; or ranges of blocks of full models.
        base: the base.
        cache_bytes: what may be kept of an adapter's task vector.
        variant: of a full model's weight files.
        allow_other_base: take an adapter for another base, and note it.

    Raises:
        InputError: not there, not readable, of another architecture, or an adapter for another base.
    """
    if not isinstance(name, str):
        opened = _open_stack(f"finetuned {task!r}", name, variant)
        _refuse_tangent(task, opened.path)
        _check_architecture(task, base, opened)
        return opened
    path = resolve(name, variant)
    if is_there(path / ROUTED_OWN):
        raise InputError(
            f"finetuned {task!r}: {str(path)!r} has weights of its own for every sample, which are no task vector; "
            f"leave it out."
        )
    if is_there(path / MASKS):
        return _open_masks(task, name, path, base, allow_other_base=allow_other_base)
    if not is_there(path / ADAPTER_CONFIG):
        _refuse_tangent(task, path)
        opened = _related(task, base, full_model(name, path, open_checkpoint(path, variant)))
        if not opened.is_part:
            _check_architecture(task, base, opened)
        return opened
    return _open_adapter(task, name, path, base, cache_bytes, allow_other_base=allow_other_base)


def _open_masks(task: str, name: str, path: Path, base: Opened, *, allow_other_base: bool) -> Opened:
    """The task's weights in a folder of masks, which hold on their own base."""
    _refuse_tangent(task, path)
    record = own_record(path)
    weights = open_masked(path, (record.get("masks") or {}).get("scales", {})).of(task)
    names = {each: _name_in(base, each) for each in weights.tensors}
    rounded = (None, torch.bfloat16, torch.float16)
    made_for, notes = record.get("base_hash"), []
    if not any(base_hash(base.weights, names, dtype) == made_for for dtype in rounded):
        told = f"masks {task!r} in {str(path)!r} were made for another base ({record.get('base')!r})"
        if not allow_other_base:
            raise InputError(f"{told}. {_OTHER_BASE}")
        notes.append(told)
    files = tuple(path / each for each in (UNIFIED, MASKS, FUSION))
    return Opened(
        name, path, files, weights, {}, notes=tuple(notes), is_masked=True, of_models=not _of_adapters(record)
    )


def _of_adapters(record: Mapping[str, Any]) -> bool:
    """Whether masks were made of adapters, as their ``fusion.json`` says: of a run's method, or of its inputs."""
    from fusionlab.adapters.factors import METHODS  # imports peft, which takes seconds

    kinds = [str(each.get("kind", "")) for each in (record.get("finetuned") or {}).values()]
    return (record.get("row") or {}).get("method") in METHODS or any(kind.startswith("adapter") for kind in kinds)


def _open_adapter(
    task: str, name: str, path: Path, base: Opened, cache_bytes: int, *, allow_other_base: bool
) -> Opened:
    """An adapter, whose modules are those of the base."""
    if base.is_remade:
        raise InputError(
            f"adapter {task!r}: the base {base.name} is made of ranges of blocks, which an adapter was not trained on; "
            "merge it into its own base first."
        )
    _check_vocabulary(f"adapter {task!r}", path, adapter_shapes(path, base.shapes), base, _MERGE)
    from fusionlab.adapters import load_adapter  # imports peft, which takes seconds
    from fusionlab.adapters.same_base import GivenBase, check_base

    adapter = load_adapter(path, partial(_of_base, base))
    if adapter.method == "tangent_lora":
        raise InputError(
            f"adapter {task!r} is a tangent_lora: it acts under the linearized forward only and is no task vector of "
            "weights. Fuse such adapters in a run (fit), or use lora or l_lora adapters."
        )
    config = read_json(path / ADAPTER_CONFIG, PeftConfig)
    placed = placed_in(task, base, adapter, str((config.get("auto_mapping") or {}).get("base_model_class") or ""))
    given = GivenBase(base.name, placed.layers, lambda: placed.own_names, base.path, _OTHER_BASE)
    recorded = own_record(path).get("base_hash")
    note = check_base(f"adapter {task!r}", placed.own, recorded, given, allow_other=allow_other_base)
    adapter = placed.adapter if note is None else replace(placed.adapter, base_model=base.name)
    files, notes = adapter_files(path), () if note is None else (note,)
    weights, unread = _task_vector_weights(adapter, placed.names, cache_bytes), tuple(unread_weights(path, files))
    return Opened(name, path, files, weights, config, unread, adapter, placed.names, notes=notes)


def _of_base(base: Opened, name: str) -> Tensor | None:
    """The base's tensor of this name, or the one that it is tied to."""
    name = _name_in(base, name)
    return base.weights.read(name) if name in base.weights.tensors else None


def _name_in(base: Opened, name: str) -> str:
    """The name in the base's files, where it may be that of what it is tied to."""
    if name in base.weights.tensors:
        return name
    tie = base.architecture.may_be_tied(base.weights.tensors).get(name)
    return name if tie is None else tie.source


def _refuse_tangent(task: str, path: Path) -> None:
    """Raise if a model acts to first order only: its weights are no function of their own."""
    if path.is_dir() and own_record(path).get("linearization_point") is not None:
        raise InputError(
            f"fine-tuned {task!r} in {str(path)!r} is a tangent model: it acts to first order about its base only, and "
            "as ordinary weights is another function. Fuse such models in a run (fit)."
        )


def _related(task: str, base: Opened, opened: Opened) -> Opened:
    """A full model under the base's names, where it is a part of the base or the base one of it, or has older names."""
    found = relation(base.shapes, base.architecture, opened.shapes, opened.architecture)
    if found is None:
        return opened
    taken = set(found.names.values())
    rest = {name: name for name in opened.weights.tensors if name not in taken and name not in found.names}
    weights, notes = NamedWeights(opened.weights, {**found.names, **rest}), ()
    if found.is_part:
        kinds = [each.architecture.source.node.name for each in (opened, base) if each.architecture.source is not None]
        notes = (
            f"{task!r} is a {kinds[0]}, the base a {kinds[-1]}: they have {len(found.names)} tensors in common; the "
            "others are the base's own"
            + (f", those too that it lacks in their place: {name_list(found.lacking)}" if found.lacking else ""),
        )
    return replace(opened, weights=weights, is_part=found.is_part, notes=notes)


def of_one_base(inputs: Mapping[str, Opened], base: Opened) -> dict[str, Opened]:
    """The inputs with adapters that name ``base`` as the recipe does, where they name it in several ways."""
    names = {opened.adapter.base_model for opened in inputs.values() if opened.adapter is not None} - {""}
    if len(names) < 2:
        return dict(inputs)
    return {
        task: opened
        if opened.adapter is None
        else replace(opened, adapter=replace(opened.adapter, base_model=base.name))
        for task, opened in inputs.items()
    }


def with_adapter(opened: Opened, adapter: Any, names: Mapping[str, str], cache_bytes: int) -> Opened:
    """Another adapter in the place of an opened one, such as what was fused of several.

    Args:
        opened: an adapter.
        adapter: what is read in its place.
        names: name in memory -> name in the base's files, where they differ.
        cache_bytes: what may be kept of its task vector.
    """
    return replace(opened, weights=_task_vector_weights(adapter, names, cache_bytes), adapter=adapter, names=names)


def fused_parts(job: Job, inputs: Mapping[str, Opened]) -> dict[str, Opened]:
    """Where all are adapters, each without modules whose weights are left to the base; else what is given.

    Raises:
        InputError: nothing is left of one.
    """
    fused = set(job.plan.fused)
    found = dict(inputs)
    for task, opened in inputs.items() if all(each.adapter is not None for each in inputs.values()) else ():
        names, own = opened.names, opened.adapter.factors
        kept = {module: own[module] for module in own if names.get(f"{module}.weight", f"{module}.weight") in fused}
        if not kept:
            raise InputError(
                f"adapter {task!r} changes nothing that fits the base: {name_list(own)}. Give the base that it was "
                "made for."
            )
        found[task] = replace(opened, adapter=replace(opened.adapter, factors=kept))
    return found


def _task_vector_weights(adapter: Any, names: Mapping[str, str], cache_bytes: int) -> StateWeights:
    from fusionlab.adapters import stored_shapes, stored_task_vector
    from fusionlab.fusion.adapted import renamed

    infos = {names.get(own, own): TensorInfo(shape, torch.float32) for own, shape in stored_shapes(adapter).items()}
    return StateWeights(renamed(stored_task_vector(adapter), names), infos, cache_bytes)


def check_vocabularies(base: Opened, inputs: Mapping[str, Opened]) -> None:
    """Raise if a full model has another vocabulary than ``base``; that of an adapter was checked when it was opened.

    Raises:
        InputError: with both numbers, and what to do.
    """
    for task, opened in inputs.items():
        if opened.adapter is None:
            _check_vocabulary(f"fine-tuned {task!r}", opened.path, opened.shapes, base, _RESIZE)


def _check_vocabulary(what: str, path: Path, shapes: Shapes, base: Opened, advice: str) -> None:
    folder = path if path.is_dir() else path.parent
    base_folder = base.path if base.path.is_dir() else base.path.parent
    check_vocabulary(what, folder, shapes, base.shapes, base_folder, vocabulary_sizes(base.config), advice)


def _check_architecture(task: str, base: Opened, opened: Opened) -> None:
    """Raise if both say what they are and it differs; without a config the names and shapes must do."""
    different = [
        f"{key} {opened.config[key]!r} (the base has {base.config[key]!r})"
        for key in _SAME_ARCHITECTURE
        if key in base.config and key in opened.config and base.config[key] != opened.config[key]
    ]
    if different:
        raise InputError(
            f"fine-tuned {task!r} in {opened.name!r} is of another architecture: {name_list(different)}. "
            "Use models made from the same base."
        )
