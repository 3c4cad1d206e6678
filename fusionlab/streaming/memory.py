"""``fuse`` and ``measure`` on states in memory: the engine over an in-memory reader and writer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import LinearRule, Rule
from fusionlab.state import State
from fusionlab.streaming.engine import DEFAULT_MEMORY_BUDGET, Job, Resources, run
from fusionlab.streaming.planning import MismatchedTensors, TaskInput, TensorInfo, make_plan


@dataclass(frozen=True)
class FusedState:
    """A fused model in memory.

    Args:
        state: every name of the base, in the base's dtypes.
        scaling_coefficients: λ by task; by task and name where they differ over names; empty for rules without.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of every pair of task vectors.
    """

    state: dict[str, Tensor]
    scaling_coefficients: dict[str, Any]
    norms: dict[str, float]
    cosines: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """A linear rule's coefficients, without the fused weights.

    Args:
        coefficients: λ by name and task.
        scaling_coefficients: the same, by task where each has one.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of every pair of task vectors.
    """

    coefficients: dict[str, dict[str, float]]
    scaling_coefficients: dict[str, Any]
    norms: dict[str, float]
    cosines: dict[str, dict[str, float]]


def fuse(
    rule: Rule,
    base: State,
    task_vectors: Mapping[str, State] | None = None,
    *,
    finetuned: Mapping[str, State] | None = None,
    mismatched_tensors: MismatchedTensors = "error",
    threads: int | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> FusedState:
    """Fuse task vectors or fine-tuned states in memory, to the same bits as the engine gives from files.

    Elementwise work is in float32 (float64 where all states are), rounded once to the base's dtype; nothing that is
    handed in is changed.

    Args:
        rule: with all its coefficients.
        base: the base's state.
        task_vectors: τ by task; a name that is absent means zero.
        finetuned: fine-tuned states by task, instead of task vectors or after them.
        mismatched_tensors: what to do with tensors that do not fit: an ``error``, or take the ``base``'s.
        threads: worker threads; torch's own number by default.
        memory_budget: bytes for blocks and whole tensors in flight, beside the states themselves.

    Returns:
        the fused state, on the base's device.

    Raises:
        InputError: names or shapes that do not fit, NaN or Inf, or what the rule refuses.

    Example:
        >>> from fusionlab.rules import TaskArithmetic
        >>> base = {"w": torch.tensor([1.0, 2.0])}
        >>> fuse(TaskArithmetic(0.5), base, finetuned={"a": {"w": torch.tensor([3.0, 2.0])}}).state
        {'w': tensor([2., 2.])}
    """
    job = _job(rule, base, task_vectors, finetuned, mismatched_tensors)
    sink = _MemorySink(job, base)
    outcome = run(job, sink, Resources(threads or torch.get_num_threads(), memory_budget))
    state = {name: sink.state[job.plan.aliases.get(name, name)] for name in base}
    return FusedState(state, outcome.scaling_coefficients, outcome.norms, outcome.cosines)


def measure(
    rule: LinearRule,
    base: State,
    task_vectors: Mapping[str, State] | None = None,
    *,
    finetuned: Mapping[str, State] | None = None,
    threads: int | None = None,
) -> Measured:
    """The coefficients, norms and cosines that :func:`fuse` would report for a linear rule; arguments as there."""
    outcome = run(
        _job(rule, base, task_vectors, finetuned, "error"), None, Resources(threads or torch.get_num_threads())
    )
    return Measured(outcome.coefficients, outcome.scaling_coefficients, outcome.norms, outcome.cosines)


def _job(
    rule: Rule,
    base: State,
    task_vectors: Mapping[str, State] | None,
    finetuned: Mapping[str, State] | None,
    mismatched_tensors: MismatchedTensors,
) -> Job:
    task_vectors, finetuned = task_vectors or {}, finetuned or {}
    twice = [task for task in task_vectors if task in finetuned]
    if twice:
        raise InputError(f"both a task vector and a fine-tuned state are given for {name_list(twice)}; give one.")
    weights = StateWeights(base)
    inputs = {task: TaskInput(StateWeights(state, weights), True) for task, state in task_vectors.items()}
    inputs |= {task: TaskInput(StateWeights(state)) for task, state in finetuned.items()}
    plan = make_plan(weights, inputs, mismatched_tensors=mismatched_tensors)
    return Job(rule, weights, inputs, plan, {name: info.dtype for name, info in weights.tensors.items()})


class StateWeights:
    """A state as the engine reads it.

    Args:
        state: a plain dict, or a mapping that computes its tensors, such as an adapter's task vector: those are kept
            for as long as they take no more than ``cache_bytes``, the latest one always.
        base: where to take shapes from for a mapping that computes its tensors; they are checked when computed.
        cache_bytes: see ``state``.
    """

    def __init__(self, state: State, base: StateWeights | None = None, cache_bytes: int = 1 << 28) -> None:
        self._state = state
        self._is_lazy = not isinstance(state, dict)
        shapes = base.tensors if base is not None and self._is_lazy else {}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(shapes[name].shape, torch.float32) if name in shapes else _info(state[name])
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
    def ties(self) -> dict[str, str]:
        """Names that share their memory with an earlier one."""
        if self._is_lazy:
            return {}
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        for name, tensor in self._state.items():
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and first.setdefault(key, name) != name:
                found[name] = first[key]
        return found

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


class _MemorySink:
    def __init__(self, job: Job, base: State) -> None:
        names = (name for name in base if name not in job.plan.aliases)
        self.state = {name: torch.empty_like(base[name], memory_format=torch.contiguous_format) for name in names}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Copy into the output tensor."""
        self.state[name].view(-1)[start : start + values.numel()].copy_(values)
