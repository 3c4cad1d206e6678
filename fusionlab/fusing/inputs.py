"""Opening what a recipe names: the base, full checkpoints and adapters, checked against one another from headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionlab.checkpoints import open_checkpoint
from fusionlab.checkpoints.hub import is_hub_id, resolve
from fusionlab.checkpoints.stats import adapter_files
from fusionlab.checkpoints.weight_files import unread_weights
from fusionlab.errors import InputError, name_list
from fusionlab.files import is_there
from fusionlab.foreign import OwnRecord, PeftConfig, read_json
from fusionlab.fusing.layouts import laid_out, names_on_disk
from fusionlab.fusing.opened import Opened, full_model
from fusionlab.fusing.vocabulary import Shapes, adapter_shapes, check_vocabulary, vocabulary_sizes
from fusionlab.streaming import Job, StateWeights, TensorInfo, Weights

_ASSETS = Path(__file__).parents[1] / "assets"
_HEAD_ELEMENTS = 1024
_RESIZE = (
    "Resize one of them in transformers (resize_token_embeddings) and save it with its tokenizer, or say "
    "mismatched_tensors: base to take these tensors from the base."
)
_MERGE = (
    "Merge it into the model that it was trained on, resized as there (PEFT's merge_and_unload), save that with its "
    "tokenizer, and fuse full models."
)
_SAME_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def open_base(name: str, variant: str | None = None) -> Opened:
    """The model that fusion adds to: an embedded name, a path or a hub id, the first of these that there is.

    Args:
        name: any of them.
        variant: of its weight files.

    Raises:
        InputError: not there, not readable, or an adapter.
    """
    path = _local(name, variant)
    if is_there(path / "adapter_config.json"):
        raise InputError(f"base {name!r} is an adapter; give the full model it was made for, and it under finetuned.")
    return full_model(name, path, open_checkpoint(path, variant))


def _local(name: str, variant: str | None = None) -> Path:
    """Where a base is: among the embedded models, at a path, or on the hub."""
    is_embedded = name in (folder.name for folder in _ASSETS.iterdir() if (folder / "config.json").is_file())
    return _ASSETS / name if is_embedded else resolve(name, variant)


def open_input(task: str, name: str, base: Opened, cache_bytes: int, variant: str | None = None) -> Opened:
    """A fine-tuned model or an adapter, checked against ``base`` as far as names and shapes do not say it.

    Args:
        task: its task.
        name: a path or a hub id.
        base: the base.
        cache_bytes: what may be kept of an adapter's task vector.
        variant: of a full model's weight files.

    Raises:
        InputError: not there, not readable, of another architecture, or an adapter for another base.
    """
    path = resolve(name, variant)
    if not is_there(path / "adapter_config.json"):
        opened = full_model(name, path, open_checkpoint(path, variant))
        _check_architecture(task, base, opened)
        return opened
    _check_vocabulary(f"adapter {task!r}", path, adapter_shapes(path, base.shapes), base, _MERGE)
    from fusionlab.adapters import load_adapter, stored_shapes  # imports peft, which takes seconds

    adapter = load_adapter(path)
    if adapter.method == "tangent_lora":
        raise InputError(
            f"adapter {task!r} is a tangent_lora: it acts under the linearized forward only and is no task vector of "
            "weights. Fuse such adapters in a run (fit), or use lora or l_lora adapters."
        )
    shapes = stored_shapes(adapter)
    names = names_on_disk(base) if any(own not in base.weights.tensors for own in shapes) else {}
    adapter = laid_out(task, adapter, base, names)
    _check_base(task, path, adapter, base, names)
    files, config = adapter_files(path), read_json(path / "adapter_config.json", PeftConfig)
    weights = _task_vector_weights(adapter, names, cache_bytes)
    return Opened(name, path, files, weights, config, tuple(unread_weights(path, files)), adapter, names)


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
    from fusionlab.fusion.adapted import Renamed

    infos = {names.get(own, own): TensorInfo(shape, torch.float32) for own, shape in stored_shapes(adapter).items()}
    return StateWeights(Renamed(stored_task_vector(adapter), names), infos, cache_bytes)


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


def base_hash(base: Weights, adapter: Any, names: Mapping[str, str]) -> str:
    """Short SHA-256 over the base weights that an adapter changes, as adapters and fused adapters record it.

    Args:
        base: the base's files.
        adapter: the adapter.
        names: name in memory -> name in the files, where they differ.
    """
    from fusionlab.adapters import hash_initial

    return hash_initial(_AdaptedWeights(base, adapter, names))[:16]


class _AdaptedWeights(Mapping[str, tuple[Tensor, None]]):
    """The base weights of modules, read one at a time."""

    def __init__(self, base: Weights, adapter: Any, names: Mapping[str, str]) -> None:
        self._base, self._adapter, self._names = base, adapter, names

    def __getitem__(self, module: str) -> tuple[Tensor, None]:
        from fusionlab.adapters import adapted_weight

        return adapted_weight(self._read, self._adapter, module), None

    def _read(self, name: str) -> Tensor:
        return self._base.read(self._names.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.factors)

    def __len__(self) -> int:
        return len(self._adapter.factors)


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


def _check_base(task: str, path: Path, adapter: Any, base: Opened, names: Mapping[str, str]) -> None:
    """Raise if the adapter was provably made for another base: by hash, by hub id, or by what its base's path holds."""
    from fusionlab.adapters import stored_name

    own = read_json(path / "fusionlab.json", OwnRecord) if is_there(path / "fusionlab.json") else {}
    expected, theirs = own.get("base_hash"), Path(adapter.base_model).expanduser()
    stored = (stored_name(module, adapter.fused_attention) for module in adapter.factors)
    there = all(names.get(name, name) in base.weights.tensors for name in stored)
    if expected is not None:
        other = there and base_hash(base.weights, adapter, names) != expected
    elif adapter.base_model and (theirs / "config.json").is_file():
        other = not _same_model(theirs, base)
    else:
        ids = (adapter.base_model, base.name.partition("@")[0])
        other = ids[0] != ids[1] and all(is_hub_id(name) for name in ids)
    if other:
        raise InputError(
            f"adapter {task!r} was made for another base, {adapter.base_model or 'unknown'!r}: its weights are not "
            f"those of {base.name!r}. Give the base that it was made for."
        )


def _same_model(theirs: Path, base: Opened) -> bool:
    """Whether a folder holds the base's tensors, going by names, shapes and the first bytes of each."""
    if theirs.resolve() == base.path.resolve():
        return True
    other, own = open_checkpoint(theirs).weights, base.weights
    if dict(other.tensors) != dict(own.tensors):
        return False
    for name, info in own.tensors.items():
        heads = [torch.empty(min(info.numel, _HEAD_ELEMENTS), dtype=info.dtype) for _ in range(2)]
        for weights, head in zip((own, other), heads, strict=True):
            weights.read_into(name, 0, head)
        if not torch.equal(*heads):
            return False
    return True
