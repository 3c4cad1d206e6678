"""The fine-tuned weights of one method and seed, and what rules make of any subset of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusionlab.adapters import Adapter, combine_factors
from fusionlab.adapters.routed import FusedWeights
from fusionlab.adapters.weights import Weights, is_linearized, state_of
from fusionlab.errors import InputError, name_list
from fusionlab.fusion.base import AnyBase, Base
from fusionlab.fusion.by_task import acting
from fusionlab.fusion.making import Inputs
from fusionlab.linearize import LinearizedState
from fusionlab.rules import AnyRule, TaskKnownRule, coefficients_by_norms
from fusionlab.tensors.masked import MaskedVectors
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class Fused:
    """A fused model that is not made yet.

    Args:
        rule: the rule with all its coefficients.
        tasks: the fused tasks.
        coefficients: λ by name and task for linear rules, whose model is decided by them; None for others.
        averages: whether the tasks' running statistics of BatchNorm are averaged, those of a task with λ = 0 too.
    """

    rule: AnyRule
    tasks: tuple[str, ...]
    coefficients: Mapping[str, Mapping[str, float]] | None
    averages: bool = False

    @property
    def by_task(self) -> dict[str, float] | None:
        """λ by task where one number holds for all parameters; zeros are left out where they change nothing."""
        if self.coefficients is None:
            return None
        first, *others = self.coefficients.values()
        if any(other != first for other in others):
            return None
        return {task: value for task, value in first.items() if value or self.averages}

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for fused models of one :class:`Finetuned` that are the same: a key for scores."""
        by_task = self.by_task
        if by_task is not None:
            return ("linear", *sorted(by_task.items()))
        return ("rule", repr(self.rule), self.tasks)

    @property
    def knows_the_task(self) -> bool:
        """Whether each task has weights of its own."""
        return isinstance(self.rule, TaskKnownRule)

    @property
    def scaling_coefficients(self) -> dict[str, Any]:
        """λ by task, or by task and parameter, as result rows have it."""
        if self.coefficients is None:
            return {}
        first, *others = self.coefficients.values()
        if all(other == first for other in others):
            return dict(first)
        return {task: {name: of[task] for name, of in self.coefficients.items()} for task in self.tasks}


class Finetuned:
    """What one method trained for each task.

    Args:
        base: what they were trained on: a backbone or module, or the state under its names on disk.
        weights: by task: adapters, or base weights by name, as they are or to act to first order only.
        space: ``factor`` fuses adapters as :func:`fusionlab.adapters.combine_factors` does, with the coefficients of
            ``delta_weight`` space.

    Raises:
        InputError: ``factor`` space, and not all are adapters that it can fuse.
    """

    def __init__(
        self,
        base: AnyBase,
        weights: Mapping[str, Weights],
        space: Literal["delta_weight", "factor"] = "delta_weight",
    ) -> None:
        self.base = Base.of(base)
        self.weights = {task: self.base.named(each) for task, each in weights.items()}
        self.space = space
        if space == "factor":
            combine_factors(self._adapters(self.weights), {"*": {}})  # refuses what it cannot fuse
        self._inputs: dict[tuple[str, ...], Inputs] = {}
        self._changed: dict[str, Weights] = {}
        self._squared_norms: dict[str, dict[str, tuple[float, ...]]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.weights)

    @property
    def is_linearized(self) -> bool:
        """Whether they act to first order about the base only."""
        return any(is_linearized(weights) for weights in self.weights.values())

    def plan(self, rule: AnyRule, tasks: Sequence[str]) -> Fused:
        """What ``rule`` gives for some of the tasks, with the coefficients where it is linear; nothing is fused yet."""
        tasks = tuple(tasks)
        if not coefficients_by_norms(rule):
            return Fused(rule, tasks, None)
        inputs = self.inputs(tasks)
        known = {}
        for task in tasks if rule.passes else ():
            if task not in self._squared_norms:
                self._squared_norms[task] = inputs.squared_norms(task)
            known[f"squared_norm/{task}"] = dict.fromkeys(inputs.units.tensors, ()) | self._squared_norms[task]
        return Fused(rule, tasks, inputs.coefficients(rule, known), inputs.averages)

    def make(self, fused: Fused) -> FusedWeights | MaskedVectors:
        """The fused weights; in delta_weight space to the bits of :func:`fusionlab.fusion.making.fuse_weights`.

        Raises:
            InputError: ``factor`` space, and a rule that is no weighted sum.
        """
        inputs = self.inputs(fused.tasks)
        if self.space == "factor":
            if fused.coefficients is None:
                raise InputError(f"factor space needs a weighted sum, got {fused.rule!r}; use delta_weight space")
            return combine_factors(inputs.adapters, self.base.layout.in_memory(fused.coefficients))
        if fused.coefficients is not None and inputs.is_all_adapters:
            return inputs.combine(fused.coefficients)
        return inputs.fuse(fused.rule).weights

    def acting(self, fused: Fused, tasks: Sequence[str]) -> Iterator[tuple[FusedWeights | None, list[str]]]:
        """What is to act on tasks, with those that are scored under it; see :func:`fusionlab.fusion.by_task.acting`.

        A task that was not fused has no mask: the base's own weights act on it, as if its task vector were zero.
        """
        made = self.make(fused)
        known = [task for task in tasks if task in fused.tasks or not isinstance(made, MaskedVectors)]
        yield from acting(made, known, self.base)
        if others := [task for task in tasks if task not in known]:
            yield None, others

    def task_vector(self, task: str) -> dict[str, Tensor]:
        """τ by unit, float32."""
        return self.inputs((task,)).task_vector(task)

    def moved(self, base: State, task_vector: State) -> State | LinearizedState:
        """θ₀ + τ by name in memory, to act as the fine-tuned models do; differentiable in τ.

        Args:
            base: by name in memory, on the device of ``task_vector``.
            task_vector: τ by unit.
        """
        apart = all(isinstance(weights, Adapter) for weights in self.weights.values())
        units = self.base.layout.renamed(base) if apart else self.base.layout.to_disk(base)
        state = self.base.layout.from_disk({name: units[name] + value for name, value in task_vector.items()})
        return LinearizedState(state) if self.is_linearized else state

    def inputs(self, tasks: Sequence[str]) -> Inputs:
        """What is fused for some of the tasks."""
        tasks = tuple(tasks)
        if tasks not in self._inputs:
            self._inputs[tasks] = Inputs(self.base, {task: self._changes(task) for task in tasks})
        return self._inputs[tasks]

    def _changes(self, task: str) -> Weights:
        """The task's weights; of full ones those that differ from the base's, as files hold them."""
        if task not in self._changed:
            weights = self.weights[task]
            if not isinstance(weights, Adapter):
                stored, base = self.base.layout.to_disk(state_of(weights)), self.base.stored
                state = {
                    name: value for name, value in stored.items() if not _equal(value.detach().cpu(), base.get(name))
                }
                weights = LinearizedState(state) if isinstance(weights, LinearizedState) else state
            self._changed[task] = weights
        return self._changed[task]

    def hash(self, task: str) -> str:
        """Short SHA-256 over the task's fine-tuned weights and what they act on."""
        digest = hashlib.sha256()
        weights = self.weights[task]
        digest.update((weights.method if isinstance(weights, Adapter) else type(weights).__name__).encode())
        if self.space == "factor" and isinstance(weights, Adapter):  # A₀ counts too
            digest.update(f"{weights.a0_hash} {weights.seed}".encode())
        for name, tensor in sorted(_tensors(weights)):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def _adapters(weights: Mapping[str, Weights]) -> dict[str, Adapter]:
        adapters = {task: each for task, each in weights.items() if isinstance(each, Adapter)}
        if others := [task for task in weights if task not in adapters]:
            raise InputError(
                f"factor space fuses A and B of adapters, and {name_list(others)} is none; use delta_weight space"
            )
        return adapters


def _equal(value: Tensor, base: Tensor | None) -> bool:
    if base is None or value.shape != base.shape:
        return False
    dtype = torch.promote_types(value.dtype, base.dtype)
    return torch.equal(value.to(dtype), base.to(dtype))


def _tensors(weights: Weights) -> list[tuple[str, Tensor]]:
    if not isinstance(weights, Adapter):
        return list(state_of(weights).items())
    found = []
    for module, factors in weights.factors.items():
        parts = {"lora_a": factors.lora_a, "lora_b": factors.lora_b}
        parts["scaling"] = torch.tensor(factors.scaling, dtype=torch.float64).reshape(1)
        found += [(f"{module}.{part}", tensor) for part, tensor in parts.items()]
    return found
