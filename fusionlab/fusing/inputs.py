"""Opening what a recipe names: the base, full checkpoints and adapters, checked against one another from headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionlab.checkpoints import Checkpoint, open_checkpoint
from fusionlab.checkpoints.fingerprints import file_records, fingerprint
from fusionlab.checkpoints.hub import is_hub_id, resolve
from fusionlab.checkpoints.readers import SafetensorsWeights
from fusionlab.checkpoints.stats import adapter_files
from fusionlab.checkpoints.weight_files import unread_weights
from fusionlab.errors import InputError, name_list
from fusionlab.files import is_there
from fusionlab.foreign import OwnRecord, PeftConfig, read_json
from fusionlab.fusing.vocabulary import Shapes, adapter_shapes, check_vocabulary, vocabulary_sizes
from fusionlab.streaming import StateWeights, TaskInput, TensorInfo, Weights
from fusionlab.tensors.architecture import Architecture

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


@dataclass(frozen=True)
class Opened:
    """One input of a recipe.

    Args:
        name: as the recipe says it.
        path: where it is.
        files: its weight files.
        weights: what the engine reads.
        config: its ``config.json`` or ``adapter_config.json``.
        unread: what looks like weights beside them and is not read, by relative path.
        adapter: the adapter, if it is one.
        names: name in memory -> name in the base's files, where an adapter's differ.
        with_content: know the files by all of their content.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    weights: Weights
    config: Mapping[str, Any]
    unread: tuple[str, ...] = ()
    adapter: Any = None
    names: Mapping[str, str] = field(default_factory=dict)
    with_content: bool = False

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What its files are known by, from before anything of them is used."""
        headers = self.weights.headers if isinstance(self.weights, SafetensorsWeights) else None
        return file_records(self.files, headers, content=self.with_content)

    @property
    def is_unchanged(self) -> bool:
        """Whether the files are still what :attr:`records` says, going by times, headers and ends of tensors."""
        before = [{key: value for key, value in record.items() if key != "sha256"} for record in self.records]
        return file_records(self.files) == before

    @property
    def fingerprint(self) -> str:
        """One hash over them."""
        return fingerprint(self.records)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: info.shape for name, info in self.weights.tensors.items()}

    @cached_property
    def architecture(self) -> Architecture:
        """What its ``config.json`` says that it is."""
        return Architecture(self.path if self.path.is_dir() else self.path.parent, self.config)

    @property
    def task_input(self) -> TaskInput:
        """What the engine takes."""
        return TaskInput(self.weights, is_task_vector=self.adapter is not None)


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
    return _full(name, path, open_checkpoint(path, variant))


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
        opened = _full(name, path, open_checkpoint(path, variant))
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
    names = _names_on_disk(base) if any(own not in base.weights.tensors for own in shapes) else {}
    adapter = _laid_out(task, adapter, base, names)
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


def _laid_out(task: str, adapter: Any, base: Opened, names: Mapping[str, str]) -> Any:
    """The adapter with the layout that each of its linear layers has in the base, which PEFT's one flag cannot say.

    Raises:
        InputError: a square weight of a layer that may be stored transposed, and no architecture that says so.
    """
    factors = dict(adapter.factors)
    for module, of_module in adapter.factors.items():
        info = base.weights.tensors.get(names.get(f"{module}.weight", f"{module}.weight"))
        if of_module.layout != "linear" or info is None or len(info.shape) != 2:
            continue
        is_transposed = base.architecture.is_transposed(module)
        if is_transposed is None:
            rows, columns = info.shape
            if rows == columns:
                raise InputError(
                    f"adapter {task!r}: whether {base.name!r} stores {module}.weight {tuple(info.shape)} transposed, "
                    "as GPT-2 does, is not known; give the base with the config.json that names its class."
                )
            is_transposed = info.shape == of_module.shape[::-1]
        if is_transposed:
            factors[module] = replace(of_module, layout="transposed")
    return replace(adapter, factors=factors)


def _names_on_disk(base: Opened) -> dict[str, str]:
    """Name in memory -> name in the files, for architectures whose weights transformers renames; empty for others."""
    import transformers

    from fusionlab.backbones.layout import names_on_disk

    model_class = getattr(transformers, (base.config.get("architectures") or [""])[0], None)
    if model_class is None or not base.path.is_dir():
        return {}
    with torch.device("meta"):
        model = model_class(transformers.AutoConfig.from_pretrained(base.path, local_files_only=True))
    return names_on_disk(model)


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


def _full(name: str, path: Path, checkpoint: Checkpoint) -> Opened:
    return Opened(name, path, checkpoint.files, checkpoint.weights, checkpoint.config, tuple(checkpoint.unread))


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
