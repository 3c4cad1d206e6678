"""``fuse`` and ``measure`` on states in memory: the engine over an in-memory reader and writer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusionlab.engine.job import DEFAULT_MEMORY_BUDGET, Job, Outcome, Resources
from fusionlab.engine.passes import run
from fusionlab.engine.planning import MismatchedTensors, make_plan
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Rule
from fusionlab.rules.task_known import StreamedRule, TaskKnownRule
from fusionlab.tensors.identity import Ties, sharing_memory
from fusionlab.tensors.lazy import StateWeights, TaskInput, TensorInfo
from fusionlab.tensors.masked import MaskBuffers, MaskedVectors, Place, mask_infos
from fusionlab.tensors.state import State


@dataclass(frozen=True)
class FusedState:
    """A fused model in memory.

    Args:
        state: every name of the base, in the base's dtypes.
        scaling_coefficients: λ by task; by task and name where they differ over names; empty for rules without.
        norms: ‖τ_t‖ by task.
        cosines: cosine similarity of every pair of task vectors.
        remarks: by name, what the user should know of how a tensor was fused.
    """

    state: dict[str, Tensor]
    scaling_coefficients: dict[str, Any]
    norms: dict[str, float]
    cosines: dict[str, dict[str, float]]
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)


def fuse(
    rule: Rule,
    base: State,
    task_vectors: Mapping[str, State] | None = None,
    *,
    finetuned: Mapping[str, State] | None = None,
    mismatched_tensors: MismatchedTensors = "error",
    model: Iterable[str] = (),
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
        model: names of the whole model where ``base`` holds a part of it, for rules that count its blocks.
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
    job = _job(rule, base, task_vectors, finetuned, mismatched_tensors, model)
    sink = _MemorySink(job, base)
    outcome = run(job, sink, Resources(threads or torch.get_num_threads(), memory_budget))
    state = {name: sink.state[job.plan.aliases.get(name, name)] for name in base}
    return FusedState(state, outcome.scaling_coefficients, outcome.norms, outcome.cosines, outcome.remarks)


def keep_masks(
    job: Job,
    resources: Resources,
    place: Place = lambda name: (name, 0),
    stored: Mapping[str, TensorInfo] | None = None,
) -> tuple[MaskedVectors, Outcome]:
    """Run a job whose rule needs the task, in memory; of tensors that no task has changed nothing is kept.

    Args:
        job: what is asked for.
        resources: what the engine may use.
        place: the stored tensor that a unit is in, and its flat index there.
        stored: shapes of the stored tensors; those of the units by default.

    Raises:
        InputError: NaN or Inf in an input, or what the rule refuses.
    """
    unified = masked_infos(job, place, job.base.tensors if stored is None else stored)
    common = {place(name)[0]: None for name in job.plan.averaged}
    sink = MaskBuffers(unified, mask_infos(unified, common, len(job.inputs)), place)
    outcome = run(job, sink, resources)
    kept = {name: each for name, each in sink.unified.items() if each.any()}
    masks = {name: each for name, each in sink.masks.items() if name in kept}
    return MaskedVectors(StateWeights(kept), StateWeights(masks), outcome.scales), outcome


def masked_infos(job: Job, place: Place, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What is written of u: each stored tensor that a fused unit is in, in the unit's output dtype; as above."""
    found: dict[str, TensorInfo] = {}
    for name in (*job.plan.fused, *job.plan.averaged):
        found[place(name)[0]] = TensorInfo(stored[place(name)[0]].shape, job.dtypes[name])
    return found


def try_rule(rule: StreamedRule, tasks: Iterable[str], names: Iterable[str] = ("0.weight", "1.weight")) -> None:
    """Let the rule meet these tasks on tiny tensors, so that what does not fit them is known before any work.

    Args:
        rule: with all its coefficients.
        tasks: the tasks, in recipe order.
        names: of the tensors.

    Raises:
        InputError: what the rule refuses.
    """
    base = {name: torch.eye(2) for name in names}
    job = _job(rule, base, dict.fromkeys(tasks, base), None, "error", ())
    if isinstance(rule, TaskKnownRule):
        keep_masks(job, Resources())
    else:
        run(job, _MemorySink(job, base), Resources())


def _job(
    rule: StreamedRule,
    base: State,
    task_vectors: Mapping[str, State] | None,
    finetuned: Mapping[str, State] | None,
    mismatched_tensors: MismatchedTensors,
    model: Iterable[str],
) -> Job:
    task_vectors, finetuned = task_vectors or {}, finetuned or {}
    twice = [task for task in task_vectors if task in finetuned]
    if twice:
        raise InputError(f"both a task vector and a fine-tuned state are given for {name_list(twice)}; give one.")
    weights = StateWeights(base)
    inputs = {task: TaskInput(StateWeights(state, weights.tensors), True) for task, state in task_vectors.items()}
    inputs |= {task: TaskInput(StateWeights(state)) for task, state in finetuned.items()}
    ties = Ties.between(sharing_memory(base), weights, inputs)
    plan = make_plan(weights, inputs, mismatched_tensors=mismatched_tensors, model=model, ties=ties)
    return Job(rule, weights, inputs, plan, {name: info.dtype for name, info in weights.tensors.items()})


class _MemorySink:
    def __init__(self, job: Job, base: State) -> None:
        names = (name for name in base if name not in job.plan.aliases)
        self.state = {name: torch.empty_like(base[name], memory_format=torch.contiguous_format) for name in names}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Copy into the output tensor."""
        self.state[name].view(-1)[start : start + values.numel()].copy_(values)
