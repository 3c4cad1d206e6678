"""The fusing pass of a rule that needs the task: a unified vector and masks of a block, not fused values."""

from __future__ import annotations

from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.bits import pack
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.engine.job import Job, MaskSink
from fusionlab.engine.reading import Block, count_changes, count_exact
from fusionlab.rules.average import Average
from fusionlab.rules.task_known import TaskKnownRule


def keep_apart(
    job: Job,
    rule: TaskKnownRule,
    block: Block,
    base: Tensor,
    vectors: TaskVectors,
    statistics: Statistics,
    sink: MaskSink,
) -> dict[str, Tensor]:
    """Write u and the masks of a block; of running statistics their mean's update, for all tasks.

    Returns:
        ``changed`` and ``exact``: what :func:`count_changes` and :func:`count_exact` say of u beside zero.
    """
    if block.name in job.plan.averaged:
        unified = Average().fuse(block.name, base, vectors, statistics) - base
    else:
        unified = rule.unify(vectors)
        sink.write_masks(block.name, block.start, pack(rule.masks(unified, vectors)))
    stored = scratch.empty_like(unified, job.dtypes[block.name]).copy_(unified)
    rounded, zero = scratch.empty_like(unified).copy_(stored), scratch.empty_like(unified).zero_()
    sink.write(block.name, block.start, stored)
    changed = count_changes(unified, rounded, zero, zero)
    return {"changed": changed, "exact": count_exact(unified, rounded, zero)}
