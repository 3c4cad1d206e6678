"""A rule over readers, block by block, into a writer.

Whatever the size of a block, the number of threads and where the tensors are, the fused weights and the sums behind
the coefficients are the same bits: sums are taken per cut of 32,768 elements and meet in ``math.fsum``, elementwise
work is rounded in one way, and each of the engine's own threads runs torch on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.rules import kernels, scratch
from fusionlab.rules.base import LinearRule, Rule, Statistics, TaskVectors
from fusionlab.rules.kernels import CUT
from fusionlab.rules.sums import inner_products, squared_norms
from fusionlab.streaming.planning import Plan
from fusionlab.streaming.weights import TaskInput, TensorInfo, Weights
from fusionlab.streaming.workers import Found, for_each, one_torch_thread

DEFAULT_MEMORY_BUDGET = 1_000_000_000
_CUTS_PER_BLOCK = 8
_GROUP_ELEMENTS = 1 << 25
Sums = Mapping[str, Mapping[str, tuple[float, ...]]]


class Sink(Protocol):
    """Where fused tensors go; called by several threads at once."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store the flat ``values``, in the output's dtype, from the flat index ``start`` on."""
        ...


@dataclass(frozen=True)
class Job:
    """Everything that decides the result.

    Args:
        rule: with all its coefficients.
        base: what fusion adds to.
        inputs: by task, in recipe order.
        plan: what happens to every parameter.
        dtypes: name -> dtype of the output.
        known: sums measured earlier, e.g. read from ``fusion_stats.json``.
        cosines: also measure the inner products of all pairs of task vectors.
    """

    rule: Rule
    base: Weights
    inputs: Mapping[str, TaskInput]
    plan: Plan
    dtypes: Mapping[str, torch.dtype]
    known: Sums = field(default_factory=dict)
    cosines: bool = True


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
    """

    tasks: tuple[str, ...]
    coefficients: dict[str, dict[str, float]]
    sums: dict[str, dict[str, tuple[float, ...]]]
    updated: int
    survived: int

    @property
    def scaling_coefficients(self) -> dict[str, Any]:
        """λ by task where each has one, else by task and name, or nothing."""
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
        for i, first in enumerate(self.tasks):
            for j, second in enumerate(self.tasks[i + 1 :], start=i + 1):
                if f"inner_product/{i}/{j}" in self.sums:
                    scale = norms[first] * norms[second]
                    product = self._total(f"inner_product/{i}/{j}")
                    found.setdefault(first, {})[second] = product / scale if scale else 0.0
        return found

    def _total(self, key: str) -> float:
        return math.fsum(part for parts in self.sums[key].values() for part in parts)


def run(job: Job, sink: Sink | None, resources: Resources) -> Outcome:
    """Measure, fuse and write; without a ``sink`` measure only.

    Raises:
        InputError: NaN or Inf in an input (named), a memory budget that is too small, or what the rule refuses.
    """
    engine = _Engine(job, resources)
    with one_torch_thread():
        for names in _groups(job):
            engine.fuse(names, engine.measure(names), sink)
        if sink is not None:
            engine.copy(sink)
    return Outcome(engine.tasks, engine.coefficients, engine.sums, engine.updated, engine.survived)


def inner_linear_rule(rule: object) -> LinearRule | None:
    """The linear rule itself or inside transforms, whose coefficients are reported; None if there is none."""
    while isinstance(rule, Rule) and not isinstance(rule, LinearRule):
        rule = getattr(rule, "rule", None)
    return rule if isinstance(rule, LinearRule) else None


def num_reads(job: Job) -> int:
    """How often the inputs are read: measuring passes that are not known yet, and the fusing pass."""
    needed = [quantities for quantities in job.rule.passes if not _known(job.known, quantities, job, job.plan.fused)]
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


def _known(known: Sums, quantities: Sequence[str], job: Job, names: Sequence[str]) -> bool:
    keys = [f"{quantity}/{task}" for quantity in quantities for task in job.inputs]
    return all(name in known.get(key, ()) for key in keys for name in names)


def _groups(job: Job) -> Iterator[Sequence[str]]:
    """Names that are measured and fused together: all, or a few where a tensor's own statistics are enough.

    Small groups keep histograms few, and read the second time from the operating system's cache.
    """
    if job.rule.statistics_scope == "model" or not job.rule.passes:
        yield job.plan.fused
        return
    group: list[str] = []
    elements = 0
    for name in job.plan.fused:
        group.append(name)
        elements += job.base.tensors[name].numel
        if elements >= _GROUP_ELEMENTS or len(group) >= 64:
            yield group
            group, elements = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class _Block:
    name: str
    start: int
    count: int


_Visit = Callable[[_Block, Tensor, TaskVectors], dict[str, Tensor]]


class _Engine:
    """One run: its buffers, and what it found so far."""

    def __init__(self, job: Job, resources: Resources) -> None:
        self.job = job
        self.resources = resources
        self.tasks = tuple(job.inputs)
        self.coefficients: dict[str, dict[str, float]] = {}
        self.sums: dict[str, dict[str, tuple[float, ...]]] = {}
        self.updated = self.survived = 0
        self.on_tensors = job.rule.granularity == "tensor"
        needed, what = peak_bytes(job)
        if needed > resources.memory_budget:
            raise InputError(
                f"memory_budget: this rule on {what} needs {needed:,} bytes, the budget is "
                f"{resources.memory_budget:,}; give a larger one or another rule."
            )
        self.free = resources.memory_budget - sum(item.weights.held_bytes for item in job.inputs.values())
        per_cut = block_bytes(len(self.tasks)) * CUT
        self.threads = max(1, min(resources.threads, self.free // per_cut))
        if job.base.device.type != "cpu":
            self.threads = 1
        self._device = torch.empty(0, device=job.base.device)
        self._arenas: list[scratch.Arena] = []
        self.cuts = max(1, min(_CUTS_PER_BLOCK, self.free // (per_cut * self.threads)))

    def measure(self, names: Sequence[str]) -> Statistics:
        """The rule's measuring passes over ``names``, but for those whose sums are known."""
        known = {
            key: {name: of[name] for name in names}
            for key, of in self.job.known.items()
            if _known(self.job.known, (key.partition("/")[0],), self.job, names)
        }
        statistics = Statistics(self.tasks, self.job.plan.fused, known)
        for quantities in self.job.rule.passes:
            if _known(statistics.sums, quantities, self.job, names):
                continue

            def visit(block: _Block, base: Tensor, vectors: TaskVectors, seen: Statistics = statistics) -> dict:
                return self.job.rule.measure(block.name, base, vectors, seen)

            found = self._pass(names, visit)
            sums, counts = {**statistics.sums, **found.sums()}, {**statistics.counts, **found.counts}
            statistics = Statistics(self.tasks, self.job.plan.fused, sums, counts)
        return statistics

    def fuse(self, names: Sequence[str], statistics: Statistics, sink: Sink | None) -> None:
        """The fusing pass over ``names``, with what is still missing of norms and inner products."""
        linear = inner_linear_rule(self.job.rule)
        if linear is not None:
            self.coefficients.update({name: linear.coefficients(name, self.tasks, statistics) for name in names})
        with_norms = not _known(statistics.sums, ("squared_norm",), self.job, names)
        with_products = self.job.cosines and len(self.tasks) > 1

        def visit(block: _Block, base: Tensor, vectors: TaskVectors) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            if with_products:
                found = inner_products(vectors, norms=with_norms)
            elif with_norms:
                found = squared_norms(vectors)
            return found if sink is None else found | self._fuse_block(block, base, vectors, statistics, sink)

        found = Found() if sink is None and not with_norms and not with_products else self._pass(names, visit)
        for key, by_name in {**statistics.sums, **found.sums()}.items():
            if key.startswith(("squared_norm/", "inner_product/")):
                self.sums.setdefault(key, {}).update(by_name)
        if "changed" in found.counts:
            self.updated += int(found.counts["changed"][0])
            self.survived += int(found.counts["changed"][1])

    def _fuse_block(
        self, block: _Block, base: Tensor, vectors: TaskVectors, statistics: Statistics, sink: Sink
    ) -> dict[str, Tensor]:
        fused = self.job.rule.fuse(block.name, base, vectors, statistics)
        assert fused.shape == base.shape
        assert fused.dtype == base.dtype
        stored = scratch.empty_like(fused, self.job.dtypes[block.name]).copy_(fused)
        sink.write(block.name, block.start, stored.flatten())
        rounded, old = fused, base
        if stored.dtype != fused.dtype:
            rounded = scratch.empty_like(fused).copy_(stored)
        if stored.dtype not in (fused.dtype, self.job.base.tensors[block.name].dtype):
            old = scratch.empty_like(base).copy_(scratch.empty_like(stored).copy_(base))
        changed = count_changes(fused, rounded, base, old)
        if changed[2]:
            self._blame(block, base, vectors)
        return {"changed": changed}

    def copy(self, sink: Sink) -> None:
        """The base's own tensors, in the output's dtypes."""

        def visit(item: _Block) -> None:
            info = self.job.base.tensors[item.name]
            values = torch.empty(item.count, dtype=info.dtype, device=self.job.base.device)
            self.job.base.read_into(item.name, item.start, values)
            stored = values.to(self.job.dtypes[item.name])
            if info.dtype.is_floating_point and not stored.isfinite().all():
                raise InputError(f"{item.name} of the base has NaN or Inf{_overflow(info.dtype, stored.dtype)}.")
            sink.write(item.name, item.start, stored)
            self._advance(item.count * info.dtype.itemsize)

        for_each(self._blocks(list(self.job.plan.copied), whole=False), visit, self.threads)

    def _pass(self, names: Sequence[str], visit: _Visit) -> Found:
        """Call ``visit`` on every block of ``names``, on all threads, and add up what it returns."""

        def read_and_visit(block: _Block) -> tuple[str, int, dict[str, Tensor]]:
            if self.on_tensors:
                return visit_one(block)
            arena = self._arenas.pop() if self._arenas else scratch.Arena(self.cuts * per_cut)
            with scratch.using(arena), scratch.frame():
                found = visit_one(block)
            self._arenas.append(arena)
            return found

        def visit_one(block: _Block) -> tuple[str, int, dict[str, Tensor]]:
            base, vectors, num_bytes = self._read(block)
            if self.on_tensors and not (base.isfinite().all() and vectors.stacked.isfinite().all()):
                self._blame(block, base, vectors)  # a decomposition would fail on it
            found = visit(block, base, vectors)
            sums = (values.tolist() for values in found.values() if values.is_floating_point())
            if not all(map(math.isfinite, chain.from_iterable(sums))):
                self._blame(block, base, vectors)
            self._advance(num_bytes)
            return block.name, block.start, found

        per_cut = block_bytes(len(self.tasks)) * CUT
        found = Found()
        weigh = self._weigh if self.on_tensors else None
        blocks = self._blocks(names, whole=self.on_tensors)
        for_each(blocks, read_and_visit, self.threads, found.add, weigh, self.free)
        return found

    def _weigh(self, block: _Block) -> int:
        return tensor_bytes(self.job.base.tensors[block.name], len(self.tasks))

    def _blocks(self, names: Sequence[str], *, whole: bool) -> Iterator[_Block]:
        for name in names:
            numel = self.job.base.tensors[name].numel
            step = max(1, numel if whole else self.cuts * CUT)
            for start in range(0, numel, step):
                yield _Block(name, start, min(step, numel - start))

    def _read(self, block: _Block) -> tuple[Tensor, TaskVectors, int]:
        """The block of the base and of every task vector in float32 (float64 where all inputs are)."""
        job, name = self.job, block.name
        sources = [(item, job.plan.sources[task].get(name)) for task, item in job.inputs.items()]
        present = [job.base.tensors[name].dtype]
        present += [item.weights.tensors[source].dtype for item, source in sources if source is not None]
        wide = all(dtype == torch.float64 for dtype in present)
        dtype = torch.float64 if wide else torch.float32
        rows = scratch.empty((len(sources) + 1, block.count), self._device, dtype)
        job.base.read_into(name, block.start, rows[0])
        for row, (item, source) in zip(rows[1:], sources, strict=True):
            if source is None:
                row.zero_()
            else:
                item.weights.read_into(source, block.start, row)
                if not item.is_task_vector:
                    row.sub_(rows[0])
        shape = job.base.tensors[name].shape if self.on_tensors else (block.count,)
        vectors = TaskVectors(
            self.tasks,
            rows[1:].view(-1, *shape),
            start=block.start,
            size=job.base.tensors[name].numel,
        )
        return rows[0].view(shape), vectors, block.count * sum(dtype.itemsize for dtype in present)

    def _advance(self, num_bytes: int) -> None:
        if self.resources.on_bytes is not None:
            self.resources.on_bytes(num_bytes)

    def _blame(self, block: _Block, base: Tensor, vectors: TaskVectors) -> None:
        """Raise with the name of the tensor and of the input that is not finite."""
        if not base.isfinite().all():
            raise InputError(f"{block.name} of the base has NaN or Inf; nothing can be added to it.")
        for task, task_vector in vectors.items():
            if not task_vector.isfinite().all():
                raise InputError(f"{block.name} of {task!r} has NaN or Inf; leave that model out or repair it.")
        dtype = self.job.dtypes[block.name]
        raise InputError(f"{block.name}: the fused values overflow {dtype}; choose a wider dtype.")


def _overflow(stored: torch.dtype, output: torch.dtype) -> str:
    return "" if stored == output else f" in {output}"


def count_changes(fused: Tensor, stored: Tensor, base: Tensor, stored_base: Tensor) -> Tensor:
    """Numbers of values that fusion changed, that still differ once stored, and that are not finite, int64 ``(3,)``."""
    if fused.device.type == "cpu":
        flat = (values.reshape(-1).numpy() for values in (fused, stored, base, stored_base))
        return torch.tensor(kernels.count_changes(*flat))
    counts = (fused != base).sum(), (stored != stored_base).sum(), (~stored.isfinite()).sum()
    return torch.stack(counts).cpu()
