"""Rules that need to know the task, in ``fuse``: what is refused, and a unified vector and masks streamed to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusionlab import rules
from fusionlab.commands.fuse.prepared import Prepared
from fusionlab.commands.fuse.recipe import WITHOUT, Recipe, check_left_out
from fusionlab.engine import Job, Outcome, Resources, TensorInfo, masked_infos, run
from fusionlab.errors import InputError
from fusionlab.fusion.masks import masks_record
from fusionlab.fusion.units import UnitWeights
from fusionlab.rules import TaskKnownRule
from fusionlab.tensors.masked import MaskWriter, base_hash, mask_infos


def check_masks(recipe: Recipe, rule: TaskKnownRule) -> None:
    """Raise if the recipe asks for what masks over the base as it is cannot be.

    Raises:
        InputError: naming the field.
    """
    name = rules.rule_name(rule)
    check_left_out(recipe, WITHOUT, f"{name} writes masks over the base as it is, not one model")
    if not isinstance(recipe.base, str):
        raise InputError(f"base: {name} writes masks over a base that is on disk; got ranges of blocks.")


def unified_dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What a unified vector is stored in: ``dtype``, or float32 where the base is narrower."""
    return dtype or torch.promote_types(info.dtype, torch.float32)


def unified_tensors(job: Job) -> dict[str, TensorInfo]:
    """What is written of the unified vector."""
    assert isinstance(job.base, UnitWeights)
    return masked_infos(job, job.base.place, job.base.stored.tensors)


def write_masks(prepared: Prepared, staging: Path, resources: Resources) -> tuple[Outcome, dict[str, Any]]:
    """Fuse into the two files of an existing folder; and what ``fusion.json`` tells of them."""
    job, unified = prepared.job, prepared.tensors
    assert isinstance(job.base, UnitWeights)
    assert isinstance(job.rule, TaskKnownRule)
    common = {job.base.place(name)[0]: None for name in job.plan.averaged}
    masks = mask_infos(unified, common, len(job.inputs))
    with MaskWriter(staging, unified, masks, job.base.place) as writer:
        outcome = run(job, writer, resources)
    told = masks_record(job.rule, outcome.scales, unified, masks, prepared.trained_bytes)
    return outcome, {"base_hash": base_hash(job.base.stored, {name: name for name in unified}), "masks": told}
