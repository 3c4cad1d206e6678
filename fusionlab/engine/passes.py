"""A rule over readers, block by block, into a writer.

Whatever the size of a block, the number of threads and where the tensors are, the fused weights and the sums behind
the coefficients are the same bits: sums are taken per cut of 32,768 elements and meet in ``math.fsum``, elementwise
work is rounded in one way, and each of the engine's own threads runs torch on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.sums import inner_products, squared_norms
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.engine.bfloat16 import visit_bfloat16
from fusionlab.engine.job import (
    Job,
    MaskSink,
    Outcome,
    Resources,
    Sink,
    Sums,
    all_known,
    inner_linear_rule,
    is_product,
    measures_parts,
)
from fusionlab.engine.masking import keep_apart
from fusionlab.engine.reading import Block, count_changes, count_exact, put_back
from fusionlab.engine.visiting import NOT_FINITE, Visits
from fusionlab.engine.workers import Found, for_each, one_torch_thread
from fusionlab.errors import InputError
from fusionlab.rules.average import Average
from fusionlab.rules.base import Rule
from fusionlab.rules.task_known import TaskKnownRule

_GROUP_ELEMENTS = 1 << 25
_AVERAGE = Average()


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
            engine.average(sink)
            engine.copy(sink, () if isinstance(job.rule, TaskKnownRule) else list(job.plan.copied))
    remarks = {name: engine.remarks[name] for name in job.base.tensors if name in engine.remarks}
    updated, survived, exact = engine.changes
    return Outcome(engine.tasks, engine.coefficients, engine.sums, updated, survived, exact, remarks, engine.scales)


def coefficients(job: Job, resources: Resources) -> dict[str, dict[str, float]]:
    """λ by name and task of a job whose rule is linear; what is not measured for them is not read.

    Raises:
        InputError: as :func:`run`.
    """
    engine = _Engine(job, resources)
    with one_torch_thread():
        for names in _groups(job):
            engine.choose(names, engine.measure(names))
    return engine.coefficients


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


class _Engine:
    """One run: its buffers, and what it found so far."""

    def __init__(self, job: Job, resources: Resources) -> None:
        self.job = job
        self.tasks = tuple(job.inputs)
        self.coefficients: dict[str, dict[str, float]] = {}
        self.sums: dict[str, dict[str, tuple[float, ...]]] = {}
        self.remarks: dict[str, tuple[str, ...]] = {}
        self.scales: dict[str, float] = {}
        self.changes = [0, 0, 0]  # values that the rule changed, that survive, and that are stored as they are
        self.is_linear = inner_linear_rule(job.rule) is not None
        self._measured: set[str] = set()
        self._touched: set[str] = set()
        self.visits = Visits(job, resources, self._kept)

    def measure(self, names: Sequence[str]) -> Statistics:
        """The rule's measuring passes over ``names``, but for those whose sums are known."""
        statistics = self.job.statistics(self._known(self.job.known_to_rule, names))
        for quantities in self.job.rule.passes:
            if all_known(statistics.sums, quantities, self.job, names):
                continue

            def visit(
                block: Block, base: Tensor, vectors: TaskVectors, seen: Statistics = statistics
            ) -> dict[str, Tensor]:
                if not self.is_linear and block.name not in self._touched:
                    if block.kept is None and not vectors.stacked.isfinite().all():
                        return {"changed": NOT_FINITE}
                    if vectors.stacked.any():
                        self._touched.add(block.name)
                return self.job.rule.measure(block.name, base, vectors, seen)

            def measure_bfloat16(block: Block) -> dict[str, Tensor]:
                return visit_bfloat16(self.job, block.name, block.start, block.count, norms=True, products=False)[0]

            found = self.visits.run(names, visit, measure_bfloat16 if quantities == ("squared_norm",) else None)
            sums, counts = {**statistics.sums, **found.sums()}, {**statistics.counts, **found.counts}
            statistics = self.job.statistics(sums, counts)
            self._measured.update(names)
        return statistics

    def fuse(self, names: Sequence[str], statistics: Statistics, sink: Sink | None) -> None:
        """The fusing pass over ``names``, with what is still missing of norms and inner products."""
        self.choose(names, statistics)
        # what the rule measured counts where it measured whole task vectors
        whole = self._known(self.job.known, names) if measures_parts(self.job.rule) else statistics.sums
        with_norms = not all_known(whole, ("squared_norm",), self.job, names)
        with_products = self.job.cosines and len(self.tasks) > 1

        def visit(block: Block, base: Tensor, vectors: TaskVectors) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            if with_products:
                found = inner_products(vectors, norms=with_norms)
            elif with_norms:
                found = squared_norms(vectors)
            return found if sink is None else found | self._fuse_block(block, base, vectors, statistics, sink)

        def fuse_bfloat16(block: Block) -> dict[str, Tensor]:
            coefficients = None if sink is None else self.coefficients[block.name]
            found, fused = visit_bfloat16(
                self.job, block.name, block.start, block.count,
                norms=with_norms, products=with_products, coefficients=coefficients,
            )  # fmt: skip
            if sink is not None:
                sink.write(block.name, block.start, fused)
            return found

        names = self._changed(names, sink)
        idle = sink is None and not with_norms and not with_products
        found = Found() if idle else self.visits.run(names, visit, fuse_bfloat16)
        for key, by_name in {**whole, **found.sums()}.items():
            if is_product(key):
                self.sums.setdefault(key, {}).update(by_name)
        self.remarks.update(statistics.remarks)
        if "changed" in found.counts:
            updated, survived, _ = found.counts["changed"].tolist()
            counted = updated, survived, int(found.counts["exact"])
            self.changes = [before + now for before, now in zip(self.changes, counted, strict=True)]

    def choose(self, names: Sequence[str], statistics: Statistics) -> None:
        """Keep the coefficients of ``names``, where the rule or what it transforms has any, or the scales of tasks."""
        if isinstance(self.job.rule, TaskKnownRule):
            self.scales = self.job.rule.scales(self.tasks, statistics)
        linear = inner_linear_rule(self.job.rule)
        if linear is not None:
            self.coefficients.update({name: linear.coefficients(name, self.tasks, statistics) for name in names})

    def _fuse_block(
        self, block: Block, base: Tensor, vectors: TaskVectors, statistics: Statistics, sink: Sink
    ) -> dict[str, Tensor]:
        rule = _AVERAGE if block.name in self.job.plan.averaged else self.job.rule
        if isinstance(self.job.rule, TaskKnownRule):
            return keep_apart(self.job, self.job.rule, block, base, vectors, statistics, cast("MaskSink", sink))
        assert isinstance(rule, Rule)
        fused = rule.fuse(block.name, base, vectors, statistics)
        assert fused.shape == base.shape
        assert fused.dtype == base.dtype
        stored = scratch.empty_like(fused, self.job.dtypes[block.name]).copy_(fused)
        rounded, old = fused, base
        if stored.dtype != fused.dtype:
            rounded = scratch.empty_like(fused).copy_(stored)
        if stored.dtype not in (fused.dtype, self.job.base.tensors[block.name].dtype):
            old = scratch.empty_like(base).copy_(scratch.empty_like(stored).copy_(base))
        changed = count_changes(fused, rounded, base, old)
        exact = changed[1:2] if stored.dtype == fused.dtype else count_exact(fused, rounded, old)
        put_back(self.job, block, stored)
        sink.write(block.name, block.start, stored.flatten())
        return {"changed": changed, "exact": exact}

    def average(self, sink: Sink) -> None:
        """Running statistics, whatever the rule is: θ₀ + (1/T) Σ τ_t, weights that are not negative and sum to 1."""
        statistics = self.job.statistics({})

        def visit(block: Block, base: Tensor, vectors: TaskVectors) -> dict[str, Tensor]:
            return self._fuse_block(block, base, vectors, statistics, sink)

        self.visits.run(self.job.plan.averaged, visit, None)

    def _changed(self, names: Sequence[str], sink: Sink | None) -> Sequence[str]:
        """Those that some task vector changes, as far as that was measured; the others are copied.

        A linear rule gives the base's own bits there by itself; one that works on the weights does so to a rounding.
        """
        alone = [] if self.is_linear else [name for name in names if name in self._measured - self._touched]
        if sink is not None and alone:
            if not isinstance(self.job.rule, TaskKnownRule):  # of which the base is no part
                self.copy(sink, alone)
            for key in (f"squared_norm/{task}" for task in self.tasks):
                self.sums.setdefault(key, {}).update(dict.fromkeys(alone, ()))
        return [name for name in names if name not in alone]

    def _known(self, known: Sums, names: Sequence[str]) -> dict[str, dict[str, tuple[float, ...]]]:
        """Of the sums that are known of all tasks, those of ``names``."""
        return {
            key: {name: of[name] for name in names}
            for key, of in known.items()
            if all_known(known, (key.partition("/")[0],), self.job, names)
        }

    def _kept(self, name: str) -> None:
        self.remarks[name] = ("holds NaN or Inf that nothing changes, copied as it is",)

    def copy(self, sink: Sink, names: Sequence[str]) -> None:
        """The base's own tensors, in the output's dtypes."""

        def visit(item: Block) -> None:
            info = self.job.base.tensors[item.name]
            values = torch.empty(item.count, dtype=info.dtype, device=self.job.base.device)
            self.job.base.read_into(item.name, item.start, values)
            stored = values.to(self.job.dtypes[item.name])
            if not stored.isfinite().all():
                if stored.dtype != info.dtype and (values.isfinite() & ~stored.isfinite()).any():
                    raise InputError(f"{item.name} of the base overflows {stored.dtype}; choose a wider dtype.")
                self._kept(item.name)
            sink.write(item.name, item.start, stored)
            self.visits.advance(item.count * info.dtype.itemsize)

        for_each(self.visits.blocks(names, whole=False), visit, self.visits.threads)
