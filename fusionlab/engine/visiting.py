"""Visits of blocks: each is read and handed to a function, on all threads, within the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.kernels import CUT
from fusionlab.blocks.task_vectors import TaskVectors
from fusionlab.engine.bfloat16 import bfloat16_names
from fusionlab.engine.job import Job, Resources, block_bytes, peak_bytes, tensor_bytes
from fusionlab.engine.reading import Block, BlockReader
from fusionlab.engine.workers import Found, for_each
from fusionlab.errors import InputError

_CUTS_PER_BLOCK = 8
NOT_FINITE = torch.ones(3, dtype=torch.int64)  # counts as of :func:`~fusionlab.engine.reading.count_changes`

Visit = Callable[[Block, Tensor, TaskVectors], dict[str, Tensor]]
VisitStored = Callable[[Block], dict[str, Tensor]]


class Visits:
    """How the blocks of a job are visited.

    Args:
        job: whose tensors are read.
        resources: threads, memory and who hears of the bytes that were visited.
        on_kept: told of a tensor that holds NaN or Inf which nothing changes.

    Raises:
        InputError: the memory budget is too small.
    """

    def __init__(self, job: Job, resources: Resources, on_kept: Callable[[str], None]) -> None:
        self.job, self.resources, self.on_kept = job, resources, on_kept
        self.on_tensors = job.rule.granularity == "tensor"
        needed, what = peak_bytes(job)
        if needed > resources.memory_budget:
            raise InputError(
                f"memory_budget: this rule on {what} needs {needed:,} bytes, the budget is "
                f"{resources.memory_budget:,}; give a larger one or another rule."
            )
        self.free = resources.memory_budget - sum(item.weights.held_bytes for item in job.inputs.values())
        per_cut = block_bytes(len(job.inputs)) * CUT
        self.threads = max(1, min(resources.threads, self.free // per_cut))
        if job.base.device.type != "cpu":
            self.threads = 1
        self.reader = BlockReader(job, whole=self.on_tensors)
        self.bfloat16_names = bfloat16_names(job)
        self._arenas: list[scratch.Arena] = []
        self.cuts = max(1, min(_CUTS_PER_BLOCK, self.free // (per_cut * self.threads)))

    def run(self, names: Sequence[str], visit: Visit, visit_stored: VisitStored | None) -> Found:
        """Call ``visit`` on every block of ``names``, on all threads, and add up what it returns.

        Where all is bfloat16, ``visit_stored`` does the same from what is stored.
        """

        def read_and_visit(block: Block) -> tuple[str, int, dict[str, Tensor]]:
            if self.on_tensors:
                return visit_one(block)
            arena = self._arenas.pop() if self._arenas else scratch.Arena(self.cuts * per_cut)
            with scratch.using(arena), scratch.frame():
                found = visit_one(block)
            self._arenas.append(arena)
            return found

        def visit_one(block: Block) -> tuple[str, int, dict[str, Tensor]]:
            if visit_stored is not None and block.name in self.bfloat16_names:
                found = visit_stored(block)
            else:
                base, vectors = self.reader.read(block)
                fails = self.on_tensors and not (base.isfinite().all() and vectors.stacked.isfinite().all())
                found = {"changed": NOT_FINITE} if fails else visit(block, base, vectors)
            if not _all_finite(found):
                found = visit(*self.reader.without_infinities(block))
                self.on_kept(block.name)
                if not _all_finite(found):
                    self.reader.blame(block)
            self.advance(block.count * sum(dtype.itemsize for dtype in self.reader.dtypes(block.name)))
            return block.name, block.start, found

        per_cut = block_bytes(len(self.job.inputs)) * CUT
        found = Found()
        weigh = self._weigh if self.on_tensors else None
        blocks = self.blocks(names, whole=self.on_tensors)
        for_each(blocks, read_and_visit, self.threads, found.add, weigh, self.free)
        return found

    def _weigh(self, block: Block) -> int:
        return tensor_bytes(self.job.base.tensors[block.name], len(self.job.inputs))

    def blocks(self, names: Sequence[str], *, whole: bool) -> Iterator[Block]:
        """The blocks of tensors, or the whole tensors."""
        for name in names:
            numel = self.job.base.tensors[name].numel
            step = max(1, numel if whole else self.cuts * CUT)
            for start in range(0, numel, step):
                yield Block(name, start, min(step, numel - start))

    def advance(self, num_bytes: int) -> None:
        """Tell of bytes that were visited."""
        if self.resources.on_bytes is not None:
            self.resources.on_bytes(num_bytes)


def _all_finite(found: Mapping[str, Tensor]) -> bool:
    sums = (values.tolist() for values in found.values() if values.is_floating_point())
    return all(map(math.isfinite, chain.from_iterable(sums))) and not ("changed" in found and found["changed"][2])
