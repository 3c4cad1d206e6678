"""States: tensors by parameter name, and the checks that keep them from being combined wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fusionlab.errors import InputError, name_list

State = Mapping[str, Tensor]
_Value = TypeVar("_Value")


class Computed(Mapping[str, _Value]):
    """Values by name, each computed whenever it is asked for.

    Args:
        names: name -> what it is computed from, in order.
        compute: gives the value.

    Example:
        >>> Computed({"a.weight": "a"}, str.upper)["a.weight"]
        'A'
    """

    def __init__(self, names: Mapping[str, str], compute: Callable[[str], _Value]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: str) -> _Value:
        return self._compute(self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names: a tied tensor has several, as has a part that is used twice.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> list(named_tensors(nn.ModuleDict({"a": layer, "b": layer})))
        ['a.weight', 'b.weight']
    """
    return {
        name: tensor
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }


def check_same_names(expected: State, got: State, *, what: str) -> None:
    """Raise unless both states have the same names and shapes.

    Args:
        expected: the state that sets the names and shapes, usually the base.
        got: the state to check.
        what: how to call ``got`` in the message, e.g. ``"finetuned 'mnist'"``.

    Raises:
        InputError: names are missing or unexpected, or shapes differ; the message lists them.
    """
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    shapes = [
        f"{name} {tuple(got[name].shape)} (expected {tuple(expected[name].shape)})"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    problems = [
        f"{label}: {name_list(names)}"
        for label, names in (("missing", missing), ("unexpected", extra), ("other shapes", shapes))
        if names
    ]
    if problems:
        raise InputError(f"{what} does not fit the base: {'; '.join(problems)}. Use models made from the same base.")


def task_vector(base: State, finetuned: State) -> dict[str, Tensor]:
    """τ = finetuned − base, by name, in float32 (float64 where both are float64).

    Raises:
        InputError: names or shapes differ.

    Example:
        >>> task_vector({"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])})
        {'w': tensor([0.5000])}
    """
    check_same_names(base, finetuned, what="the fine-tuned state")
    return {name: _wide(finetuned[name]) - _wide(base[name]) for name in base}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
