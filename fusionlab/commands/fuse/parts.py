"""Ranges of blocks in a recipe, in the place of a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusionlab.errors import InputError, did_you_mean

Part = Mapping[str, Any]


def check_parts(what: str, parts: Sequence[Part]) -> None:
    """Raise unless ``parts`` is a list of ``{model: PATH, layers: [FIRST, END]}``.

    Raises:
        InputError: so, with the part that is not.
    """
    if not parts:
        raise InputError(f"{what}: expected a path, or a list of {{model: PATH, layers: [FIRST, END]}}, got none.")
    for part in parts:
        if unknown := [key for key in part if key not in ("model", "layers")]:
            raise InputError(
                f"{what}: unknown key {unknown[0]!r}; {did_you_mean(str(unknown[0]), ('model', 'layers'))}"
            )
        layers = part.get("layers")
        is_range = isinstance(layers, (list, tuple)) and len(layers) == 2 and all(type(each) is int for each in layers)
        if not isinstance(part.get("model"), str) or not is_range or not 0 <= layers[0] < layers[1]:
            raise InputError(f"{what}: expected {{model: PATH, layers: [FIRST, END]}} with FIRST < END, got {part!r}.")
