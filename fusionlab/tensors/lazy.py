"""Tensors by name that need not be in memory: read piece by piece, by several threads, from files or from memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in the stored dtype."""
        return self.numel * self.dtype.itemsize


class Weights(Protocol):
    """Tensors by name that are read piece by piece, from a file or from memory, by several threads at once."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What there is, in order."""
        ...

    @property
    def device(self) -> torch.device:
        """Where blocks are worked on."""
        ...

    @property
    def held_bytes(self) -> int:
        """What reading keeps in memory beside the caller's buffers."""
        ...

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the flat index ``start`` on, converted to its dtype."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor as it is stored."""
        ...


@dataclass(frozen=True)
class TaskInput:
    """One task's input.

    Args:
        weights: a fine-tuned model, or a task vector.
        is_task_vector: absent names mean zero.
        is_part: a fine-tuned model of a part of the base, or of more than it: absent names are the base's own, and
            what the base does not have is not used.
        of_models: a task vector that full models were made into: of tied names it has one for all, as they have.
    """

    weights: Weights
    is_task_vector: bool = False
    is_part: bool = False
    of_models: bool = False


class StateWeights:
    """A state as the engine reads it.

    Args:
        state: a plain dict, or a mapping that computes its tensors, such as an adapter's task vector: those are kept
            for as long as they take no more than ``cache_bytes``, the latest one always.
        shapes: where to take shapes from for a mapping that computes its tensors; they are checked when computed.
        cache_bytes: see ``state``.
    """

    def __init__(
        self, state: State, shapes: Mapping[str, TensorInfo] | None = None, cache_bytes: int = 1 << 28
    ) -> None:
        self._state = state
        self._is_lazy = not isinstance(state, dict)
        known = shapes if shapes is not None and self._is_lazy else {}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(known[name].shape, torch.float32) if name in known else _info(state[name])
            for name in state
        }
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return next(iter(self._state.values())).device if self._state and not self._is_lazy else torch.device("cpu")

    @property
    def held_bytes(self) -> int:
        """Computed tensors: as many as the cache takes, one at least."""
        sizes = [4 * info.numel for info in self.tensors.values()] if self._is_lazy else []
        return max(min(sum(sizes), self._cache_bytes), max(sizes, default=0))

    def read(self, name: str) -> Tensor:
        """The tensor itself, computed if need be."""
        if not self._is_lazy:
            return self._state[name]
        with self._lock:
            if name not in self._cache:
                self._cache[name] = self._compute(name)
                while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > self._cache_bytes:
                    self._cache.popitem(last=False)
            return self._cache[name]

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Copy elements from the flat index ``start`` on into ``out``, converted to its dtype."""
        out.copy_(self.read(name).reshape(-1)[start : start + out.numel()])

    def _compute(self, name: str) -> Tensor:
        tensor = self._state[name]
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise InputError(f"{name}: expected shape {self.tensors[name].shape}, got {tuple(tensor.shape)}.")
        return tensor


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


class CastWeights:
    """Weights whose floating-point values are rounded to ``dtype`` before they are used.

    Args:
        weights: what is read.
        dtype: the narrower dtype.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype
        self.tensors = {
            name: TensorInfo(info.shape, dtype) if info.dtype.is_floating_point else info
            for name, info in weights.tensors.items()
        }
        self.device, self.held_bytes = weights.device, weights.held_bytes

    def read(self, name: str) -> Tensor:
        """The whole tensor, rounded."""
        return self._weights.read(name).to(self.tensors[name].dtype)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` with rounded values from the flat index ``start`` on."""
        if out.dtype == self.tensors[name].dtype:
            self._weights.read_into(name, start, out)
            return
        rounded = torch.empty_like(out, dtype=self.tensors[name].dtype)
        self._weights.read_into(name, start, rounded)
        out.copy_(rounded)


class NamedWeights:
    """Weights under other names.

    Args:
        weights: what is read.
        names: name -> the name there; one tensor may have several.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self.weights, self.names = weights, dict(names)
        self.tensors = {name: weights.tensors[own] for name, own in names.items()}
        self.device, self.held_bytes = weights.device, weights.held_bytes

    def read(self, name: str) -> Tensor:
        """The whole tensor as it is stored."""
        return self.weights.read(self.names[name])

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the flat index ``start`` on, converted to its dtype."""
        self.weights.read_into(self.names[name], start, out)


class JoinedWeights:
    """Tensors of several weights as one.

    Args:
        sources: name -> the weights that it is read from, and its name there.
    """

    def __init__(self, sources: Mapping[str, tuple[Weights, str]]) -> None:
        self.sources = dict(sources)
        self.tensors = {name: weights.tensors[own] for name, (weights, own) in sources.items()}
        parts = {id(weights): weights for weights, _ in sources.values()}
        self.device = next(iter(parts.values())).device
        self.held_bytes = sum(weights.held_bytes for weights in parts.values())

    def read(self, name: str) -> Tensor:
        """The whole tensor as it is stored."""
        weights, own = self.sources[name]
        return weights.read(own)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat ``out`` from the flat index ``start`` on, converted to its dtype."""
        weights, own = self.sources[name]
        weights.read_into(own, start, out)
