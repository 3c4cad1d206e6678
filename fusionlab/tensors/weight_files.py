"""Which files of a folder are the model: transformers' order, and what looks like weights beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_file
from fusionlab.foreign import WeightIndex, read_json
from fusionlab.layout import ADAPTERS, FINETUNED, FUSED
from fusionlab.tensors.headers import Header, read_header

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
EXPLICIT = "transformers_weights"
_INDEX = ".index.json"
_LOOSE = (".safetensors", ".bin", ".pt", ".pth")  # read where there is but one of them
WEIGHT_SUFFIXES = (
    *_LOOSE, ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".npz",
    ".npy", ".ot", ".mlmodel", ".pb", ".pkl", ".pickle", ".nemo", ".engine", ".plan", ".llamafile", ".litertlm", ".pte",
    ".distcp",
)  # fmt: skip
_SUFFIX = "|".join(re.escape(suffix) for suffix in WEIGHT_SUFFIXES)
# and what belongs to them: x.onnx.data, x.ckpt.data-00000-of-00002, x.safetensors.index.fp16.json, x.gguf.part1
_LIKE_WEIGHTS = re.compile(rf"(?:{_SUFFIX})(?:[.-](?:data|index|meta|part|split)[\w.-]*|_\d+)?$", re.IGNORECASE)
_OF_TRAINING = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)[\w-]*\.")
_SHARD = re.compile(r"-\d+-of-\d+\.")
_VARIANT = re.compile(
    r"^(?:model|pytorch_model)(?:\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    r"|-\d+-of-\d+\.([\w-]+)\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index\.([\w-]+)\.json)$"
)


def weight_files(
    folder: Path, config: Mapping[str, Any], variant: str | None = None
) -> tuple[tuple[Path, ...], Path | None]:
    """The files that hold the model in ``folder``, as ``from_pretrained`` chooses them, and the index of shards.

    Args:
        folder: a model's folder.
        config: its ``config.json``.
        variant: take the files of this variant (``model.fp16.safetensors``) and no others.

    Returns:
        the file that ``transformers_weights`` of the configuration names, else ``model.safetensors``, the shards of
        its index, ``pytorch_model.bin``, the shards of its index: the first that is there. Where none is, the only
        weight file that has another name.

    Raises:
        InputError: no weights, or not of that variant; several files of other names; a shard that is missing, an index
            that points outside the folder or does not fit its shards.
    """
    first = first_file(config, lambda name: is_file(folder / name), variant, str(folder))
    if first is None:
        return (_loose_file(folder, variant),), None
    return indexed(folder, first) if is_index(first) else ((folder / first,), None)


def first_file(config: Mapping[str, Any], has: Callable[[str], bool], variant: str | None, where: str) -> str | None:
    """The weight file or index that transformers takes from ``where``; None if there is none of its names.

    Args:
        config: the model's ``config.json``.
        has: whether there is a file of this name.
        variant: of the file names.
        where: for the message.

    Raises:
        InputError: what ``transformers_weights`` names is no safetensors file or index inside the folder, or is not
            there; or a variant is asked for beside it.
    """
    explicit = config.get(EXPLICIT)
    if explicit is None:
        names = (SAFETENSORS, SAFETENSORS + _INDEX, PICKLED, PICKLED + _INDEX)
        return next((name for each in names if has(name := _of_variant(each, variant))), None)
    if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".safetensors" + _INDEX)):
        raise InputError(
            f"{EXPLICIT} in config.json of {where!r}: expected a .safetensors file or its {_INDEX}, got {explicit!r}."
        )
    if is_outside(explicit):
        raise InputError(f"{EXPLICIT} in config.json of {where!r} points outside its folder: {explicit}.")
    if variant is not None:
        raise InputError(
            f"variant {variant!r}: config.json of {where!r} names {explicit} as the weights, whatever the variant; "
            "give the weight file itself, or drop --variant."
        )
    if not has(explicit):
        raise InputError(f"config.json of {where!r} names {explicit} as the weights, and it is not there.")
    return explicit


def is_index(name: str) -> bool:
    """Whether a weight file's name is that of an index of shards."""
    return name.endswith(".json")


def shard_names(index: Path, content: Mapping[str, Any]) -> list[str]:
    """The files that an index names, relative to the model's folder.

    Raises:
        InputError: it has no map, or it points outside the folder.
    """
    weight_map = content.get("weight_map")
    if weight_map is None:
        raise InputError(f"{str(index)!r} has no weight_map of names to files.")
    names = list(dict.fromkeys(weight_map.values()))
    if outside := [name for name in names if is_outside(name)]:
        raise InputError(f"{str(index)!r} points outside its folder: {name_list(outside)}.")
    if not names:
        raise InputError(f"{str(index)!r} has an empty weight_map; download the model again.")
    return names


def indexed(folder: Path, name: str) -> tuple[tuple[Path, ...], Path]:
    """The shards of the index ``name`` in a model's folder, checked against it, and the index.

    Raises:
        InputError: a shard is missing, the index points outside its folder, or does not fit its shards.
    """
    index = folder / name
    content = read_json(index, WeightIndex)
    names = shard_names(index, content)
    if missing := [each for each in names if not is_file(folder / each)]:
        raise InputError(f"missing shard of {str(folder)!r}: {name_list(missing)}; download the model again.")
    if names[0].endswith(".safetensors"):
        _check_index(index, content["weight_map"], {each: read_header(folder / each) for each in names})
    return tuple(folder / each for each in names), index


def looks_like_weights(name: str) -> bool:
    """Whether a file's name is that of weights in any format, or of an index of them; states of training are not.

    Example:
        >>> names = ["model.fp16.safetensors", "tf_model.h5", "model.onnx.data", "optimizer.pt", "spiece.model"]
        >>> [looks_like_weights(name) for name in names]
        [True, True, True, False, False]
    """
    return bool(_LIKE_WEIGHTS.search(name)) and not _OF_TRAINING.match(name)


def unread_weights(folder: Path, read: Collection[Path]) -> list[str]:
    """What looks like weights in ``folder`` and below and is not among ``read``, by relative path, sorted."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent) / name for name in files if looks_like_weights(name))
        found += [path.relative_to(folder).as_posix() for path in paths if path not in read]
    return sorted(found)


def _of_variant(name: str, variant: str | None) -> str:
    """The name with the variant before its last part, as transformers writes it."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def is_outside(name: str) -> bool:
    """Whether a relative name leads out of its folder, or is the folder itself."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] in ("", ".", "..")


def _loose_file(folder: Path, variant: str | None) -> Path:
    """The only weight file of ``folder``, which has a name of its own.

    Raises:
        InputError: none, several, or files that only an index or a variant makes into a model.
    """
    with accessed(folder):
        files = sorted(path for path in folder.iterdir() if is_file(path))
    variants = sorted({match for path in files if (match := _variant_of(path.name))})
    if variant is not None:
        raise InputError(
            f"{str(folder)!r} has no weights of variant {variant!r}; its variants: {name_list(variants) or 'none'}."
        )
    loose = [
        path
        for path in files
        if path.suffix in _LOOSE and looks_like_weights(path.name) and not path.name.startswith("adapter_")
    ]
    whole = [path for path in loose if not _variant_of(path.name) and not _SHARD.search(path.name)]
    for suffix in _LOOSE:
        found = [path for path in whole if path.suffix == suffix]
        if len(found) > 1:
            names = name_list(path.name for path in found)
            raise InputError(f"{str(folder)!r} has no index and several weight files: {names}; give one of them.")
        if found:
            return found[0]
    if variants:
        raise InputError(
            f"{str(folder)!r} has weights only as variants: {name_list(variants)}; choose one with --variant."
        )
    if loose:
        names = name_list(path.name for path in loose)
        raise InputError(f"{str(folder)!r} has shards without their index: {names}; download the model again.")
    inside = sorted(item.name for item in folder.iterdir())
    of_run = [f"{name}/NAME" for name in (ADAPTERS, FINETUNED, FUSED) if name in inside]
    which = f" It is the folder of a run: give {' or '.join(of_run)} in it." if of_run else ""
    raise InputError(
        f"{str(folder)!r} has no weights: expected {SAFETENSORS} or {PICKLED}, or their index; "
        f"it holds {name_list(inside) or 'nothing'}.{which}"
    )


def _variant_of(name: str) -> str | None:
    match = _VARIANT.match(name)
    return next(filter(None, match.groups()), None) if match else None


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    stored = {name: file for file, header in headers.items() for name in header.tensors}
    wrong = [name for name in {**weight_map, **stored} if weight_map.get(name) != stored.get(name)]
    twice = sum(len(header.tensors) for header in headers.values()) - len(stored)
    if wrong or twice:
        raise InputError(
            f"{str(index)!r} does not fit its shards: {name_list(wrong) or f'{twice} names stored twice'}; "
            "download the model again."
        )
