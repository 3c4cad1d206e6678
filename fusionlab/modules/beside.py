"""Weights wider than what a network computes with: their update acts beside the base and is not rounded off.

θ₀ + τ in bfloat16 loses the entries of τ below half a step of θ₀: most of them, where ‖τ‖ is a few thousandths of ‖θ₀‖.
What is linear in a weight is therefore computed as f(x, θ₀) + f(x, τ), the second term in float32, as adapters are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fusionlab.linearize import wide

# the names, in order, of what a layer's function takes first
_LAYERS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), ("input", "weight", "bias")),
    torch.addmm: ("bias", "input", "weight"),
}
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_AS_IT_IS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}  # the caller says the result's dtype
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]


class BesideBase(TorchFunctionMode):
    """Within it, what meets a value that stands for a base's tensor is computed without rounding the update off.

    Layers and products are split. Where the base's own dtype is narrower, all else is computed in float32 and rounded
    to the dtype that it would have had, and the value's dtype reads as the base's.

    Args:
        bases: the base's tensors.
        values: what is in the place of each.
    """

    def __init__(self, bases: Iterable[Tensor], values: Iterable[Tensor]) -> None:
        super().__init__()
        self._pairs = {id(value): (base.detach(), value) for base, value in zip(bases, values, strict=True)}
        self._updates: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        met = [each for each in _flat(args, kwargs) if id(each) in self._pairs]
        if not met:
            return func(*args, **kwargs)
        if func == _DTYPE:
            return self._base(args[0]).dtype
        if func in _LAYERS or (func in _PRODUCTS and len(met) == 1):
            return self._split(func, met, args, kwargs)
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.startswith("__")
        if name in _AS_IT_IS or in_place or all(each.dtype == self._base(each).dtype for each in met):
            return func(*args, **kwargs)
        return self._widened(func, args, kwargs)

    def _split(self, func: Any, met: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """f(x, θ₀) + f(x, τ), in the dtype of the first."""
        base_args, base_kwargs = tree_map(self._base, (args, kwargs))
        base = func(*base_args, **base_kwargs)
        terms = {id(each): self._update(each) for each in met}
        if func in _LAYERS:
            given = dict(zip(_LAYERS[func], args, strict=False)) | kwargs
            weight, bias = given["weight"], given.get("bias")
            if id(weight) not in terms:  # the bias alone moves
                terms[id(weight)] = torch.zeros_like(weight, dtype=torch.float32)
            if bias is not None and id(bias) not in terms:
                terms[id(bias)] = torch.zeros_like(bias, dtype=torch.float32)
        with torch.autocast(base.device.type, enabled=False):
            term_args, term_kwargs = tree_map(lambda each: terms.get(id(each), _wide(each)), (args, kwargs))
            return (base + func(*term_args, **term_kwargs)).to(base.dtype)

    def _widened(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func`` gives in float32, rounded to what it would have given."""
        tensors = [self._base(each) for each in _flat(args, kwargs) if _is_float(each)]
        dtype = reduce(torch.promote_types, (each.dtype for each in tensors))
        with torch.autocast(tensors[0].device.type, enabled=False):
            wide_args, wide_kwargs = tree_map(_wide, (args, kwargs))
            result = func(*wide_args, **wide_kwargs)
        return tree_map(lambda each: each.to(dtype) if _is_float(each) else each, result)

    def _base(self, each: Any) -> Any:
        """The base's tensor that a value stands for; anything else as it is."""
        return self._pairs[id(each)][0] if id(each) in self._pairs else each

    def _update(self, value: Tensor) -> Tensor:
        if id(value) not in self._updates:
            self._updates[id(value)] = wide(value) - wide(self._base(value))
        return self._updates[id(value)]


def beside_base(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> BesideBase:
    """The mode for those ``values`` that are others than a network's own tensors of the same names."""
    moved = [name for name, value in values.items() if not torch.equal(_wide(value), _wide(own[name].detach()))]
    return BesideBase([own[name] for name in moved], [values[name] for name in moved])


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments, with the members of lists in their place."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, list | tuple):
            yield from each
        else:
            yield each


def _is_float(each: Any) -> bool:
    return isinstance(each, Tensor) and each.is_floating_point()


def _wide(each: Any) -> Any:
    return wide(each) if _is_float(each) else each
