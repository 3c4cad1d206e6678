"""The order of samples: a pure function of (seed, task, step); evaluation sees every sample exactly once."""

import pytest
import torch
from oracles import training_indices

from fusionlab.samplers import TrainingOrder, derive_seed, evaluation_batches


def stream(num_samples: int, batch_size: int, steps: int, **key) -> list[int]:
    return torch.cat([training_indices(num_samples, batch_size, step, **key) for step in range(steps)]).tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 23])
def test_the_stream_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    whole = stream(10, 1, 60, seed=3, task="mnist")
    assert stream(10, batch_size, 60 // batch_size, seed=3, task="mnist") == whole[: 60 // batch_size * batch_size]


def test_every_sample_comes_once_before_any_comes_again_and_the_second_round_is_shuffled_anew() -> None:
    whole = stream(10, 4, 10, seed=0, task="a")
    rounds = [whole[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(part) == list(range(10)) for part in rounds)
    assert len({tuple(part) for part in rounds}) == 4


def test_seed_and_task_change_the_order() -> None:
    orders = {tuple(stream(50, 50, 1, seed=seed, task=task)) for seed in (0, 1) for task in ("a", "b")}
    assert len(orders) == 4


def test_a_batch_larger_than_the_set_goes_round() -> None:
    assert sorted(stream(3, 9, 1, seed=0, task="a")) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_an_order_gives_the_same_batches_whatever_was_asked_before() -> None:
    order = TrainingOrder(11, 4, seed=5, task="a")
    for step in (7, 0, 3, 2, 9, 0):
        assert order.indices(step).tolist() == training_indices(11, 4, step, seed=5, task="a").tolist()


def test_an_order_draws_one_permutation_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(1) or randperm(*args, **kwargs))
    order = TrainingOrder(100, 10, seed=0, task="a")
    for step in range(30):
        order.indices(step)
    assert len(drawn) == 3


def test_seeds_are_fixed_numbers() -> None:
    assert derive_seed(42, "mnist", 0) == 4345906970797445826
    assert derive_seed("ab", "c") != derive_seed("a", "bc")


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "size"),
    [(10, 4, 1, 4), (9, 4, 3, 3), (3, 8, 2, 3), (16, 4, 5, 4), (160, 128, 2, 80), (1, 4, 1, 1), (0, 4, 2, 0)],
)
def test_ranks_together_see_every_sample_once_in_batches_of_one_shape(
    num_samples: int, batch_size: int, world_size: int, size: int
) -> None:
    seen, padding = [], 0
    for rank in range(world_size):
        for indices, mask in evaluation_batches(num_samples, batch_size, rank=rank, world_size=world_size):
            assert indices.shape == mask.shape == (size,)
            assert indices[~mask].eq(0).all()
            seen += indices[mask].tolist()
            padding += int((~mask).sum())
    assert sorted(seen) == list(range(num_samples))
    batches = -(-num_samples // batch_size)
    assert padding == batches * size - num_samples < max(1, batches)


def test_the_batches_of_many_ranks_are_those_of_one() -> None:
    alone = [indices.tolist() for indices, _ in evaluation_batches(25, 4)]
    dealt = [
        [indices.tolist() for indices, _ in evaluation_batches(25, 4, rank=rank, world_size=3)] for rank in range(3)
    ]
    assert sorted(batch for rank in dealt for batch in rank) == sorted(alone)
    assert dealt[1] == alone[1::3]
