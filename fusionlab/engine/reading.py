"""Blocks of the base and of the task vectors as the engine reads them, and what of them is not finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from fusionlab.blocks import kernels, scratch
from fusionlab.blocks.task_vectors import TaskVectors
from fusionlab.engine.job import Job
from fusionlab.errors import InputError


@dataclass(frozen=True)
class Block:
    """A piece of a parameter.

    Args:
        name: the parameter.
        start: flat index of its first element.
        count: number of elements.
        kept: flat mask of elements that keep the base's own bits.
    """

    name: str
    start: int
    count: int
    kept: Tensor | None = None


class BlockReader:
    """Reads blocks of a job.

    Args:
        job: with the base and the inputs.
        whole: whether blocks are whole parameters, in their shapes, rather than flat.
    """

    def __init__(self, job: Job, whole: bool) -> None:
        self.job, self.whole = job, whole
        self._device = torch.empty(0, device=job.base.device)

    def dtypes(self, name: str) -> list[torch.dtype]:
        """As which the base and the inputs store a parameter."""
        sources = [(item, self.job.plan.sources[task].get(name)) for task, item in self.job.inputs.items()]
        stored = [item.weights.tensors[source].dtype for item, source in sources if source is not None]
        return [self.job.base.tensors[name].dtype, *stored]

    def read(self, block: Block) -> tuple[Tensor, TaskVectors]:
        """The block of the base and of every task vector in float32 (float64 where all inputs are)."""
        job, name = self.job, block.name
        sources = [(item, job.plan.sources[task].get(name)) for task, item in job.inputs.items()]
        wide = all(dtype == torch.float64 for dtype in self.dtypes(name))
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
        shape = job.base.tensors[name].shape if self.whole else (block.count,)
        vectors = TaskVectors(
            tuple(job.inputs),
            rows[1:].view(-1, *shape),
            start=block.start,
            size=job.base.tensors[name].numel,
        )
        return rows[0].view(shape), vectors

    def without_infinities(self, block: Block) -> tuple[Block, Tensor, TaskVectors]:
        """The block again, with 0 for what is not finite and the same everywhere.

        Raises:
            InputError: something else is not finite, or what fusion gives is too large to be stored.
        """
        base, vectors = self.read(block)
        kept = _unchanged_infinities(self.job, block, base, vectors)
        if kept is None or not kept.any():
            self.blame(block)
        return replace(block, kept=kept), base, vectors

    def blame(self, block: Block) -> NoReturn:
        """Raise with the name of the tensor and of the input that is not finite."""
        base, vectors = self.read(block)
        if not base.isfinite().all():
            raise InputError(f"{block.name} of the base has NaN or Inf; nothing can be added to it.")
        for task, task_vector in vectors.items():
            if not task_vector.isfinite().all():
                raise InputError(f"{block.name} of {task!r} has NaN or Inf; leave that model out or repair it.")
        dtype = self.job.dtypes[block.name]
        raise InputError(f"{block.name}: the fused values overflow {dtype}; choose a wider dtype.")


def _unchanged_infinities(job: Job, block: Block, base: Tensor, vectors: TaskVectors) -> Tensor | None:
    """A flat mask of where base and all inputs hold one and the same NaN or Inf; None where another is not finite.

    There the base and the task vectors become 0, in place, so that a rule meets finite values.

    Args:
        job: with the inputs.
        block: what was read.
        base: its values.
        vectors: its task vectors.
    """
    flat, rows = base.view(-1), vectors.stacked.view(len(vectors), -1)
    kept = ~flat.isfinite()
    values = flat[kept]
    for row, (task, item) in zip(rows, job.inputs.items(), strict=True):
        source = job.plan.sources[task].get(block.name)
        if source is not None and not item.is_task_vector:
            own = torch.empty_like(row)
            item.weights.read_into(source, block.start, own)
            same = (own[kept] == values) | (own[kept].isnan() & values.isnan())
            row[kept] = torch.where(same, 0.0, torch.nan).to(row)
        elif row[kept].any():
            return None
    flat[kept] = 0
    return kept if rows.isfinite().all() else None


def put_back(job: Job, block: Block, stored: Tensor) -> None:
    """Set the elements that are kept to the base's own bits, in place."""
    if block.kept is not None:
        own = torch.empty(block.count, dtype=job.base.tensors[block.name].dtype, device=stored.device)
        job.base.read_into(block.name, block.start, own)
        stored.view(-1)[block.kept] = own[block.kept].to(stored.dtype)


def count_changes(fused: Tensor, stored: Tensor, base: Tensor, stored_base: Tensor) -> Tensor:
    """Numbers of values that fusion changed, that still differ once stored, and that are not finite, int64 ``(3,)``."""
    if fused.device.type == "cpu":
        flat = (values.reshape(-1).numpy() for values in (fused, stored, base, stored_base))
        return torch.tensor(kernels.count_changes(*flat))
    counts = (fused != base).sum(), (stored != stored_base).sum(), (~stored.isfinite()).sum()
    return torch.stack(counts).cpu()


def count_exact(fused: Tensor, stored: Tensor, stored_base: Tensor) -> Tensor:
    """Number of values that differ from the base once stored, and are stored as they were wanted, int64 ``(1,)``."""
    if fused.device.type == "cpu":
        return torch.tensor([kernels.num_exact(*(each.reshape(-1).numpy() for each in (fused, stored, stored_base)))])
    return ((stored != stored_base) & (stored == fused)).sum().cpu().view(1)
