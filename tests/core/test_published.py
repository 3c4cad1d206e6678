"""The published protocol: the released per-point files give the published averages."""

import csv
from pathlib import Path

import pytest

from fusionlab.errors import InputError
from fusionlab.reporting import protocols, share
from fusionlab.reporting.protocols import Denominators, Score
from fusionlab.reporting.published import published_summaries

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
COLUMNS = {"abs_sub": "abs_sub", "abs_all": "abs_all7", "own_sub": "norm_own_sub", "own_all": "norm_own_all7",
           "full_sub": "norm_fft_sub", "full_all": "norm_fft_all7"}  # fmt: skip


def equal(ours: float, published: str) -> bool:
    return abs(ours - float(published)) <= 5e-5


@pytest.mark.skipif(not (REFERENCE / "raw").is_dir(), reason="no released result files in ../shared/reference/raw")
def test_all_published_averages_to_four_decimals() -> None:
    ours = {}
    for item in published_summaries(REFERENCE):
        kind, _, criterion = item.selection.partition(":")
        selection = f"{kind}:{COLUMNS.get(criterion, criterion)}" if criterion else kind
        ours[item.model, item.mode, item.method, str(item.num_tasks), selection] = item
    with (REFERENCE / "peta_published_summary.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["selection"] != "missing"]
    assert len(rows) == 662
    wrong = []
    for row in rows:
        item = ours.pop((row["model"], row["mode"], row["method"], row["n"], row["selection"]))
        assert (item.summary.num_subsets, item.num_rows) == (float(row["n_subsets"]), float(row["n_rows_file"]))
        for criterion, column in COLUMNS.items():
            if not equal(item.summary.mean[criterion], row[column]):
                wrong.append((row, column, item.summary.mean[criterion]))
            if not equal(item.summary.std[criterion], row[f"{column}_std"]):
                wrong.append((row, f"{column}_std", item.summary.std[criterion]))
        if row["mean_scaling_factor"]:
            factors = [candidate[0] for candidate in item.summary.candidates.values()]
            assert equal(sum(factors) / len(factors), row["mean_scaling_factor"])
    assert wrong == []
    assert not ours, sorted(ours)


SCORES = [
    Score(("a", "b"), (0.5,), {"a": 0.4, "b": 0.6, "c": 0.0}),
    Score(("a", "b"), (1.0,), {"a": 0.7, "b": 0.3, "c": 0.9}),
    Score(("a", "c"), (0.5,), {"a": 0.2, "b": 0.1, "c": 0.2}),
    Score(("a", "c"), (1.0,), {"a": 0.1, "b": 0.1, "c": 0.5}),
    Score(("a", "c"), (1.5,), {"a": 1.0, "b": 1.0, "c": 1.0}),
]
KNOWN = Denominators(("a", "b", "c"), {"a": 1.0, "b": 0.5, "c": 1.0})


def test_best_of_each_subset_and_best_of_all() -> None:
    each = protocols.per_subset_best(SCORES, KNOWN, "abs_sub")
    assert each.candidates == {("a", "b"): (0.5,), ("a", "c"): (1.5,)}  # the first of equals; any candidate
    assert each.mean["abs_sub"] == pytest.approx((0.5 + 1.0) / 2)
    one = protocols.common_best(SCORES, KNOWN, "abs_all")
    assert set(one.candidates.values()) == {(1.0,)}  # 1.5 is not common
    assert one.mean["own_sub"] == pytest.approx(((0.7 + 0.6) / 2 + (0.1 + 0.5) / 2) / 2)
    assert one.num_common == 2


@pytest.mark.parametrize("single", [0.0, -0.5])
def test_a_single_task_score_that_is_not_positive_has_no_shares(single: float) -> None:
    known = Denominators(("a", "b", "c"), {"a": 1.0, "b": 0.5, "c": single}, {"a": 1.0, "b": single, "c": 1.0})
    found = protocols.measure(SCORES[0], known)
    assert found == {"abs_sub": 0.5, "abs_all": pytest.approx(1 / 3), "own_sub": pytest.approx((0.4 + 1.2) / 2)}
    assert share(0.3, single) is None
    assert share(-0.3, 0.5) == pytest.approx(-0.6)


def test_choosing_by_shares_that_do_not_exist() -> None:
    known = Denominators(("a", "b", "c"), {"a": 1.0, "b": 0.5, "c": 0.0})
    with pytest.raises(InputError, match=r"own_sub does not exist for the tasks a, c: .* choose by abs_sub"):
        protocols.per_subset_best(SCORES, known, "own_sub")
    found = protocols.fixed(SCORES, known, (0.5,))
    assert set(found.mean) == {"abs_sub", "abs_all"}  # the one subset without c has own_sub, the other has not
    assert set(protocols.fixed(SCORES[::-1], known, (0.5,)).mean) == set(found.mean)


def test_a_candidate_that_a_subset_lacks_has_no_summary() -> None:
    assert protocols.fixed(SCORES, KNOWN, (1.5,)) is None
    assert protocols.fixed(SCORES, KNOWN, (0.50001,)).mean["abs_all"] == pytest.approx((1 / 3 + 0.5 / 3) / 2)


def test_no_released_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no MODEL/single_task.csv"):
        published_summaries(tmp_path)
