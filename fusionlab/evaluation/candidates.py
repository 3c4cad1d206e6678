"""Many models scored in one pass over the data: decoded once, heads built once, and the frozen work shared.

An adapter acts by hooks that compute what PEFT's layer computes, so switching costs a dictionary; what lies before the
first changed layer is computed once a batch for all candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionlab.adapters import Adapter, base_tensors
from fusionlab.adapters.routed import FusedWeights, RoutedWeights
from fusionlab.adapters.weights import is_linearized
from fusionlab.contracts import Data, Module, Row
from fusionlab.evaluation.loop import Acting
from fusionlab.evaluation.scores import Scored, score
from fusionlab.linearize import LinearizedState

KEPT_AFTER_CHANGE = 2  # k and v beside a changed q still see the same input


@dataclass(frozen=True)
class Candidate:
    """A model to score.

    Args:
        weights: None for the pretrained model, or any weights that ``module.use`` takes.
        tasks: the tasks to score it on.
        labels: fields of its result rows.
    """

    weights: FusedWeights | None
    tasks: tuple[str, ...]
    labels: Mapping[str, Any]


def score_candidates(
    module: Module,
    data: Data,
    candidates: Mapping[str, Candidate],
    split: str,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, list[Row]]:
    """The rows that :func:`fusionlab.evaluate` would give for each candidate, from one pass over the data.

    Args:
        module: a module without adapters of its own whose tasks are prepared.
        data: a data module that is set up.
        candidates: by name.
        split: ``validation`` or ``test``.
        on_batch: called after each batch with the number of candidates scored on it.
    """
    slots = _Slots(module.base_model, [candidate.weights for candidate in candidates.values()])
    models = {
        name: Scored(Acting(each.tasks, partial(slots.using, module, each.weights)), each.labels)
        for name, each in candidates.items()
    }
    advance = (lambda count: None) if on_batch is None else on_batch
    with slots:
        return score(module, data, models, split, before_batch=slots.new_batch, on_batch=advance)


def acts_by_hooks(model: nn.Module, weights: FusedWeights | None) -> bool:
    """Whether the weights are an adapter that adds to its layers' outputs, each of them a layer under one name only."""
    if not isinstance(weights, Adapter) or is_linearized(weights):
        return False
    uses = Counter(map(id, dict(model.named_modules(remove_duplicate=False)).values()))
    return all(uses[id(model.get_submodule(name))] == 1 for name in weights.factors)


class _Slots:
    """Hooks on every layer that some candidate adapts, and a memory of frozen layers' outputs within a batch.

    Args:
        model: the base model.
        weights: of all candidates.
    """

    def __init__(self, model: nn.Module, weights: list[FusedWeights | None]) -> None:
        self._device = next(model.parameters()).device
        adapters = [each for each in weights if isinstance(each, Adapter) and acts_by_hooks(model, each)]
        self._by_hooks = set(map(id, adapters))
        self._adapted = {name: model.get_submodule(name) for each in adapters for name in each.factors}
        own = base_tensors(model)
        replaced = {id(own[name]) for each in weights for name in _replaced(each) if name in own}
        leaves = [part for part in model.modules() if not list(part.children())]
        self._markers = [part for part in leaves if _has_one_of(part, replaced)]
        self._memories = [_Memory(part, self) for part in leaves if not _has_one_of(part, replaced)]
        self._factors: dict[int, dict[str, tuple[Tensor, Tensor, float]]] = {}
        self._current: dict[str, tuple[Tensor, Tensor, float]] = {}
        self._handles: list[Any] = []
        self.remembers = False
        self.room = 0

    def __enter__(self) -> _Slots:
        for name, layer in self._adapted.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        for layer in self._markers:
            self._handles.append(layer.register_forward_pre_hook(lambda *_: self.changed()))
        for memory in self._memories:
            memory.install()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for memory in self._memories:
            memory.uninstall()

    def new_batch(self) -> None:
        """Forget the last batch."""
        self.room = len(self._memories)
        for memory in self._memories:
            memory.forget()

    def changed(self) -> None:
        """A layer whose weights differ between candidates was met: little behind it is worth remembering."""
        self.room = min(self.room, KEPT_AFTER_CHANGE)

    @contextmanager
    def using(self, module: Module, weights: FusedWeights | None) -> Iterator[None]:
        """Let ``weights`` act on ``module``."""
        by_hooks = isinstance(weights, Adapter) and id(weights) in self._by_hooks
        self.remembers = weights is None or not is_linearized(weights)
        self._current = self._of(weights) if by_hooks else {}  # type: ignore[arg-type]
        try:
            with module.use(None if by_hooks else weights):
                yield
        finally:
            self._current = {}
            if self.remembers:
                self.room, self.remembers = 0, False  # only the first candidate of a batch fills the memory

    def _of(self, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, float]]:
        if id(adapter) not in self._factors:
            found = {}
            for module, factors in adapter.factors.items():
                dtype = torch.promote_types(factors.lora_a.dtype, torch.float32)
                left, right = (term.to(self._device) for term in adapter.terms(module, dtype))
                found[module] = (right, left, factors.scaling)
            self._factors[id(adapter)] = found
        return self._factors[id(adapter)]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_adapter(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.changed()
            if name not in self._current:
                return None
            lora_a, lora_b, scaling = self._current[name]
            hidden = F.linear(F.linear(inputs[0].to(lora_a.dtype), lora_a), lora_b)
            return (output + hidden * scaling).to(output.dtype)

        return add_adapter


def _replaced(weights: FusedWeights | None) -> Iterable[str]:
    """The tensors of the base that others stand in for, or that samples have others of."""
    if isinstance(weights, RoutedWeights):
        experts = [f"{layer}.weight" for layer in weights.experts]
        return experts if isinstance(weights.rest, Adapter) else [*weights.rest, *experts]
    return () if weights is None or isinstance(weights, Adapter | LinearizedState) else weights


def _has_one_of(part: nn.Module, tensors: set[int]) -> bool:
    """Whether a parameter or buffer of the part itself is one of these, whatever else it is called."""
    return any(id(tensor) in tensors for own in (part._parameters, part._buffers) for tensor in own.values())


class _Memory:
    """Remembers a frozen layer's output for the first candidate's input; equal inputs take it from there.

    What was overwritten in place since, input or output, is not taken.

    Args:
        layer: a layer without parts.
        slots: says whether there is room to remember.
    """

    def __init__(self, layer: nn.Module, slots: _Slots) -> None:
        self._layer, self._slots = layer, slots
        self._forward, self._before = layer.forward, vars(layer).get("forward")
        self._known: tuple[Tensor, int, Tensor, int] | None = None

    def install(self) -> None:
        self._layer.forward = self._call

    def uninstall(self) -> None:
        del self._layer.forward
        if self._before is not None:
            self._layer.forward = self._before

    def forget(self) -> None:
        self._known = None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._slots.remembers or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return self._forward(*args, **kwargs)
        inputs = args[0]
        if self._known is not None:
            if self._holds(inputs):
                return self._known[2]
            self._known = None  # it differs between candidates: do not compare again in this batch
        version = inputs._version
        output = self._forward(inputs)
        if self._slots.room > 0 and isinstance(output, Tensor) and inputs._version == version:
            self._slots.room -= 1
            self._known = (inputs, version, output, output._version)
        return output

    def _holds(self, inputs: Tensor) -> bool:
        assert self._known is not None
        known, version, output, output_version = self._known
        if known._version != version or output._version != output_version:
            return False
        return known is inputs or (known.shape == inputs.shape and torch.equal(known, inputs))
