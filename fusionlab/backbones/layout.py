"""The names that weights have in memory and the ones they have on disk, in the base's own layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fusionlab.adapters import base_state, split_names, split_state, stored_state, tied_names
from fusionlab.errors import InputError, name_list
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class Layout:
    """How a base's files call what it has in memory.

    Args:
        names: name in memory -> name on disk, where it is another one.
        attentions: names of the attentions whose q, k and v the files hold as one matrix, and memory apart.
        other_forms: names on disk of what is in memory in another form; what it is made of keeps its own names here.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()
    other_forms: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any) -> Layout:
        """The layout of a base model, with or without adapters in it."""
        names, others = _conversion(model)
        return cls(names, split_names(model), others)

    def to_disk(self, state: State) -> dict[str, Any]:
        """``state`` under the names on disk: fused attention joined, transformers' renaming undone."""
        return self.renamed(stored_state(state, self.attentions))

    def from_disk(self, stored: State) -> dict[str, Any]:
        """The inverse of :meth:`to_disk`; names that are those in memory already pass through."""
        return split_state({self._in_memory.get(name, name): value for name, value in stored.items()}, self.attentions)

    def renamed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` under the names on disk, with q, k and v of fused attention left apart."""
        return {self.names.get(name, name): value for name, value in state.items()}

    def in_memory(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`renamed`."""
        return {self._in_memory.get(name, name): value for name, value in state.items()}

    @cached_property
    def _in_memory(self) -> dict[str, str]:
        return {on_disk: name for name, on_disk in self.names.items()}


def to_disk(model: Any, state: State) -> State:
    """``state`` under the names that ``model``'s own files have, to write all of it; see :meth:`Layout.to_disk`.

    Raises:
        InputError: transformers stores a tensor of this model in another form, not only under another name.
    """
    layout = Layout.of(model)
    if layout.other_forms:
        raise InputError(
            f"transformers stores {name_list(layout.other_forms)} of {type(model).__name__} in another form than it "
            f"computes with; such a model cannot be written in its own layout"
        )
    return layout.to_disk(state)


def from_disk(model: Any, stored: State) -> State:
    """The inverse of :func:`to_disk`; names that are those in memory already pass through."""
    return Layout.of(model).from_disk(stored)


def first_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Of names on disk each with that by which :func:`to_disk` has the tensor, where it bears several."""
    layout, tied = Layout.of(model), tied_names(model)
    own = {name: layout.in_memory({name: ""}) for name in names}
    firsts = {name: tied.get(each, each) for name, found in own.items() for each in found}
    return {name: layout.names.get(first, first) for name, first in firsts.items()}


def names_on_disk(model: Any) -> dict[str, str]:
    """The name on disk of each tensor of ``model`` that has another one in memory."""
    return dict(Layout.of(model).names)


def _conversion(model: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names in memory and on disk of what transformers 5 renames, and names on disk of what it stores otherwise.

    It renames the weights of some architectures, ViT among them, when it loads them, and joins those of experts.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return {}, ()
    own = base_state(model)
    of_tensor = {id(tensor): name for name, tensor in own.items()}
    stored = revert_weight_conversion(model, dict(own))
    on_disk = {of_tensor[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in of_tensor}
    others = tuple(name for name, tensor in stored.items() if id(tensor) not in of_tensor)
    return {name: stored_as for name, stored_as in on_disk.items() if name != stored_as}, others
