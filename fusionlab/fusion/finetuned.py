"""The fine-tuned weights of one method and seed, and what rules make of any subset of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusionlab.adapters import Adapter, combine, combine_factors
from fusionlab.errors import InputError, name_list
from fusionlab.fusion.making import fuse_weights
from fusionlab.rules import Rule, Statistics, coefficients_by_norms
from fusionlab.rules.sums import squared_norm
from fusionlab.state import State
from fusionlab.weights import Weights, is_linearized, state_of


@dataclass(frozen=True)
class Fused:
    """A fused model that is not made yet.

    Args:
        rule: the rule with all its coefficients.
        tasks: the fused tasks.
        coefficients: λ by name and task for linear rules, whose model is decided by them; None for others.
    """

    rule: Rule
    tasks: tuple[str, ...]
    coefficients: Mapping[str, Mapping[str, float]] | None

    @property
    def by_task(self) -> dict[str, float] | None:
        """λ by task where one number holds for all parameters; zeros are left out."""
        if self.coefficients is None:
            return None
        first, *others = self.coefficients.values()
        if any(other != first for other in others):
            return None
        return {task: value for task, value in first.items() if value}

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for fused models of one :class:`Finetuned` that are the same: a key for scores."""
        by_task = self.by_task
        if by_task is not None:
            return ("linear", *sorted(by_task.items()))
        return ("rule", repr(self.rule), self.tasks)

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
        base: the base's state.
        weights: by task: adapters, or base weights by name, as they are or to act to first order only.
        space: ``factor`` fuses adapters as :func:`fusionlab.adapters.combine_factors` does, with the coefficients of
            ``delta_weight`` space.

    Raises:
        InputError: ``factor`` space, and not all are adapters that it can fuse.
    """

    def __init__(
        self, base: State, weights: Mapping[str, Weights], space: Literal["delta_weight", "factor"] = "delta_weight"
    ) -> None:
        self.base = {name: tensor.detach().cpu() for name, tensor in base.items()}
        self.weights = dict(weights)
        self.space = space
        if space == "factor":
            combine_factors(self._adapters(self.weights), {"*": {}})  # refuses what it cannot fuse
        self.names = tuple(dict.fromkeys(name for task in self.weights for name in self._state(task)))
        self._squared_norms: dict[str, dict[str, tuple[float, ...]]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.weights)

    @property
    def is_linearized(self) -> bool:
        """Whether they act to first order about the base only."""
        return any(is_linearized(weights) for weights in self.weights.values())

    def task_vector(self, task: str) -> dict[str, Tensor]:
        """τ by base name, float32."""
        weights = self.weights[task]
        if isinstance(weights, Adapter):
            return dict(weights.task_vector())
        return {name: value.float() - self.base[name].float() for name, value in self._state(task).items()}

    def plan(self, rule: Rule, tasks: Sequence[str]) -> Fused:
        """What ``rule`` gives for some of the tasks, with the coefficients where it is linear; nothing is fused yet."""
        tasks = tuple(tasks)
        if not coefficients_by_norms(rule):
            return Fused(rule, tasks, None)
        sums = {f"squared_norm/{task}": self._norms(task) for task in tasks} if rule.passes else {}
        names = tuple(name for name in self.names if any(name in self._state(task) for task in tasks))
        statistics = Statistics(tasks, names, sums, model=tuple(self.base))
        return Fused(rule, tasks, {name: rule.coefficients(name, tasks, statistics) for name in names})

    def make(self, fused: Fused) -> Weights:
        """The fused weights; in delta_weight space to the bits of :func:`fusionlab.fusion.making.fuse_weights`.

        Raises:
            InputError: ``factor`` space, and a rule that is no weighted sum.
        """
        chosen = {task: self.weights[task] for task in fused.tasks}
        if self.space == "factor":
            if fused.coefficients is None:
                raise InputError(f"factor space needs a weighted sum, got {fused.rule!r}; use delta_weight space")
            return combine_factors(self._adapters(chosen), fused.coefficients)
        adapters = {task: weights for task, weights in chosen.items() if isinstance(weights, Adapter)}
        if fused.coefficients is not None and len(adapters) == len(chosen):
            return combine(adapters, fused.coefficients)
        return fuse_weights(fused.rule, self.base, chosen).weights

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

    def _state(self, task: str) -> State:
        weights = self.weights[task]
        return weights.task_vector() if isinstance(weights, Adapter) else state_of(weights)

    def _norms(self, task: str) -> dict[str, tuple[float, ...]]:
        if task not in self._squared_norms:
            vectors = self.task_vector(task)
            self._squared_norms[task] = {name: squared_norm(tensor) for name, tensor in vectors.items()}
        return self._squared_norms[task]


def _tensors(weights: Weights) -> list[tuple[str, Tensor]]:
    if not isinstance(weights, Adapter):
        return list(state_of(weights).items())
    found = []
    for module, factors in weights.factors.items():
        parts = {"lora_a": factors.lora_a, "lora_b": factors.lora_b, "lora_b0": factors.lora_b0}
        parts["scaling"] = torch.tensor(factors.scaling, dtype=torch.float64).reshape(1)
        found += [(f"{module}.{part}", tensor) for part, tensor in parts.items() if tensor is not None]
    return found
