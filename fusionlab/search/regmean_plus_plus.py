"""RegMean++: RegMean block by block, each behind the blocks that are fused already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.matrix_rule import mean
from fusionlab.rules.weighted_by_grams import LayerInputs, WeightedByGrams
from fusionlab.search.base import Found, Problem, Training
from fusionlab.search.regmean import Regmean, layers_of


@dataclass(frozen=True)
class RegmeanPlusPlus(Regmean):
    """RegMean with G_t of what a layer reads in task t's block behind the fused blocks before it, block by block.

    A block is what names number (``layers.3``), or one linear layer outside of all; what is no part of one, such as
    embeddings, is fused (averaged) from the start. One forward pass of each input for every block, and one of a single
    input that tells their order. The model is RegMean's where one block has all linear layers and nothing else was
    trained. Everything else is as in ``regmean``.

    Args:
        num_samples: training inputs of each task, a fixed choice.
        off_diagonal: a; .95 is for CLIP and ViT, .1 for language models.
        floor: added to the diagonal in both sums.

    Raises:
        InputError: as ``regmean``.

    Source: RegMean++, arXiv 2508.03121, section 4.
    """

    name: ClassVar[str] = "regmean_plus_plus"

    def bytes_needed(self, training: Training) -> int:
        """Of the Gram matrices, all task vectors, and what is fused of them."""
        return training.gram_bytes + 4 * training.num_elements * (training.num_tasks + 1)

    def search(self, problem: Problem) -> Found:
        """Block by block, every task's own behind those that are fused."""
        training, tasks = problem.training, problem.tasks
        vectors = {task: training.task_vector(task) for task in tasks}
        blocks = training.blocks(tasks)
        inside = {unit for block in blocks for unit in block.units}
        fused = {unit: self._fused(unit, vectors, {}) for unit in training.units(tasks) if unit not in inside}
        layers: dict[str, LayerInputs] = {}
        for block in blocks:
            own = {task: {u: vector[u] for u in block.units if u in vector} for task, vector in vectors.items()}
            grams = {task: training.grams(task, fused | own[task], self.num_samples, block.linear) for task in tasks}
            layers |= layers_of(training, grams)
            fused |= {unit: self._fused(unit, vectors, layers) for unit in block.units}
        rule = WeightedByGrams.of(self.off_diagonal, self.floor, layers)
        seen = training.num_samples(tasks, self.num_samples)
        return Found(rule, {}, seen, 0, len(blocks) + 1 / seen)

    def expected_rows(self, num_samples: int) -> float:
        """Its training inputs once a block, of which models have one or two dozen."""
        return 18.0 * self.num_samples

    def expected_points(self, at_once: bool) -> float:
        """None."""
        return 0.0

    def _fused(self, unit: str, vectors: dict[str, dict[str, Tensor]], layers: dict[str, LayerInputs]) -> Tensor:
        """The fused task vector of one unit, as the rule makes it with what is known of the layers so far."""
        present = next(vector[unit] for vector in vectors.values() if unit in vector)
        stacked = torch.stack([vector.get(unit, torch.zeros_like(present)) for vector in vectors.values()])
        task_vectors = TaskVectors(tuple(vectors), stacked)
        if unit not in layers:
            return mean(task_vectors)
        rule = WeightedByGrams(self.off_diagonal, self.floor, layers=layers)
        return rule.fuse(unit, torch.zeros_like(present), task_vectors, Statistics())
