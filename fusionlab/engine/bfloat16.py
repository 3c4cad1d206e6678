"""Linear rules on bfloat16 models, as most large ones are stored: one compiled pass over a block instead of many."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fusionlab.blocks import kernels, scratch
from fusionlab.blocks.sums import num_cuts, pair_keys
from fusionlab.engine.job import Job
from fusionlab.rules.base import LinearRule


def bfloat16_names(job: Job) -> frozenset[str]:
    """The fused parameters that :func:`visit_bfloat16` can work on: bfloat16 in, out and in every fine-tuned model."""
    if not isinstance(job.rule, LinearRule) or job.rule.granularity != "elementwise" or job.base.device.type != "cpu":
        return frozenset()

    def dtypes(name: str) -> set[torch.dtype | None]:
        found: set[torch.dtype | None] = {job.base.tensors[name].dtype, job.dtypes[name]}
        for task, item in job.inputs.items():
            source = job.plan.sources[task].get(name)
            found.add(None if source is None or item.is_task_vector else item.weights.tensors[source].dtype)
        return found

    return frozenset(name for name in job.plan.fused if dtypes(name) == {torch.bfloat16})


def visit_bfloat16(
    job: Job,
    name: str,
    start: int,
    count: int,
    *,
    norms: bool,
    products: bool,
    coefficients: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Read a block and measure it; with ``coefficients`` also fuse it. The bits are those of the general way.

    Returns:
        sums by key and, where it was fused, ``changed`` and ``exact``; the fused block, bfloat16 ``(count,)``, or an
        empty one.
    """
    tasks = tuple(job.inputs)
    stored = scratch.empty((1 + len(tasks), count), torch.empty(0), torch.bfloat16)
    job.base.read_into(name, start, stored[0])
    for row, (task, item) in enumerate(job.inputs.items(), start=1):
        item.weights.read_into(job.plan.sources[task][name], start, stored[row])
    keys = pair_keys(tasks, norms=norms, products=products)
    sums = torch.empty(len(keys), num_cuts(count), dtype=torch.float64)
    fused = scratch.empty((0 if coefficients is None else count,), stored)
    scales = np.array([0.0 if coefficients is None else coefficients[task] for task in tasks], np.float32)
    *changed, exact = kernels.fuse_bfloat16(_bits(stored), scales, norms, products, sums.numpy(), _bits(fused))
    found = dict(zip(keys, sums, strict=True))
    counts = {"changed": torch.tensor(changed), "exact": torch.tensor([exact])}
    return found if coefficients is None else found | counts, fused


def _bits(values: Tensor) -> np.ndarray:
    return values.view(torch.uint16).numpy()
