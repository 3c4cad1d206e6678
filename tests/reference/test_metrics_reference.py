"""Spearman and Pearson against scipy and against a loop over pairs, in float64, ties included."""

import math
import random

import pytest
from scipy import stats

from fusionlab.evaluation.functional import pearson, spearman

# both sides work in float64 on at most 500 values of size 1..10; scipy's sums are not exactly rounded
TOLERANCE = 1e-13


def samples(kind, num_samples, seed):
    source = random.Random(seed)
    targets = [source.uniform(0, 5) for _ in range(num_samples)]
    if kind == "ties":
        targets = [round(target * 5) / 5 for target in targets]
    predictions = [round(target + source.gauss(0, 1), 1 if kind == "ties" else 12) for target in targets]
    if kind == "few values":
        predictions = [float(source.choice((0.0, 2.5, 5.0))) for _ in targets]
    return predictions, targets


@pytest.mark.parametrize("num_samples", [3, 17, 500])
@pytest.mark.parametrize("kind", ["distinct", "ties", "few values"])
def test_correlations_equal_scipy(kind, num_samples):
    predictions, targets = samples(kind, num_samples, seed=num_samples)
    assert spearman(predictions, targets) == pytest.approx(stats.spearmanr(predictions, targets)[0], abs=TOLERANCE)
    assert pearson(predictions, targets) == pytest.approx(stats.pearsonr(predictions, targets)[0], abs=TOLERANCE)


def rank_by_counting(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def test_spearman_equals_pearson_of_counted_ranks():
    predictions, targets = samples("ties", 60, seed=5)
    x, y = rank_by_counting(predictions), rank_by_counting(targets)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    norms = math.sqrt(sum((a - mean_x) ** 2 for a in x)) * math.sqrt(sum((b - mean_y) ** 2 for b in y))
    assert spearman(predictions, targets) == pytest.approx(product / norms, abs=TOLERANCE)


def test_spearman_sees_ranks_only():
    predictions, targets = samples("distinct", 40, seed=9)
    assert spearman([math.exp(value) for value in predictions], targets) == spearman(predictions, targets)
