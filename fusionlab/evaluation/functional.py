"""What metrics compute, as plain functions of counts and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def share(count: int, total: int) -> float:
    """count / total.

    Example:
        >>> share(1, 4)
        0.25
    """
    return count / total


def perplexity(losses: Sequence[float], num_tokens: int) -> float:
    """exp(Σ losses / num_tokens) with an exactly rounded sum, at most exp(700), which float64 holds.

    Args:
        losses: −Σ log p of each sample's learnt tokens; NaN is no better than infinite.
        num_tokens: learnt tokens of all samples.

    Example:
        >>> round(perplexity([2.0, 4.0], 3), 4)
        7.3891
    """
    if not all(map(math.isfinite, losses)):
        return math.exp(700.0)
    return math.exp(min(700.0, math.fsum(losses) / num_tokens))


def standard_error(score: float, num_samples: int) -> float:
    """√(p(1 − p)/n) of a share p of n samples.

    Example:
        >>> standard_error(0.5, 100)
        0.05
    """
    return math.sqrt(score * (1 - score) / num_samples)


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²), in float64 with exactly rounded sums; 0 where either is constant.

    Example:
        >>> pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        1.0
        >>> pearson([1.0, 1.0], [0.0, 5.0])
        0.0
    """
    first, second = _centred(first), _centred(second)
    norms = [math.fsum(value * value for value in values) for values in (first, second)]
    if 0.0 in norms:
        return 0.0
    product = math.fsum(x * y for x, y in zip(first, second, strict=True))
    return min(1.0, max(-1.0, product / math.sqrt(norms[0] * norms[1])))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, tied values sharing their mean rank; 0 where either is constant.

    Example:
        >>> spearman([1.0, 2.0, 30.0], [2.0, 4.0, 6.0])
        1.0
    """
    return pearson(_ranks(first), _ranks(second))


def parse_score(text: str) -> float | None:
    """The number that ``text`` is, as Python reads it; None where it is none, or not finite.

    Example:
        >>> parse_score(" 3.8"), parse_score("nan"), parse_score("three")
        (3.8, None, None)
    """
    try:
        score = float(text)
    except ValueError:
        return None
    return score if math.isfinite(score) else None


def _centred(values: Sequence[float]) -> list[float]:
    """Values minus their mean, scaled by a power of two against overflow; zeros where all are equal."""
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    exponent = math.frexp(max(map(abs, values)))[1]
    values = [math.ldexp(value, -exponent) for value in values]
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; ties share the mean of theirs."""
    _, group, counts = torch.unique(torch.tensor(values, dtype=torch.float64), return_inverse=True, return_counts=True)
    means = counts.double().cumsum(0) - (counts.double() + 1) / 2
    ranks: list[float] = means[group].tolist()
    return ranks
