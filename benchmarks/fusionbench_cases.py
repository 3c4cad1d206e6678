"""The methods of ``bench_fusionbench_agreement.py``: FusionBench's, ours, and what explains a difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import fusionbench_formulas as formulas
import fusionbench_side as side
import torch
from fusion_bench.method.dare import DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.fisher_merging import FisherMergingForCLIPVisionModel
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.regmean import RegMeanAlgorithmForCLIP
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp import SlerpMergeAlgorithm
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.wudi import WUDIMerging
from fusionbench_side import Fuser, Inputs, State, by_class, by_task, with_our_draws

import fusionlab
from fusionlab import rules
from fusionlab.blocks import matrices
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.search import Fisher, Regmean, RegmeanPlusPlus, ValidationProblem

NUM_SAMPLES, BATCH, WUDI_STEPS = 32, 16, 20
THEIR_SHARE = float(torch.tensor(0.95))  # of the off-diagonal entries, which FusionBench multiplies in float32


@dataclass(frozen=True)
class Case:
    """One method.

    Args:
        name: with what is not by default.
        theirs: FusionBench's.
        ours: fusionlab's.
        words: what differs.
        explained: ours with another option, or FusionBench's formula; ``ours`` by default.
    """

    name: str
    theirs: Fuser
    ours: Fuser
    words: str = "nothing"
    explained: Fuser | None = None


def by_rule(rule: Any) -> Fuser:
    """What a rule of ours makes of the states."""
    return lambda inputs: fusionlab.fuse(rule, inputs.base, finetuned=inputs.states).state


def by_search(search: Any) -> Fuser:
    """What a rule of ours that looks at training inputs makes of the models."""

    def fuse(inputs: Inputs) -> State:
        module, data, states = inputs.bench.module, inputs.bench.data, inputs.states
        problem = ValidationProblem(tuple(states), Finetuned(module, states), module, data, lambda tried: [])
        return fusionlab.fuse(search.search(problem).rule, module, finetuned=states).state

    return fuse


def masked(rule: Any, scales: Callable[[Inputs, Any], dict[str, float]] | None = None) -> Fuser:
    """Each task's weights of a rule of ours that knows the task, with other s_t where they are given."""

    def fuse(inputs: Inputs) -> State:
        weights = fusionlab.fuse(rule, inputs.base, finetuned=inputs.states).weights
        if scales is not None:
            plain = replace(weights, scales=dict.fromkeys(inputs.states, 1.0))
            of = {task: plain.of(task) for task in inputs.states}
            vectors = {task: {name: each.read(name) for name in inputs.base} for task, each in of.items()}
            weights = replace(weights, scales=scales(inputs, vectors))
        return by_task({task: fusionlab.weights_of(weights, task, inputs.base) for task in inputs.states})

    return fuse


def without_cut(fuser: Fuser) -> Fuser:
    """With directions however small in decompositions."""

    def fuse(inputs: Inputs) -> State:
        with mock.patch.object(matrices, "CUT", 0.0):
            return fuser(inputs)

    return fuse


def wudi_at_their_rate(inputs: Inputs) -> State:
    """Ours by ``adam``, each tensor at the relative rate that is FusionBench's 1e-5."""
    fused = {}
    for name, base in inputs.base.items():
        states = {task: {name: state[name]} for task, state in inputs.states.items()}
        unit = (sum(float((of[name] - base).square().sum()) for of in states.values()) / base.numel()) ** 0.5
        rule = rules.Wudi(solver="adam", num_steps=WUDI_STEPS, learning_rate=1e-5 / unit)
        fused |= fusionlab.fuse(rule, {name: base}, finetuned=states).state
    return fused


def of_two(fuser: Fuser) -> Fuser:
    """Of the first two tasks."""
    return lambda inputs: fuser(inputs.first(2))


def cases_of_weights() -> list[Case]:
    """The methods that look at weights alone."""
    dare: dict[str, Any] = {"sparsity_ratio": 0.5, "only_on_linear_weights": False, "rescale": True}
    ties: dict[str, Any] = {"threshold": 20, "remove_keys": []}
    summed = rules.Trim(rules.DisjointMean(0.3, normalize=False), 0.2)
    return [
        Case("simple average", by_class(SimpleAverageAlgorithm), by_rule(rules.Average())),
        Case(
            "task arithmetic, λ .3",
            by_class(lambda: TaskArithmeticAlgorithm(scaling_factor=0.3)),
            by_rule(rules.TaskArithmetic(0.3)),
        ),
        Case(
            "TIES, λ 1, `merge_func: mean`",
            by_class(lambda: TiesMergingAlgorithm(scaling_factor=1.0, merge_func="mean", **ties)),
            by_rule(rules.Ties(0.2, 1.0)),
        ),
        Case(
            "TIES, λ .3, its default `sum`",
            by_class(lambda: TiesMergingAlgorithm(scaling_factor=0.3, merge_func="sum", **ties)),
            by_rule(rules.Ties(0.2, 0.3)),
            "the sum of the agreeing entries, not their mean: ours with `normalize: false`",
            by_rule(summed),
        ),
        Case(
            "DARE, task arithmetic λ .3",
            with_our_draws(lambda: DareTaskArithmetic(scaling_factor=0.3, **dare)),
            by_rule(rules.Dare(rules.TaskArithmetic(0.3))),
        ),
        Case(
            "DARE, TIES, λ 1, `merge_func: mean`",
            with_our_draws(lambda: DareTiesMerging(scaling_factor=1.0, merge_func="mean", **dare, **ties)),
            by_rule(rules.Dare(rules.Ties(0.2, 1.0))),
        ),
        Case(
            "Model Stock, 4 models",
            by_class(ModelStock),
            by_rule(rules.ModelStock()),
            "t from the cosine of the mean angle, not from the mean cosine",
            formulas.model_stock,
        ),
        Case(
            "Model Stock, 2 models",
            of_two(by_class(ModelStock)),
            of_two(by_rule(rules.ModelStock())),
            "1e-8 beside the product of the norms, and in the divisor of t",
            of_two(formulas.model_stock),
        ),
        Case(
            "slerp, t .3, 2 models",
            of_two(by_class(lambda: SlerpMergeAlgorithm(t=0.3), with_base=False)),
            of_two(by_rule(rules.Slerp(0.3))),
        ),
        *cases_of_matrices(),
        *cases_of_masks(),
    ]


def cases_of_matrices() -> list[Case]:
    """The methods on whole matrices."""
    decomposed = "nothing but float32 in their decompositions, float64 in ours"
    wudi = by_class(lambda: WUDIMerging(iter_num=WUDI_STEPS))

    def their_formula(inputs: Inputs) -> State:
        return formulas.wudi(inputs, WUDI_STEPS)

    return [
        Case("Iso-C", by_class(lambda: ISO_C_Merge(1.0)), by_rule(rules.IsoC()), decomposed),
        Case("Iso-CTS", by_class(lambda: ISO_CTS_Merge(1.0, 0.8)), by_rule(rules.IsoCts(0.8)), decomposed),
        Case(
            "TSV-M",
            by_class(lambda: TaskSingularVectorMerging(alpha=1)),
            by_rule(rules.TsvM()),
            "directions below 1e-5 of the largest in the singular vectors side by side stay; ours without that cut",
            without_cut(by_rule(rules.TsvM())),
        ),
        Case(
            f"WUDI, {WUDI_STEPS} steps",
            wudi,
            by_rule(rules.Wudi(num_steps=WUDI_STEPS)),
            "an absolute rate, 1e-5, and a second moment for every entry; ours is relative, with one for the matrix",
            their_formula,
        ),
        Case(
            f"WUDI, {WUDI_STEPS} steps, ours `solver: adam` at their rate",
            wudi,
            wudi_at_their_rate,
            "Adam's ε is 1e-8 beside the gradient 2(τP − R); ours is 1e-8 of a task vector's entry, beside τP − R",
            their_formula,
        ),
    ]


def cases_of_masks() -> list[Case]:
    """The methods that know the task; all tasks' weights."""

    def tall(inputs: Inputs) -> State:
        return by_task(formulas.tall(inputs, 0.6))

    return [
        Case(
            "EMR",
            side.their_emr,
            masked(rules.Emr()),
            "s_t = Σ mean abs(τ_t) / Σ mean abs(M_t u) over tensors, so that a bias weighs as much as a matrix; ours "
            "over entries, as the paper",
            masked(rules.Emr(), formulas.emr_scales),
        ),
        Case(
            "TALL masks, λ .6, the class",
            side.their_tall,
            masked(rules.Tall(0.6)),
            "M_t = [abs(θ₀ − τ_t) > λ abs(Στ − τ_t)]: the mask is given τ_t where its formula has θ_t; ours is the "
            "paper's abs(θ₀ − θ_t) = abs(τ_t)",
            tall,
        ),
        Case("TALL masks, λ .6, `tall_mask.utils`", side.their_flat_tall, masked(rules.Tall(0.6))),
    ]


def cases_of_data() -> list[Case]:
    """The methods that look at training inputs."""
    shared: dict[str, Any] = {"exclude_param_names_regex": [], "dataloader_kwargs": {"batch_size": BATCH}}
    regmean = shared | {"num_regmean_examples": NUM_SAMPLES, "reduce_non_diagonal_ratio": 0.95}

    def theirs(algorithm: Callable[..., Any], seed: int = 0, **settings: Any) -> Fuser:
        pool = {"as_tuples": algorithm is side.RegMeanPlusPlus}
        return lambda inputs: by_class(lambda: side.with_heads(algorithm(**settings), inputs), seed, **pool)(inputs)

    def behind(inputs: Inputs) -> State:
        fused = by_search(RegmeanPlusPlus(NUM_SAMPLES, THEIR_SHARE, 1e-12))(inputs)
        return fused | {name: value for name, value in inputs.base.items() if "post_layernorm" in name}

    our_fisher = by_search(Fisher(NUM_SAMPLES))

    def fisher(words: str, normalize: bool, batch: int) -> Case:
        settings = shared | {"dataloader_kwargs": {"batch_size": batch}, "num_fisher_examples": NUM_SAMPLES}
        settings |= {"normalize_fisher_weight": normalize, "minimal_fisher_weight": 1e-6}
        return Case(
            f"Fisher, batches of {batch}, {'its default `normalize`' if normalize else 'not normalized'}",
            theirs(FisherMergingForCLIPVisionModel, **settings),
            our_fisher,
            words,
            lambda inputs: formulas.fisher(inputs, batch, normalize, 1e-6),
        )

    return [
        Case(
            "RegMean",
            theirs(RegMeanAlgorithmForCLIP, **regmean, weight_transpose=True),
            by_search(Regmean(NUM_SAMPLES)),
            "float32 in their sums and inverse, which act on whole weights; a floor of 1e-6 on the diagonal in ours, "
            "none in theirs: ours with 1e-12",
            by_search(Regmean(NUM_SAMPLES, THEIR_SHARE, 1e-12)),
        ),
        Case(
            "RegMean, theirs twice, images in another order",
            theirs(RegMeanAlgorithmForCLIP, **regmean, weight_transpose=True),
            theirs(RegMeanAlgorithmForCLIP, 1, **regmean, weight_transpose=True),
            "nothing but float32",
        ),
        Case(
            "RegMean++",
            theirs(side.RegMeanPlusPlus, **regmean, weight_transpose=True),
            by_search(RegmeanPlusPlus(NUM_SAMPLES)),
            "the norm after the blocks stays the base's, ours is the mean; float32 and the floor as in RegMean",
            behind,
        ),
        fisher(
            "F_t = Σ over batches of (Σ √p ∂log p)² / n, Σ over the images of a batch and all classes, so that signs "
            "cancel; divided by its norm; ours one drawn class of one image at a time",
            True,
            BATCH,
        ),
        fisher("(Σ √p ∂log p)² over the classes of an image, not Σ p (∂log p)², which ours draws from", False, 1),
    ]
