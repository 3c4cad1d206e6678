"""What methods of FusionBench compute where that is not what ours do, written from their formulas, for small models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from fusionbench_side import Inputs, State


def model_stock(inputs: Inputs) -> State:
    """θ₀ + t τ̄ with t = N cos ā / (1 + (N − 1) cos ā), ā the mean of the angles of all pairs instead of cosines.

    Angles in float32, with 1e-8 beside the product of two norms and in the divisor of t.
    """
    fused, vectors = {}, inputs.vectors.values()
    for name, base in inputs.base.items():
        own = [vector[name].float() for vector in vectors]
        pairs = [(a, b) for number, a in enumerate(own) for b in own[number + 1 :]]
        cosines = [(a * b).sum() / (math.sqrt((a**2).sum() * (b**2).sum()) + 1e-8) for a, b in pairs]
        cosine = math.cos(sum(float(each.acos()) for each in cosines) / len(pairs))
        step = len(own) * cosine / (1 + (len(own) - 1) * cosine + 1e-8)
        fused[name] = base + step * sum(vector[name] for vector in vectors) / len(own)
    return fused


def emr_scales(inputs: Inputs, masked: Mapping[str, State]) -> dict[str, float]:
    """s_t as means: Σ over tensors of mean |τ_t| / Σ over tensors of mean |M_t u|, for M_t ⊙ u by task; in float32."""

    def of(state: State) -> torch.Tensor:
        total = torch.zeros(())
        for tensor in state.values():
            total += tensor.abs().mean()
        return total

    return {task: float(of(vector) / of(masked[task])) for task, vector in inputs.vectors.items()}


def tall(inputs: Inputs, threshold: float) -> dict[str, State]:
    """θ₀ + M_t ⊙ Σ τ with M_t = [|θ₀ − τ_t| > λ |Σ τ − τ_t|]: the mask takes τ_t for θ_t in one difference."""
    vectors = inputs.vectors
    total = {name: sum(vector[name] for vector in vectors.values()) for name in inputs.base}
    fused = {}
    for task, vector in vectors.items():
        fused[task] = {
            name: base + total[name] * ((base - vector[name]).abs() > threshold * (total[name] - vector[name]).abs())
            for name, base in inputs.base.items()
        }
    return fused


def wudi(inputs: Inputs, steps: int, rate: float = 1e-5) -> State:
    """Adam of an absolute rate with ε = 1e-8 on Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² from Σ τ_t; else the mean."""
    fused, vectors = {}, inputs.vectors
    for name, base in inputs.base.items():
        own = [vector[name] for vector in vectors.values()]
        update = sum(own)
        if base.dim() != 2:
            fused[name] = base + update / len(own)
            continue
        grams = [each.T @ each / each.square().sum() for each in own]
        gram, product = sum(grams), sum(each @ of for each, of in zip(own, grams, strict=True))
        first, second = torch.zeros_like(base), torch.zeros_like(base)
        for step in range(1, steps + 1):
            gradient = 2 * (update @ gram - product)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moved = (second / (1 - 0.999**step)).sqrt() + 1e-8
            update = update - rate * first / (1 - 0.9**step) / moved
        fused[name] = base + update
    return fused


def fisher(inputs: Inputs, batch_size: int, normalize: bool, floor: float) -> State:
    """Σ s_t (F_t + floor) θ_t / Σ s_t (F_t + floor), s_t ∝ 1 / (‖F_t‖ + floor), or 1 where nothing is normalized.

    F_t = Σ over batches of (Σ over their images and classes of √p ∂ log p)² / number of images.
    """
    weights = {}
    for task, state in inputs.states.items():
        model = inputs.model(state)
        names, parameters = zip(*model.named_parameters(), strict=True)
        squares = [torch.zeros_like(parameter) for parameter in parameters]
        for batch in inputs.images[task].split(batch_size):
            total = [torch.zeros_like(parameter) for parameter in parameters]
            for image in batch:
                log_p = inputs.log_p(model, task, image[None])
                found = torch.autograd.grad((log_p.detach().exp().sqrt() * log_p).sum(), parameters)
                total = [a + b for a, b in zip(total, found, strict=True)]
            squares = [square + each**2 for square, each in zip(squares, total, strict=True)]
        of = {name: each / len(inputs.images[task]) for name, each in zip(names, squares, strict=True)}
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in of.values()))
        scale = 1 / (norm + floor) if normalize else 1.0
        weights[task] = {name: scale * (each + floor) for name, each in of.items()}
    return {
        name: sum(weights[task][name] * state[name] for task, state in inputs.states.items())
        / sum(weights[task][name] for task in inputs.states)
        for name in inputs.base
    }
