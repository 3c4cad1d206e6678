"""Score correlations over two gloo processes: uneven batches, and a process without any."""

import json
import os

import pytest
import ranks
import torch
from torch import distributed

from fusionlab.evaluation.metrics import ScoreCorrelation
from fusionlab.samplers import evaluation_batches


def scores_of(num_samples):
    generator = torch.Generator().manual_seed(3)
    targets = (torch.rand(num_samples, generator=generator) * 5).double()
    predictions = ((targets + torch.randn(num_samples, generator=generator)) * 10).round() / 10
    return predictions, targets, predictions > 5


def measure(num_samples, rank, world_size):
    predictions, targets, unparsable = scores_of(num_samples)
    metric = ScoreCorrelation()
    for index, mask in evaluation_batches(num_samples, 4, rank=rank, world_size=world_size):
        metric.update(predictions[index], targets[index], index, mask, unparsable[index])
    return {name: value.item() for name, value in metric.compute().items()}


def worker(rank, sizes, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    values = [measure(num_samples, rank, 2) for num_samples in sizes]
    (folder / f"{rank}.json").write_text(json.dumps(values))
    distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo's file rendezvous needs a POSIX path")
def test_two_processes_give_the_bits_of_one(tmp_path):
    sizes = [3, 9, 30]  # 1 batch: the second process has none; 3 batches: two and one; 8 batches, the last one padded
    ranks.start(worker, (sizes, tmp_path), 2)
    expected = [measure(num_samples, 0, 1) for num_samples in sizes]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
    assert expected[2]["unparsable"] > 0
