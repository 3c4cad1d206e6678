"""Score correlations: the published conventions, padding, order and repeats."""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from fusionlab.evaluation.functional import parse_score, pearson, spearman
from fusionlab.evaluation.metrics import ScoreCorrelation


def filled(scores, targets, batches, first="spearman"):
    """A metric over ``batches`` of sample indices; index -1 is padding."""
    metric = ScoreCorrelation(first)
    for indices in batches:
        mask = torch.tensor([index >= 0 for index in indices])
        rows = torch.tensor(indices).clamp(min=0)
        metric.update(scores[rows], targets[rows], rows, mask, scores[rows].isnan())
    return {name: value.item() for name, value in metric.compute().items()}


def random_scores(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(num_samples, generator=generator) * 5).double()
    return (targets + torch.randn(num_samples, generator=generator)).mul(10).round() / 10, targets


def test_any_order_of_batches_gives_the_same_bits():
    scores, targets = random_scores(103)
    whole = filled(scores, targets, [list(range(103))])
    order = torch.randperm(103, generator=torch.Generator().manual_seed(1)).tolist()
    assert filled(scores, targets, [order[:50], order[50:51], order[51:]]) == whole


def test_padding_does_not_count():
    scores, targets = random_scores(7)
    scores[0] = math.nan  # index 0 is what batches are padded with; unparsable padding must not be counted either
    padded = filled(scores, targets, [[0, 1, 2, 3], [4, 5, 6, -1]])
    assert padded == filled(scores, targets, [list(range(7))])
    assert padded["unparsable"] == 1


def test_unparsable_answers_count_as_score_zero():
    scores, targets = random_scores(20)
    zeroed = scores.clone()
    zeroed[[3, 11]] = 0.0
    scores[[3, 11]] = math.nan
    values = filled(scores, targets, [list(range(20))])
    expected = filled(zeroed, targets, [list(range(20))])
    assert values == {**expected, "unparsable": 2.0}
    assert expected["unparsable"] == 0


@pytest.mark.parametrize("scores", [[2.5] * 6, [math.nan] * 6, [0.1] * 6])
def test_constant_answers_score_zero_not_nan(scores):
    values = filled(torch.tensor(scores).double(), torch.arange(6.0), [list(range(6))])
    assert values["spearman"] == values["pearson"] == 0.0


def test_a_repeated_sample_is_a_fault():
    scores, targets = random_scores(5)
    with pytest.raises(RuntimeError, match="counted twice"):
        filled(scores, targets, [[0, 1, 2], [3, 1, 4]])


@pytest.mark.parametrize("first", ["spearman", "pearson"])
def test_the_tasks_metric_comes_first_and_a_collection_flattens(first):
    metrics = MetricCollection({first: ScoreCorrelation(first)})
    index = torch.arange(3)
    metrics.update(torch.tensor([1.0, 2.0, 4.0]), index.float(), index, index >= 0, index < 0)
    values = metrics.compute()
    assert list(values) == [first, *({"spearman", "pearson"} - {first}), "unparsable"]
    assert values["spearman"].item() == 1.0


def test_reset_forgets():
    metric, index = ScoreCorrelation(), torch.arange(4)
    metric.update(index.float(), index.float().flip(0), index, index >= 0, index == 2)
    metric.reset()
    metric.update(index.float(), index.float(), index, index >= 0, index < 0)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "spearman": 1.0, "pearson": 1.0, "unparsable": 0.0
    }  # fmt: skip


def test_huge_scores_do_not_overflow():
    assert pearson([1e308, -1e308, 0.0], [1.0, -1.0, 0.0]) == pytest.approx(1.0, abs=1e-15)
    assert spearman([1e308, -1e308, 1e-308], [1.0, -1.0, 0.0]) == 1.0


@pytest.mark.parametrize("text", ["", " ", "nan", "inf", "-Infinity", "4.0.", "3,8", "five", "5.0 5.0", "1" * 400])
def test_what_is_no_number_is_unparsable(text):
    assert parse_score(text) is None


@pytest.mark.parametrize(("text", "score"), [("3.8", 3.8), (" 5.0 ", 5.0), ("-1.0", -1.0), (".5", 0.5), ("4", 4.0)])
def test_numbers_are_read(text, score):
    assert parse_score(text) == score
