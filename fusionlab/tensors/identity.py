"""Which names are one tensor.

The architecture says which names may be one tensor (:meth:`fusionlab.tensors.architecture.Architecture.may_be_tied`),
and of these two are one as ``from_pretrained`` decides: one is missing, or their values are equal, in the base and in
every fine-tuned model. Equal values elsewhere mean nothing: an up-scaled base has equal layers that learn apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fusionlab.tensors.architecture import Tie
from fusionlab.tensors.lazy import TaskInput, Weights
from fusionlab.tensors.state import State

_PIECE = 1 << 22  # elements


@dataclass(frozen=True)
class Ties:
    """Which names are one tensor, in the base and in all inputs.

    Args:
        possible: name -> the name that it may be one tensor with, as the architecture has it.
        first: name -> the name that stands for it; only names that are tied and not first themselves.
        apart: name -> the name that it is one tensor with in the base, and not in all inputs.
    """

    possible: Mapping[str, str]
    first: Mapping[str, str]
    apart: Mapping[str, str]

    @classmethod
    def between(cls, declared: Mapping[str, Tie], base: Weights, inputs: Mapping[str, TaskInput]) -> Ties:
        """Decide by what the base and the inputs hold; the configuration is asked only where that leaves it open.

        A task vector ties nothing that it changes apart: an adapter acts where it sits, on one of the two names alone.
        One that full models were made into changes what is tied under one name.
        """
        sources = {name: tie.source for name, tie in declared.items()}
        models = (base, *(item.weights for item in inputs.values() if not item.is_task_vector))
        changes = tuple(item.weights for item in inputs.values() if item.is_task_vector and not item.of_models)
        possible, tied = {}, {}
        apart: dict[str, str] = {}
        for name, source in sources.items():
            one = all(_is_one(sources, weights, name, source) for weights in models)
            known_apart = not one and all({name, source} <= weights.tensors.keys() for weights in models)
            undone = known_apart and _is_one(sources, base, name, source)
            if (known_apart and not undone) or not declared[name].allowed():
                continue
            if undone:
                apart[name] = source
                continue
            possible[name] = source
            if one and all(_changes_as_one(weights, name, source) for weights in changes):
                tied[name] = source
            elif _is_one(sources, base, name, source):
                apart[name] = source
        first: dict[str, str] = {}
        for source in dict.fromkeys(tied.values()):
            group = (source, *(name for name, its in tied.items() if its == source))
            held = next((name for name in group if name in base.tensors), source)
            first |= {name: held for name in group if name != held}
        return cls(possible, first, apart)

    def held_as(self, name: str, weights: Weights) -> str | None:
        """The name under which a full model holds what ``from_pretrained`` gives ``name``; None where it does not."""
        return _held_as(self.possible, weights, name)

    def names(self, base: Weights, inputs: Mapping[str, TaskInput]) -> dict[str, str]:
        """The base's names, and those that it leaves to a tie which an input undoes -> where the base has them."""
        wanted = dict.fromkeys(name for item in inputs.values() for name in item.weights.tensors)
        wanted |= dict.fromkeys(name for pair in self.apart.items() for name in pair)
        missing = [name for name in wanted if name not in base.tensors and name not in self.first]
        apart = {name: held for name in missing if (held := self.held_as(name, base)) is not None}
        return {name: name for name in base.tensors} | apart


def sharing_memory(state: State) -> dict[str, Tie]:
    """Later name -> first name of tensors in memory that are one and the same, as those of a model in memory are."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(key, name) != name:
            found[name] = Tie(first[key], lambda: True)
    return found


def equal_matrices(weights: Weights) -> list[tuple[str, str]]:
    """Pairs of names, of matrices and larger tensors, that hold the same values; the first of each with every other."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, info in weights.tensors.items():
        if len(info.shape) > 1 and info.numel:
            head = torch.empty(min(1024, info.numel), dtype=info.dtype)
            weights.read_into(name, 0, head)
            alike.setdefault((info.shape, info.dtype, head.view(torch.uint8).numpy().tobytes()), []).append(name)
    return list(_equal_pairs(weights, alike.values()))


def _equal_pairs(weights: Weights, groups: Iterable[list[str]]) -> Iterator[tuple[str, str]]:
    for names in groups:
        firsts: list[str] = []
        for name in names:
            same = next((first for first in firsts if equal_values(weights, first, name)), None)
            if same is None:
                firsts.append(name)
            else:
                yield same, name


def equal_values(weights: Weights, first: str, second: str) -> bool:
    """Whether two tensors of one model have the same shape and values, in the wider of their dtypes."""
    infos = weights.tensors[first], weights.tensors[second]
    if infos[0].shape != infos[1].shape:
        return False
    dtype = torch.promote_types(infos[0].dtype, infos[1].dtype)
    for start in range(0, infos[0].numel, _PIECE):
        pieces = [torch.empty(min(_PIECE, infos[0].numel - start), dtype=dtype) for _ in range(2)]
        for name, piece in zip((first, second), pieces, strict=True):
            weights.read_into(name, start, piece)
        if not torch.equal(*pieces):
            return False
    return True


def _held_as(possible: Mapping[str, str], weights: Weights, name: str) -> str | None:
    """The name itself, what it may be tied to, or what may be tied to the same, in the architecture's order."""
    source = possible.get(name, name)
    candidates = (name, source, *(other for other, its in possible.items() if its == source))
    return next((each for each in candidates if each in weights.tensors), None)


def _is_one(possible: Mapping[str, str], weights: Weights, name: str, source: str) -> bool:
    """As ``from_pretrained`` decides: one of the two is missing, or they are equal."""
    held = _held_as(possible, weights, source)
    return name not in weights.tensors or held in (None, name) or equal_values(weights, str(held), name)


def _changes_as_one(weights: Weights, name: str, source: str) -> bool:
    both = {name, source} & set(weights.tensors)
    return not both or (len(both) == 2 and equal_values(weights, name, source))
