"""The first samples of a bounded evaluation are the first ones of the data, whatever order they are evaluated in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from fusionlab import ChatTasks
from fusionlab.samplers import FirstSamples, exact_batches


class Ordered:
    """A split whose samples are evaluated from the last to the first."""

    data_version = reading_version = "v"

    def __init__(self, order: torch.Tensor | None) -> None:
        self.evaluation_order = order

    def __len__(self) -> int:
        return 10

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"index": indices}


@pytest.mark.parametrize("ordered", [True, False])
def test_they_are_the_first_of_the_data(ordered: bool) -> None:
    split = FirstSamples(Ordered(torch.arange(9, -1, -1) if ordered else None), 4, "limit_test_batches 2")
    batches = list(exact_batches(split, 2))
    assert [batch["index"].tolist() for batch in batches] == ([[3, 2], [1, 0]] if ordered else [[0, 1], [2, 3]])
    assert split.limited == "limit_test_batches 2: the first 4 of 10 samples"
    assert split.data_version == split.reading_version == ("v:first 4" if ordered else "v:4")


def test_of_conversations_too(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "film " * (20 - place) + ":", "completion": " one"} for place in range(12)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks: list[str | dict[str, Any]] = [{"name": "own", "path": str(tmp_path)}]
    data = ChatTasks(tasks, tokenizer=tokenizer, eval_batch_size=4, cache_dir=str(tmp_path / "cache"))
    data.setup()
    data.trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_test_batches=2
    )
    for world_size in (1, 2):
        ranks = [list(data.eval_batches("own", "test", rank=r, world_size=world_size)) for r in range(world_size)]
        seen = sorted(index for rank in ranks for batch in rank for index in batch["index"].tolist())
        assert seen == list(range(8))
    (batch, *_) = data.eval_batches("own", "test")
    assert batch["index"].tolist() == [7, 6, 5, 4]  # the shortest of them first
