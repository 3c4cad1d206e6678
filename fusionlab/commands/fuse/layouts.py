"""How the base's files hold what an adapter changes: under which name, and whether transposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fusionlab.commands.fuse.opened import Opened
from fusionlab.errors import InputError
from fusionlab.tensors.parts import adapted_names


@dataclass(frozen=True)
class Placed:
    """An adapter in the base.

    Args:
        adapter: under the base's names in memory.
        names: name in memory -> name in the base's files, where it is another one.
        own: the adapter under the names that it was trained with.
        own_names: of those, to names in the base's files.
        layers: the base weights that it changes, by its own names.
    """

    adapter: Any
    names: Mapping[str, str]
    own: Any
    own_names: Mapping[str, str]
    layers: Mapping[str, Tensor]


def placed_in(task: str, base: Opened, adapter: Any, class_name: str) -> Placed:
    """The adapter as the base names and stores what it changes, also where it was made for a part of it.

    Args:
        task: its task.
        base: what it is for.
        adapter: as its files have it.
        class_name: of the model that it was made for; empty where it does not say it.

    Raises:
        InputError: it cannot be told how the base stores a layer.
    """
    from fusionlab.adapters import stored_shapes
    from fusionlab.adapters.same_base import layers_of

    changed = stored_shapes(adapter)
    new, disk = {name: name for name in changed}, {}
    if any(name not in base.shapes for name in changed):
        new = adapted_names(base.shapes, base.architecture, changed, class_name)
    if any(name not in base.shapes for name in new.values()):
        disk = names_on_disk(base)
        shapes = {name: base.shapes[disk.get(name, name)] for name in _in_memory(base, disk)}
        new = adapted_names(shapes, base.architecture, changed, class_name)
    modules = {
        module: new.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight") for module in adapter.factors
    }
    moved = adapter
    if any(module != place for module, place in modules.items()):
        factors = {place: adapter.factors[module] for module, place in modules.items()}
        config = {key: value for key, value in adapter.config.items() if key != "auto_mapping"}
        moved = replace(adapter, factors=factors, config=config)
    moved = laid_out(task, moved, base, disk)
    own = replace(adapter, factors={module: moved.factors[place] for module, place in modules.items()})
    own_names = {name: disk.get(place, place) for name, place in new.items()}
    return Placed(moved, disk, own, own_names, layers_of(base.weights, own, own_names))


def _in_memory(base: Opened, disk: Mapping[str, str]) -> list[str]:
    renamed = {on_disk: name for name, on_disk in disk.items()}
    return [renamed.get(name, name) for name in base.shapes]


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
