"""Where a model is: a local path, which needs no network, or the id of one on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fusionlab.errors import InputError, name_list
from fusionlab.files import nearest, path_of
from fusionlab.foreign import ModelConfig, WeightIndex, read_json
from fusionlab.layout import ADAPTER_CONFIG
from fusionlab.tensors.companions import NOT_FETCHED, has_custom_code, named_folders
from fusionlab.tensors.hub_refusals import hub_errors, hub_refusal, patiently
from fusionlab.tensors.stats import ADAPTER_FILES, ADAPTER_WEIGHTS
from fusionlab.tensors.weight_files import first_file, is_index, shard_names

_ID = re.compile(r"^(?:\w[\w.-]*/)?\w[\w.-]*(?:@[\w./-]+)?$")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".yaml")
ASSETS = Path(__file__).parents[1] / "assets"
_SCHEMES = ("timm:", "local-dir:", "hf-hub:")
_ROOT_FILES = ("config.json", "open_clip_config.json")
_CONFIGS = (*_ROOT_FILES, ADAPTER_CONFIG)  # in every request: the hub warns where nothing matches
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def resolve(name: str, variant: str | None = None, *, weights: bool = True) -> Path:
    """The local folder or file of ``name``; a hub id is downloaded.

    An id is ``owner/name`` or, for the hub's oldest models, ``name`` (``gpt2``); ``@revision`` may follow. A path that
    exists is always meant as a path. Of the hub's files, those are fetched that belong to the model: one
    kind of weights, as transformers chooses them, and what travels with them; Python files are never run.

    Args:
        name: any of these.
        variant: of the weight files.
        weights: whether they are wanted too; configurations, tokenizers and the card come in any case.

    Raises:
        InputError: neither an existing path nor a hub id, or it cannot be downloaded.
    """
    path = path_of(name)
    if path.exists():
        return path
    if not is_hub_id(name):
        more = "; an adapter is given by its own path, not as base+adapter" if "+" in name else ""
        raise InputError(f"{name!r} does not exist, and is no hub id (owner/name){more}.{nearest(path)}")
    try:
        return _download(name, variant) if weights else _files_beside_weights(name)
    except hub_errors() as error:
        if isinstance(error, InputError):
            raise
        what = "does not exist here, and" if "/" in name else "does not exist, and is no hub id that is known here: it"
        reason = hub_refusal(error) or " ".join(str(error).split())[:300]
        raise InputError(f"{name!r} {what} cannot be had from the hub: {reason}") from error


def _snapshot(name: str) -> Callable[..., str]:
    """What downloads files of a hub id, at its revision where it says one."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    download = partial(snapshot_download, repository, revision=revision or None)
    return lambda **patterns: patiently(partial(download, **patterns))


def _files_beside_weights(name: str) -> Path:
    return Path(_snapshot(name)(ignore_patterns=list(NOT_FETCHED)))


def _download(name: str, variant: str | None) -> Path:
    download = _snapshot(name)

    def fetch(*names: str) -> Path:
        return Path(download(allow_patterns=[*_CONFIGS, *names]))

    def has(file: str) -> bool:
        return (fetch(file) / file).is_file()

    folder = _files_beside_weights(name)
    if (folder / ADAPTER_CONFIG).is_file():
        fetch(*(file for file in ADAPTER_FILES if file not in ADAPTER_WEIGHTS))
        if not any(has(file) for file in ADAPTER_WEIGHTS):
            raise InputError(f"{name!r} on the hub holds none of {name_list(ADAPTER_WEIGHTS)}.")
        return folder
    config = folder / "config.json"
    first = first_file(read_json(config, ModelConfig) if config.is_file() else {}, has, variant, name)
    if first is not None and is_index(first):
        fetch(*shard_names(folder / first, read_json(folder / first, WeightIndex)))
    elif first is None and not any(list(fetch(pattern).glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise InputError(f"{name!r} on the hub holds neither safetensors nor .bin weights.")
    fetch(*(f"{inner}/*" for inner in named_folders(folder)), *(["*.py"] if has_custom_code(folder) else []))
    return folder


def open_clip_folder(name: str) -> Path:
    """The folder with open_clip's own files of the hub id ``name``, which are downloaded; ``@revision`` may follow.

    Raises:
        InputError: it cannot be downloaded, or has none.
    """
    try:
        folder = _files_beside_weights(name)
        for file in OPEN_CLIP_WEIGHTS:
            if (Path(_snapshot(name)(allow_patterns=[*_CONFIGS, file])) / file).is_file():
                return folder
    except hub_errors() as error:
        reason = hub_refusal(error) or " ".join(str(error).split())[:300]
        raise InputError(f"the open_clip model {name!r} cannot be had from the hub: {reason}") from error
    raise InputError(f"{name!r} on the hub holds none of {name_list(OPEN_CLIP_WEIGHTS)}; give an open_clip model.")


def embedded(name: str) -> Path | None:
    """The folder of the model of this name that comes with the package; None where there is none."""
    is_embedded = name in (folder.name for folder in ASSETS.iterdir() if (folder / "config.json").is_file())
    return ASSETS / name if is_embedded else None


def at_hand(name: str, revision: str | None = None) -> Path | None:
    """The folder or file that a model's ``name`` stands for as far as that needs no network; None where it does.

    Args:
        name: an embedded name, a path, or a hub id that is in the cache; with a scheme of open_clip or timm or without.
        revision: of a hub id that says none.
    """
    for scheme in _SCHEMES:
        name = name.removeprefix(scheme)
    try:
        path = embedded(name) or path_of(name)
    except InputError:  # no path at all: nothing is there
        return None
    if path.exists() or not is_hub_id(name):
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache

    repository, _, own_revision = name.partition("@")
    for file in _ROOT_FILES:
        found = try_to_load_from_cache(repository, file, revision=own_revision or revision or "main")
        if isinstance(found, str):
            return Path(found).parent
    return None


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as a hub id and is no existing path."""
    return bool(_ID.match(name)) and not name.endswith(_FILES) and not os.path.lexists(name)
