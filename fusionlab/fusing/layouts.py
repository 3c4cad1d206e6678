"""How the base's files hold what an adapter changes: under which name, and whether transposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusionlab.errors import InputError
from fusionlab.fusing.opened import Opened


def laid_out(task: str, adapter: Any, base: Opened, names: Mapping[str, str]) -> Any:
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


def names_on_disk(base: Opened) -> dict[str, str]:
    """Name in memory -> name in the files, for architectures whose weights transformers renames; empty for others.

    Raises:
        InputError: transformers refuses the base's configuration.
    """
    from fusionlab.backbones.layout import names_on_disk as of_model

    model = base.architecture.model
    return {} if model is None else of_model(model)
