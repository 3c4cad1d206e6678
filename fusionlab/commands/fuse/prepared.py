"""A recipe whose inputs are open and fit together: what is about to be done, from headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fusionlab.blocks.bits import packed_size
from fusionlab.commands.fuse.matrix_rules import core_bytes, forecast, in_core_space
from fusionlab.commands.fuse.opened import Opened
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.commands.fuse.routing import Made
from fusionlab.engine import Job, Resources, TensorInfo
from fusionlab.engine.job import num_reads, peak_bytes
from fusionlab.files import path_of
from fusionlab.rules import AnyRule, TaskKnownRule
from fusionlab.tensors.dtypes import dtype_of


@dataclass(frozen=True)
class Prepared:
    """A recipe whose inputs are open and fit together.

    Args:
        recipe: what was asked for.
        base: the base.
        inputs: by task.
        job: what the engine will do.
        tensors: what the output will hold, in full weights; of masks the unified vector.
        as_adapter: whether the output is an adapter.
        untied: names that change apart from what the base ties them to, which is beside them.
        notes: what the user should know, for the plan and ``fusion.json``.
        carried: what travels from the base's folder.
        tokenizer: what is written in the place of the base's.
        chat_template: the same of its template.
        found: what ``fusion.json`` tells of a search that found the rule.
        made: the model itself, where it is one that is not streamed; ``job`` stands in its place.
    """

    recipe: Recipe
    base: Opened
    inputs: Mapping[str, Opened]
    job: Job
    tensors: Mapping[str, TensorInfo]
    as_adapter: bool
    resources: Resources
    untied: Mapping[str, str]
    notes: tuple[str, ...]
    carried: tuple[str, ...] = ()
    tokenizer: Any = None
    chat_template: str | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    made: Made | None = None

    @property
    def rule(self) -> AnyRule:
        """What is written is made by it."""
        return self.job.rule if self.made is None else self.made.model.rule

    @property
    def output(self) -> Path:
        """The folder to write."""
        return path_of(self.recipe.output)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the floating-point output is stored in; None: the base's own dtypes."""
        return dtype_of(self.recipe.dtype, "dtype")

    @property
    def as_masks(self) -> bool:
        """Whether the output is masks of one vector."""
        return isinstance(self.job.rule, TaskKnownRule)

    @property
    def trained_bytes(self) -> int:
        """Size of what was trained for all tasks: A and B of adapters, and of full models what is fused."""
        fused, found = {*self.job.plan.fused, *self.job.plan.averaged}, 0
        for opened in self.inputs.values():
            if opened.adapter is not None:
                found += sum(each.lora_a.nbytes + each.lora_b.nbytes for each in opened.adapter.factors.values())
            else:
                found += sum(info.nbytes for name, info in opened.weights.tensors.items() if name in fused)
        return found

    @property
    def output_bytes(self) -> int:
        """Size of the weights to write."""
        if self.as_adapter:
            return sum(file.stat().st_size for opened in self.inputs.values() for file in opened.files)
        masks = sum(len(self.inputs) * packed_size(info.numel) for info in self.tensors.values() if self.as_masks)
        return sum(info.nbytes for info in self.tensors.values()) + masks

    @property
    def bytes_to_read(self) -> int:
        """Bytes of tensors that are read, over all passes."""
        plan, base = self.job.plan, self.job.base.tensors
        if self.in_core_space:
            merged = 0 if self.as_adapter else sum(info.nbytes for info in base.values())
            return merged + sum(file.stat().st_size for opened in self.inputs.values() for file in opened.files)
        fused = sum(base[name].nbytes for name in plan.fused)
        for task, item in self.job.inputs.items():
            fused += sum(item.weights.tensors[source].nbytes for source in plan.sources[task].values())
        others = () if self.as_adapter or self.as_masks else (*plan.copied, *plan.averaged)
        copied = sum(base[name].nbytes for name in others)
        return fused * num_reads(self.job) + copied

    @cached_property
    def forecast(self) -> str | None:
        """How long a rule of many operations will take."""
        return forecast(self.job, self.inputs, self.resources.threads)

    @property
    def in_core_space(self) -> bool:
        """Whether a rule on matrices works on the cores of adapters."""
        return in_core_space(self.job.rule, self.inputs)

    @property
    def peak(self) -> tuple[int, str]:
        """The least memory that is needed, and for what."""
        if self.in_core_space:
            return core_bytes(self.inputs), f"the cores of {len(self.inputs)} adapters"
        return peak_bytes(self.job)
