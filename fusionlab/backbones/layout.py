"""The names that weights have in memory and the ones they have on disk, in the base's own layout."""

from __future__ import annotations

from typing import Any

from fusionlab.adapters import base_state, split_names, split_state, stored_state
from fusionlab.errors import InputError, name_list
from fusionlab.state import State


def to_disk(model: Any, state: State) -> State:
    """``state`` under the names that ``model``'s own files have: fused attention joined, transformers' renaming undone.

    Raises:
        InputError: transformers stores a tensor of this model in another form, not only under another name.
    """
    names = names_on_disk(model)
    return {names.get(name, name): tensor for name, tensor in stored_state(state, split_names(model)).items()}


def from_disk(model: Any, stored: State) -> State:
    """The inverse of :func:`to_disk`; names that are those in memory already pass through."""
    names = {on_disk: name for name, on_disk in names_on_disk(model).items()}
    return split_state({names.get(name, name): tensor for name, tensor in stored.items()}, split_names(model))


def names_on_disk(model: Any) -> dict[str, str]:
    """The name on disk of each tensor of a transformers model that has another one in memory; empty for other models.

    Transformers 5 renames the weights of some architectures, ViT among them, when it loads them.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return {}
    own = base_state(model)
    of_tensor = {id(tensor): name for name, tensor in own.items()}
    stored = revert_weight_conversion(model, dict(own))
    changed = [name for name, tensor in stored.items() if id(tensor) not in of_tensor]
    if changed:
        raise InputError(
            f"transformers stores {name_list(changed)} of {type(model).__name__} in another form than it computes "
            f"with; such a model cannot be written in its own layout"
        )
    return {of_tensor[id(tensor)]: name for name, tensor in stored.items() if of_tensor[id(tensor)] != name}
