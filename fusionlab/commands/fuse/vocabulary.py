"""Vocabularies that differ between the base and its inputs: refused with both numbers, or said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_there
from fusionlab.foreign import TokenizerFile, read_json
from fusionlab.layout import ADAPTER_MODEL, ADAPTER_PICKLED
from fusionlab.tensors.readers import load_pickle

_TOKENIZER = "tokenizer.json"
_ADAPTERS = (ADAPTER_MODEL, ADAPTER_PICKLED)
_PREFIX = "base_model.model."
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save|original_module)\.")  # PEFT's own names around a layer's
Shapes = Mapping[str, tuple[int, ...]]


def check_vocabulary(
    what: str, folder: Path, shapes: Shapes, base: Shapes, base_folder: Path, sizes: set[int], advice: str
) -> None:
    """Raise if tensors with a row a token have other numbers of rows than the base's.

    Args:
        what: how to call the input.
        folder: the input's folder, whose tokenizer may say why.
        shapes: of the input's weights, or those that an adapter changes, by their names in the base.
        base: of the base's weights.
        base_folder: the base's folder.
        sizes: numbers of tokens, as the base's ``config.json`` says them.
        advice: what to do.

    Raises:
        InputError: so, with both numbers, the tokens that one tokenizer knows more, and what to do.
    """
    other = {
        name: shape
        for name, shape in shapes.items()
        if name in base and base[name][:1] != shape[:1] and base[name][1:] == shape[1:] and set(base[name][:1]) & sizes
    }
    if other:
        name, shape = next(iter(other.items()))
        raise InputError(
            f"{what} has a vocabulary of {shape[0]} rows, the base one of {base[name][0]}: {name_list(other)}"
            f"{_difference(folder, base_folder)}. {advice}"
        )


def adapter_shapes(folder: Path, base: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of what an adapter changes or holds beside its factors, by the names of the base, from its file's header.

    A factor with a row a token tells the shape that the base had in training. Empty for a file that cannot be read,
    which loading the adapter tells.
    """
    found: dict[str, tuple[int, ...]] = {}
    for stored, shape in _stored_shapes(folder).items():
        module, _, part = stored.removeprefix(_PREFIX).partition(".lora_")
        name = f"{module}.weight" if part else _WRAPPED.sub(".", module)
        if part.startswith("embedding_A") and len(shape) == 2:
            found[name] = (shape[1], *base.get(name, ())[1:])
        elif part.startswith("B.") or not part:
            found.setdefault(name, (*shape[:1], *(base.get(name, ()) if part else shape)[1:]))
    return found


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    file, pickled = (folder / name for name in _ADAPTERS)
    if file.is_file():
        try:
            with accessed(file), safe_open(file, "pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError:
            return {}
    return {name: tuple(tensor.shape) for name, tensor in load_pickle(pickled).items()} if is_there(pickled) else {}


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """Every ``vocab_size`` of a model's ``config.json``, those of its towers included."""
    inner = (vocabulary_sizes(value) for value in config.values() if isinstance(value, Mapping))
    own = config.get("vocab_size")
    return ({own} if isinstance(own, int) else set()).union(*inner)


def new_tokens(folder: Path, base_folder: Path) -> list[str] | None:
    """The tokens that a folder's tokenizer knows and the base's does not; None where one has no ``tokenizer.json``.

    Files of equal bytes are not parsed.
    """
    paths = [each / _TOKENIZER for each in (folder, base_folder)]
    if not all(is_there(path) for path in paths):
        return None
    if paths[0].read_bytes() == paths[1].read_bytes():
        return []
    theirs, ours = (dict.fromkeys(_tokens(path)) for path in paths)
    return [token for token in theirs if token not in ours]


def _tokens(path: Path) -> Iterator[str]:
    content = read_json(path, TokenizerFile)
    vocabulary = (content.get("model") or {}).get("vocab") or ()
    yield from (str(entry[0]) if isinstance(entry, list) and entry else str(entry) for entry in vocabulary)
    yield from (str(token.get("content")) for token in content.get("added_tokens") or ())


def _difference(folder: Path, base_folder: Path) -> str:
    more = new_tokens(folder, base_folder)
    if more is None:
        return ""
    if more:
        return f"; its tokenizer knows {len(more)} tokens that the base's does not: {name_list(more)}"
    return "; the base's tokenizer knows all its tokens, so that only the padding differs"
