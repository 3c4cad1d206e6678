"""RegMean: every linear layer nearest to all tasks' own on what each one's own model reads there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.errors import InputError
from fusionlab.rules.weighted_by_grams import LayerInputs, Layers, WeightedByGrams
from fusionlab.search.base import Found, Problem, Training
from fusionlab.search.training import check_ran


@dataclass(frozen=True)
class Regmean:
    """(Σ θ_t Ĝ_t)(Σ Ĝ_t)⁻¹ per linear layer, G_t the Gram matrix of what it reads in task t's own model; else the mean.

    Ĝ_t = a G_t + (1 − a) diag(G_t) + floor·I, with G_t = Σ x xᵀ / number of x over unlabelled training inputs of the
    task: one forward pass each, sums in float64, padding left out. Text models read a text and all label words (T5), or
    the prompt without its answer. A layer takes 8·in² bytes a task. One task gives its own model. Of adapters it makes
    an adapter of rank T·rank, exactly.

    Args:
        num_samples: training inputs of each task, a fixed choice.
        off_diagonal: a; .95 is for CLIP and ViT, the paper has .1 for T5 and .6 to .9 for others, such as GPT-2.
        floor: added to the diagonal in both sums.

    Raises:
        InputError: numbers out of range, or (when searching) models that act to first order, a trained linear layer
            that never runs, or NaN or Inf in what one reads.

    Source: Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849, section 3.
    """

    num_samples: int = 256
    off_diagonal: float = 0.95
    floor: float = 1e-6

    name: ClassVar[str] = "regmean"
    looks_at: ClassVar[str] = "unlabelled training inputs"
    split: ClassVar[str] = "train"
    needs_classes: ClassVar[bool] = False
    gives: ClassVar[type] = WeightedByGrams

    def __post_init__(self) -> None:
        check_settings(self.name, self.num_samples)
        WeightedByGrams(self.off_diagonal, self.floor)

    def bytes_needed(self, training: Training) -> int:
        """Of the Gram matrices, and of a task vector beside them."""
        return training.gram_bytes + 4 * training.num_elements

    def search(self, problem: Problem) -> Found:
        """Run every task's own model over its inputs once."""
        training = problem.training
        units = training.linear_units(problem.tasks)
        grams = {task: training.expert_grams(task, self.num_samples) for task in problem.tasks}
        layers = layers_of(training, {task: {unit: of[unit] for unit in units} for task, of in grams.items()})
        rule = WeightedByGrams.of(self.off_diagonal, self.floor, layers)
        return Found(rule, {}, training.num_samples(problem.tasks, self.num_samples), 0, 1.0)

    def expected_rows(self, num_samples: int) -> float:
        """Its training inputs once."""
        return float(self.num_samples)

    def expected_points(self, at_once: bool) -> float:
        """None."""
        return 0.0


def layers_of(training: Training, grams: Mapping[str, Mapping[str, tuple[Tensor, ...]]]) -> Layers:
    """What layers read, as the rule has it, from Gram matrices by task and unit.

    Raises:
        InputError: one never ran in any task.
    """
    units = next(iter(grams.values()))
    check_ran(unit for unit in units if not any(gram.any() for of in grams.values() for gram in of[unit]))
    return {
        unit: LayerInputs({task: of[unit] for task, of in grams.items()}, training.is_transposed(unit))
        for unit in units
    }


def check_settings(name: str, num_samples: int) -> None:
    """Raise unless there is at least one sample.

    Raises:
        InputError: with the number.
    """
    if num_samples < 1:
        raise InputError(f"{name}.num_samples must be at least 1, got {num_samples}")
