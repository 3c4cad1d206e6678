"""Backbones by name: the embedded ones, local folders and hub ids in transformers', open_clip's or timm's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from fusionlab.backbones.causal import CausalBackbone
from fusionlab.backbones.clip import ClipBackbone
from fusionlab.backbones.gguf import GGUF
from fusionlab.backbones.open_clip import OpenClipBackbone, is_open_clip
from fusionlab.backbones.t5 import T5Backbone
from fusionlab.backbones.vit import FROM_CONFIG, TIMM, TimmBackbone, ViTBackbone
from fusionlab.contracts import Backbone
from fusionlab.errors import InputError, did_you_mean
from fusionlab.files import is_there, path_of
from fusionlab.foreign import ModelConfig, read_json
from fusionlab.tensors.hub import ASSETS, at_hand, embedded, is_hub_id, resolve

KnownBackbone: TypeAlias = CausalBackbone | ClipBackbone | T5Backbone | ViTBackbone | TimmBackbone

__all__ = [
    "ASSETS",
    "CausalBackbone",
    "ClipBackbone",
    "KnownBackbone",
    "OpenClipBackbone",
    "T5Backbone",
    "TimmBackbone",
    "ViTBackbone",
    "load_backbone",
    "own_folder",
    "resolve_model",
]


def resolve_model(name: str) -> str:
    """The folder that ``name`` stands for; embedded models by their bare name, and what is on the hub without weights.

    Raises:
        InputError: a path that is not there, a folder without ``config.json``, or an id that the hub does not give.
    """
    if (ASSETS / name / "config.json").is_file():
        return str(ASSETS / name)
    path = path_of(name)
    if path.is_dir():
        if not is_there(path / "config.json"):
            raise InputError(f"the model folder {name!r} has no config.json; give a folder saved by save_pretrained")
        return str(path)
    if not is_hub_id(name):
        raise InputError(
            f"no model folder {name!r} and it is not a hub id like 'owner/name'; "
            f"{did_you_mean(name, _embedded())} Give an embedded name, a local folder or a hub id."
        )
    try:
        return str(resolve(name, weights=False))
    except InputError as error:
        hint = f" {did_you_mean(name, _embedded())}" if "/" not in name else ""
        raise InputError(f"the model {error}{hint}") from error


@runtime_checkable
class Loaded(Protocol):
    """A backbone that says what it was loaded from."""

    loaded_from: str | None


def own_folder(backbone: Backbone) -> Path | None:
    """The local folder that the backbone was loaded from, the hub's cache included; what it is called says nothing.

    None where there is none: for networks of one's own, tags, lone files, a configuration, and hub ids that are not in
    the cache.
    """
    source = backbone.loaded_from if isinstance(backbone, Loaded) else None
    path = None if source is None or source.startswith(FROM_CONFIG) else at_hand(source)
    return path if path is not None and path.is_dir() else None


def load_backbone(name: str | Path, dtype: str = "float32", *, causal: bool = True) -> KnownBackbone:
    """The frozen backbone that ``name`` stands for.

    Args:
        name: an embedded name (``tiny-clip``), a local folder or a hub id in transformers' format, or open_clip's
            ``ARCHITECTURE:TAG``, ``ARCHITECTURE:FILE``, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``; for a ViT also
            ``timm:ARCHITECTURE``, ``timm:FOLDER``, or ``config:FILE``, random weights by a configuration; for a
            language model also a GGUF file. After a hub id may follow ``@revision``.
        dtype: dtype of the frozen weights; ``bfloat16`` for T5 and causal language models only.
        causal: whether it may be a causal language model; one that may not be is refused before it is read.

    Raises:
        InputError: nothing there, no network for a hub id, or an architecture this package has no module for.
    """
    loaded = _load(str(name), dtype, causal)
    loaded.loaded_from = str(name)
    return loaded


def _load(name: str, dtype: str, causal: bool) -> KnownBackbone:
    for prefix, load in ((TIMM, TimmBackbone.load), (FROM_CONFIG, ViTBackbone.from_config)):
        if name.startswith(prefix):
            _only_float32(name, dtype)
            return load(name.removeprefix(prefix), name=name)
    if is_open_clip(name):
        _only_float32(name, dtype)
        return OpenClipBackbone.load(name, name=name)
    if name.endswith(GGUF):
        if not Path(name).expanduser().is_file():
            raise InputError(f"no GGUF file {name!r}; give the path of one")
        return CausalBackbone.load(str(Path(name).expanduser()), name=name, dtype=dtype)
    source = resolve_model(name)
    load = _loader(name, source, causal)
    if load in (ClipBackbone.load, ViTBackbone.load):
        _only_float32(name, dtype)
        return load(str(_with_weights(name, source)), name=name)
    return load(str(_with_weights(name, source)), name=name, dtype=dtype)


def _with_weights(name: str, source: str) -> Path:
    """The folder once its weights are there: those of a hub id come after it is known to be of use."""
    return resolve(name) if is_hub_id(name) and embedded(name) is None else Path(source)


def _loader(name: str, source: str, causal: bool) -> Callable[..., KnownBackbone]:
    """What loads the model in a folder.

    Raises:
        InputError: an architecture that this package has no module for.
    """
    model_type = str(read_json(Path(source) / "config.json", ModelConfig).get("model_type") or "unknown")
    known: dict[str, Callable[..., KnownBackbone]] = {
        "clip": ClipBackbone.load, "vit": ViTBackbone.load, "t5": T5Backbone.load
    }  # fmt: skip
    if model_type in known:
        return known[model_type]
    if causal and _is_causal(model_type):
        return CausalBackbone.load
    also = " or a causal language model" if causal else ""
    raise InputError(
        f"the model {name!r} is of type {model_type!r}; expected 'clip' (image and text towers), 'vit' (an image "
        f"tower) or 't5' (an encoder-decoder){also}"
    )


def _is_causal(model_type: str) -> bool:
    """Whether transformers has a causal language model of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _only_float32(name: str, dtype: str) -> None:
    if dtype != "float32":
        raise InputError(f"the model {name!r} runs in float32, got dtype {dtype!r}; use trainer.precision")


def _embedded() -> list[str]:
    return [folder.name for folder in ASSETS.iterdir() if (folder / "config.json").is_file()]
