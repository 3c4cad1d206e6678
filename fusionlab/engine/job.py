"""What a run is asked for, what it may use, and what it found out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fusionlab.blocks.kernels import CUT
from fusionlab.blocks.sums import cosine, pair_keys
from fusionlab.blocks.task_vectors import Statistics
from fusionlab.engine.planning import Plan
from fusionlab.rules.base import LinearRule, Rule
from fusionlab.rules.task_known import StreamedRule
from fusionlab.tensors.lazy import TaskInput, TensorInfo, Weights

DEFAULT_MEMORY_BUDGET = 1_000_000_000
Sums = Mapping[str, Mapping[str, tuple[float, ...]]]
Coefficients = Mapping[str, Mapping[str, float]]


class Sink(Protocol):
    """Where fused tensors go; called by several threads at once."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store the flat ``values``, in the output's dtype, from the flat index ``start`` on."""
        ...


class MaskSink(Sink, Protocol):
    """Where unified vectors and masks go."""

    def write_masks(self, name: str, start: int, packed: Tensor) -> None:
        """Store the bits of a block, uint8 ``(num_tasks, bytes)``, whose first entry is the flat index ``start``."""
        ...


@dataclass(frozen=True)
class Job:
    """Everything that decides the result.

    Args:
        rule: with all its coefficients. Of one that needs the task, u goes to the sink in the place of the fused
            tensors, and the masks beside it.
        base: what fusion adds to.
        inputs: by task, in recipe order.
        plan: what happens to every parameter.
        dtypes: name -> dtype of the output.
        known: sums measured earlier, e.g. read from ``fusion_stats.json``.
        cosines: also measure the inner products of all pairs of task vectors.
        transposed: weights of linear layers that are stored ``(in, out)``; asked for rules on matrices only.
    """

    rule: StreamedRule
    base: Weights
    inputs: Mapping[str, TaskInput]
    plan: Plan
    dtypes: Mapping[str, torch.dtype]
    known: Sums = field(default_factory=dict)
    cosines: bool = True
    transposed: frozenset[str] = frozenset()

    @property
    def known_to_rule(self) -> Sums:
        """What the rule may take for what it would measure: not norms of whole task vectors for those of parts."""
        if not measures_parts(self.rule):
            return self.known
        return {key: of for key, of in self.known.items() if not is_product(key)}

    def statistics(self, sums: Sums, counts: Mapping[str, Tensor] | None = None) -> Statistics:
        """What measuring passes found, as the rule is handed it."""
        return Statistics(tuple(self.inputs), self.plan.fused, sums, counts or {}, self.plan.model, self.transposed)


@dataclass(frozen=True)
class Resources:
    """What the engine may use, without influence on the result.

    Args:
        threads: worker threads.
        memory_budget: bytes for blocks and whole tensors in flight.
        on_bytes: called with the number of input bytes of every block that is done.
    """

    threads: int = 1
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    on_bytes: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run found out, beside the tensors.

    Args:
        tasks: the tasks, in recipe order.
        coefficients: λ by name and task; empty for rules that have none.
        sums: squared norms and inner products, as exact expansions by key and name.
        updated: number of elements that the rule changed.
        survived: how many of them still differ from the base when both are in the output's dtype.
        exact: how many of those the output's dtype holds as they are.
        remarks: by name, what the user should know of how a parameter was fused.
        scales: s_t by task of a rule that needs the task; empty for others.
    """

    tasks: tuple[str, ...]
    coefficients: dict[str, dict[str, float]]
    sums: dict[str, dict[str, tuple[float, ...]]]
    updated: int
    survived: int
    exact: int
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def rounding(self) -> dict[str, dict[str, float]]:
        """What the output's dtype leaves of the elements that the rule changed: counts, and shares.

        ``kept`` as they are, ``changed`` to the nearest value of the dtype, ``lost`` to the base's own.
        """
        counts = {"kept": self.exact, "changed": self.survived - self.exact, "lost": self.updated - self.survived}
        return {
            "rounding": {
                "updated_elements": self.updated,
                "survived_elements": self.survived,
                "survived": self.survived / self.updated if self.updated else 1.0,
            },
            "rounded_shares": {name: count / max(1, self.updated) for name, count in counts.items()},
        }

    @property
    def scaling_coefficients(self) -> dict[str, Any]:
        """λ by task where each has one, else by task and name, or nothing; s_t of masks."""
        if self.scales:
            return dict(self.scales)
        by_task = {task: {name: of[task] for name, of in self.coefficients.items()} for task in self.tasks}
        if all(len(set(values.values())) == 1 for values in by_task.values()):
            return {task: next(iter(values.values())) for task, values in by_task.items()}
        return by_task if self.coefficients else {}

    @property
    def norms(self) -> dict[str, float]:
        """‖τ_t‖ by task."""
        return {task: math.sqrt(self._total(f"squared_norm/{task}")) for task in self.tasks}

    @property
    def cosines(self) -> dict[str, dict[str, float]]:
        """Cosine similarity of every pair of task vectors, by earlier and later task; 0 where one is zero."""
        norms = self.norms
        found: dict[str, dict[str, float]] = {}
        for key, (i, j) in pair_keys(self.tasks, norms=False, products=True).items():
            if key in self.sums:
                first, second = self.tasks[i], self.tasks[j]
                found.setdefault(first, {})[second] = cosine(self._total(key), norms[first], norms[second])
        return found

    def _total(self, key: str) -> float:
        return math.fsum(part for parts in self.sums[key].values() for part in parts)


def inner_linear_rule(rule: object) -> LinearRule | None:
    """The linear rule itself or inside transforms, whose coefficients are reported; None if there is none."""
    while isinstance(rule, Rule) and not isinstance(rule, LinearRule):
        rule = getattr(rule, "rule", None)
    return rule if isinstance(rule, LinearRule) else None


def measures_parts(rule: object) -> bool:
    """Whether norms or inner products that the rule measures are of what a transform leaves of the task vectors."""
    while (rule := getattr(rule, "rule", None)) is not None:
        own = not rule.measures_untransformed
        if own and any(is_product(f"{quantity}/") for quantities in rule.passes for quantity in quantities):
            return True
    return False


def is_product(key: str) -> bool:
    """Whether sums of this key are squared norms or inner products."""
    return key.startswith(("squared_norm/", "inner_product/"))


def num_reads(job: Job) -> int:
    """How often the inputs are read: measuring passes that are not known yet, and the fusing pass."""
    known = job.known_to_rule
    needed = [quantities for quantities in job.rule.passes if not all_known(known, quantities, job, job.plan.fused)]
    return len(needed) + 1


def block_bytes(num_tasks: int) -> int:
    """Peak bytes per element of a block: the inputs as stored and in float32, two float64 copies, temporaries."""
    return 12 * (num_tasks + 1) + 16 * num_tasks + 32


def tensor_bytes(info: TensorInfo, num_tasks: int) -> int:
    """Peak bytes of a rule on one whole tensor: the inputs in float32, their float64 copies and singular vectors."""
    return info.numel * (4 * (num_tasks + 1) + 8 * (3 * num_tasks + 3))


def peak_bytes(job: Job) -> tuple[int, str]:
    """The least memory that a run needs, and for what."""
    held = sum(item.weights.held_bytes for item in job.inputs.values())
    num_tasks = len(job.inputs)
    if job.rule.granularity == "elementwise":
        return held + block_bytes(num_tasks) * CUT, f"blocks of {num_tasks} tasks"
    name = max(job.plan.fused, key=lambda name: job.base.tensors[name].numel)
    info = job.base.tensors[name]
    return held + tensor_bytes(info, num_tasks), f"the whole of {name} {info.shape}"


def cache_bytes_of(memory_budget: int, num_tasks: int) -> int:
    """What may be kept of each task vector that is computed as it is read: of all of them a quarter of the budget."""
    return memory_budget // (4 * num_tasks)


def enough(job: Job, threads: int) -> Resources:
    """Threads, and the default budget or the least that the job takes: for callers whose users were asked for none."""
    return Resources(threads, max(DEFAULT_MEMORY_BUDGET, peak_bytes(job)[0]))


def all_known(known: Sums, quantities: Sequence[str], job: Job, names: Sequence[str]) -> bool:
    keys = [f"{quantity}/{task}" for quantity in quantities for task in job.inputs]
    return all(name in known.get(key, ()) for key in keys for name in names)
