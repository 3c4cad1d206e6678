"""What a rule makes of fine-tuned weights in memory: the engine over the base's units, as ``fuse`` runs it over files.

From adapters a linear rule, and one on matrices that turns with their bases, make an adapter, another rule new base
weights; from weights every rule makes weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusionlab.adapters import Adapter, combine, fuse_in_core_space
from fusionlab.adapters.routed import RoutedWeights
from fusionlab.adapters.weights import Weights, is_linearized, state_of
from fusionlab.blocks.sums import squared_norm
from fusionlab.engine import (
    DEFAULT_MEMORY_BUDGET,
    Job,
    Plan,
    Resources,
    StateWeights,
    TaskInput,
    TensorInfo,
    coefficients,
    keep_masks,
    make_plan,
    run,
)
from fusionlab.engine.job import Coefficients, Sums, cache_bytes_of, enough
from fusionlab.errors import InputError, name_list
from fusionlab.fusion.adapted import parts_of, task_vector
from fusionlab.fusion.base import AnyBase, Base
from fusionlab.fusion.fused import FusedModel
from fusionlab.fusion.masks import masks_record
from fusionlab.fusion.routing import with_experts
from fusionlab.fusion.units import UnitWeights
from fusionlab.linearize import LinearizedState
from fusionlab.rules import AnyRule, LinearRule, StreamedRule, TaskArithmetic, TaskKnownRule, with_usual_threshold
from fusionlab.rules.config import scale_of_base
from fusionlab.rules.matrix_rule import MatrixRule
from fusionlab.rules.routed import RoutedMlps
from fusionlab.rules.weighted_by_grams import WeightedByGrams, makes_adapters
from fusionlab.tensors.masked import MaskedVectors
from fusionlab.tensors.state import State
from fusionlab.tensors.state import task_vector as task_vector_of


def fuse_weights(
    rule: AnyRule,
    base: AnyBase,
    finetuned: Mapping[str, Weights],
    *,
    dtype: torch.dtype | None = None,
    resources: Resources | None = None,
) -> FusedModel:
    """Fuse what was trained for each task; what acts to first order only is fused to act so.

    Whatever the base's dtype, updates are added in float32 (float64 where all is) and kept so unless ``dtype`` says
    otherwise. Everything is done on the CPU.

    Args:
        rule: a rule with all its coefficients.
        base: the base, its backbone or module, or its state under its names on disk.
        finetuned: by task, in the order in which they are summed: adapters, or weights of which absent ones are the
            base's.
        dtype: round the whole model to this dtype; of adapters too, weights are made then.
        resources: what the engine may use; by default torch's own number of threads and the memory that it takes.

    Raises:
        InputError: names or shapes that do not fit, linearized weights beside others, NaN or Inf, or what the rule
            refuses.
    """
    return Inputs(Base.of(base), finetuned).fuse(rule, dtype, resources)


def _check_keeps_the_base(rule: StreamedRule) -> None:
    """Raise for a rule that also changes what no task has trained: in memory only what was trained is made anew."""
    scale = scale_of_base(rule)
    if scale != 1.0:
        raise InputError(
            f"passthrough.scale {scale} scales the whole model, trained or not; give it to the "
            f"command fuse, which writes whole models, or leave scale out"
        )


class Inputs:
    """The base and fine-tuned weights by units, ready for any rule.

    Full weights are fused as the files that they are written to: whole, with the base's where nothing was trained; but
    rules on whole tensors, which make the base's again of those, and rules that need the task are not given them.

    Args:
        base: what is added to.
        finetuned: by task, in the order in which they are summed.

    Raises:
        InputError: some act to first order about the base only, others do not, or one has two values for one tensor.
    """

    def __init__(self, base: Base, finetuned: Mapping[str, Weights]) -> None:
        finetuned = {task: base.named(weights) for task, weights in finetuned.items()}
        self.base, self.tasks, self.trained = base, tuple(finetuned), dict(finetuned)
        self.adapters = {task: weights for task, weights in finetuned.items() if isinstance(weights, Adapter)}
        self.linearized = _linearized_alike(finetuned)
        self.units = UnitWeights(base.weights, parts_of(finetuned.values(), base.weights))
        self.vectors: dict[str, State] = {
            task: task_vector(weights, base.layout.names, apart=self.is_all_adapters)
            if isinstance(weights, Adapter)
            else {name: tensor.detach().cpu() for name, tensor in base.layout.to_disk(state_of(weights)).items()}
            for task, weights in finetuned.items()
        }

    @property
    def is_all_adapters(self) -> bool:
        """Whether a linear rule gives an adapter."""
        return len(self.adapters) == len(self.tasks)

    @property
    def averages(self) -> bool:
        """Whether running statistics that some input has are averaged, whatever the rule is."""
        return any(name in self.touched for name in self._plan.averaged)

    @cached_property
    def touched(self) -> dict[str, None]:
        """The units that some input has."""
        return dict.fromkeys(name for vector in self.vectors.values() for name in vector)

    def job(
        self, rule: StreamedRule, dtype: torch.dtype | None = None, known: Sums | None = None, *, cosines: bool = True
    ) -> Job:
        """What the engine is asked for."""
        less = rule.granularity == "tensor" or isinstance(rule, TaskKnownRule)
        whole = less and not self.is_all_adapters and bool(self.touched)
        units = self._touched_units if whole else self.units
        inputs = self._engine_inputs(units)
        plan = self._touched_plan if whole else self._plan
        dtypes = {name: _kept_dtype(info, dtype) for name, info in units.tensors.items()}
        return Job(rule, units, inputs, plan, dtypes, known or {}, cosines, self.base.transposed)

    @cached_property
    def _touched_units(self) -> UnitWeights:
        return self.units.only(self.touched)

    @cached_property
    def _plan(self) -> Plan:
        return make_plan(self.units, self._engine_inputs(self.units))

    @cached_property
    def _touched_plan(self) -> Plan:
        units = self._touched_units
        return make_plan(units, self._engine_inputs(units), model=self.units.tensors)

    def _engine_inputs(self, units: UnitWeights) -> dict[str, TaskInput]:
        inputs = {}
        for task, vector in self.vectors.items():
            if task not in self.adapters:
                vector = {name: self.base.stored[name] for name in units.tensors if name not in vector} | dict(vector)
            weights = StateWeights(vector, units.tensors, cache_bytes_of(DEFAULT_MEMORY_BUDGET, len(self.vectors)))
            inputs[task] = TaskInput(weights, is_task_vector=task in self.adapters)
        return inputs

    def task_vector(self, task: str) -> dict[str, Tensor]:
        """τ by unit, float32 (float64 where all is)."""
        vector = {name: value for name, value in self.vectors[task].items() if name in self.units.tensors}
        if task in self.adapters:
            return vector
        return task_vector_of({name: self.base.stored[name] for name in vector}, vector)

    def squared_norms(self, task: str) -> dict[str, tuple[float, ...]]:
        """‖τ‖² by unit as exact expansions, as the engine measures them."""
        return {name: squared_norm(tensor) for name, tensor in self.task_vector(task).items()}

    def coefficients(self, rule: LinearRule, known: Sums | None = None) -> Coefficients:
        """λ by unit and task; nothing is read where the rule needs no sums, or they are known."""
        job = self.job(rule, known=known, cosines=False)
        return coefficients(job, enough(job, torch.get_num_threads()))

    def combine(self, coefficients: Coefficients) -> Adapter:
        """Σ λ_t τ_t of adapters, λ by unit and task."""
        return combine(self.adapters, self.base.layout.in_memory(coefficients))

    def fuse(self, rule: AnyRule, dtype: torch.dtype | None = None, resources: Resources | None = None) -> FusedModel:
        """See :func:`fuse_weights`."""
        if isinstance(rule, TaskKnownRule):
            return self._keep_masks(with_usual_threshold(rule), dtype, resources)
        if isinstance(rule, RoutedMlps):
            return self._route(rule, dtype, resources)
        _check_keeps_the_base(rule)
        if self.is_all_adapters and makes_adapters(rule):
            return self._fuse_cores(rule, dtype, resources)
        job = self.job(rule, dtype)
        resources = resources or enough(job, torch.get_num_threads())
        if isinstance(rule, LinearRule) and self.is_all_adapters and dtype is None:
            outcome = run(job, None, resources)
            weights: Weights = self.combine(outcome.coefficients)
            found = (outcome.scaling_coefficients, outcome.norms, outcome.cosines)
            return FusedModel(rule, weights, *found, outcome.remarks)
        names = self.base.stored if dtype is not None else {self.units.place(unit)[0]: None for unit in self.touched}
        sink = _MemorySink(self.base, self.units, names, dtype)
        outcome = run(replace(job, plan=replace(job.plan, copied={})), sink, resources)  # the sink has what is copied
        state = self.base.layout.from_disk(sink.state)
        weights = LinearizedState(state) if self.linearized else state
        found = (outcome.scaling_coefficients, outcome.norms, outcome.cosines)
        return FusedModel(rule, weights, *found, outcome.remarks, outcome.rounding)

    def _keep_masks(self, rule: TaskKnownRule, dtype: torch.dtype | None, resources: Resources | None) -> FusedModel:
        stored, job = self.base.weights.tensors, self.job(rule, dtype)
        masked, outcome = keep_masks(job, resources or enough(job, torch.get_num_threads()), self.units.place, stored)
        found = (outcome.scaling_coefficients, outcome.norms, outcome.cosines, outcome.remarks, outcome.rounding)
        weights = replace(masked, is_linearized=self.linearized)
        size = sum(map(bytes_of, self.trained.values()))
        told = masks_record(rule, weights.scales, weights.unified.tensors, weights.masks.tensors, size)
        return FusedModel(rule, weights, *found, told)

    def _route(self, rule: RoutedMlps, dtype: torch.dtype | None, resources: Resources | None) -> FusedModel:
        rule.check(self.tasks)
        if dtype is not None or self.linearized:
            what = "models that act to first order" if self.linearized else f"dtype {dtype}"
            raise InputError(f"{what}: experts and routers stay as they are trained, in float32; choose another rule.")
        fused = self.fuse(TaskArithmetic(rule.scaling_coefficient), None, resources)
        assert not isinstance(fused.weights, MaskedVectors | RoutedWeights)
        vectors = {} if self.is_all_adapters else {task: self.task_vector(task) for task in self.tasks}
        adapters = self.adapters if self.is_all_adapters else {}
        weights = with_experts(rule, self.base, fused.weights, adapters, vectors)
        told = {"num_mlps": len(rule.mlps), **weights.sizes, "input_bytes": sum(map(bytes_of, self.trained.values()))}
        coefficients = dict.fromkeys(self.tasks, rule.scaling_coefficient)
        return replace(fused, rule=rule, weights=weights, scaling_coefficients=coefficients, rounding={}, routed=told)

    def _fuse_cores(
        self, rule: MatrixRule | WeightedByGrams, dtype: torch.dtype | None, resources: Resources | None
    ) -> FusedModel:
        names = self.base.layout.names
        threads = resources.threads if resources is not None else torch.get_num_threads()
        adapter, found = fuse_in_core_space(rule, self.adapters, names=names, threads=threads)
        fused = FusedModel(rule, adapter, {}, found.norms, found.cosines, self.base.layout.renamed(found.remarks))
        if dtype is None:
            return fused
        rounded = Inputs(self.base, {"fused": adapter}).fuse(TaskArithmetic(1.0), dtype, resources)
        return replace(fused, weights=rounded.weights, rounding=rounded.rounding)


def bytes_of(weights: Weights) -> int:
    """Size of what was trained for a task: A and B of an adapter, or the weights that changed."""
    if isinstance(weights, Adapter):
        return sum(each.lora_a.nbytes + each.lora_b.nbytes for each in weights.factors.values())
    return sum(tensor.nbytes for tensor in state_of(weights).values())


def _kept_dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What a fused tensor is kept in: ``dtype``, or float32 for a narrower base; what is no float stays as it is."""
    if not info.dtype.is_floating_point:
        return info.dtype
    return dtype or torch.promote_types(info.dtype, torch.float32)


class _MemorySink:
    """Stored tensors, to begin with the base's."""

    def __init__(self, base: Base, units: UnitWeights, names: Mapping[str, Any], dtype: torch.dtype | None) -> None:
        self._units = units
        self.state = {
            name: base.stored[name].to(_kept_dtype(base.weights.tensors[name], dtype), copy=True).contiguous()
            for name in names
        }

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Copy into the tensor that holds the unit, where it is kept."""
        stored, offset = self._units.place(name)
        if stored in self.state:
            self.state[stored].view(-1)[offset + start : offset + start + values.numel()].copy_(values)


def _linearized_alike(finetuned: Mapping[str, Weights]) -> bool:
    linearized = [task for task, weights in finetuned.items() if is_linearized(weights)]
    others = [task for task in finetuned if task not in linearized]
    if linearized and others:
        raise InputError(
            f"{name_list(linearized)} act to first order about the base only, {name_list(others)} do not; they cannot "
            f"be fused with one another"
        )
    return bool(linearized)
