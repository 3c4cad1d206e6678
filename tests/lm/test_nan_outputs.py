"""Models whose outputs are NaN: a defined answer that is wrong, with a count; none in ``predict``."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionlab import CausalModule, ChatTasks
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.backbones.greedy import find_way, greedy
from fusionlab.errors import InputError
from fusionlab.evaluation.metrics import Accuracy

from .test_answers import RANKED, ROWS, loaded
from .test_generating import backbone_of

TASKS: dict[str, tuple[dict[str, Any], str, dict[str, float]]] = {
    "ranked": (RANKED, "wrong", {"accuracy": 0, "near_ties": 0}),
    "generated": ({}, "wrong", {"exact_match": 0}),
    "scores": (
        {"input_columns": ["sentence"], "target_column": "label"},
        "unparsable",
        {"spearman": 0, "pearson": 0, "unparsable": 6},
    ),
}


@pytest.fixture
def broken(causal_folder: Callable[[str], Path]) -> CausalModule:
    module = CausalModule(str(causal_folder("llama")), max_new_tokens=3)
    with torch.no_grad():
        module.base_model.get_input_embeddings().weight.fill_(torch.nan)
    return module


@pytest.mark.parametrize("kind", TASKS)
def test_scores_count_samples_without_an_answer(
    kind: str, broken: CausalModule, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, count_as, expected = TASKS[kind]
    rows = ROWS if task else [{"prompt": f"film {place}:", "completion": " <|endoftext|>"} for place in range(6)]
    data = loaded(tokenizer, tmp_path, rows, task)
    broken.prepare_tasks(data.tasks)
    metrics = broken.metrics("own")
    with torch.no_grad():
        for batch in data.eval_batches("own", "test"):
            broken.score("own", batch, metrics)
    with caplog.at_level(logging.WARNING):
        assert {name: value.item() for name, value in metrics.compute().items()} == expected
    assert f"the model's outputs are NaN for 6 of 6 samples, which count as {count_as}" in caplog.text


@pytest.mark.parametrize("choices", [None, ["yes", "no"]])
def test_predict_has_no_answer_to_write(
    choices: list[str] | None, broken: CausalModule, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "x:", **({"choices": choices} if choices else {})}))
    data = ChatTasks(tokenizer=tokenizer, prompts=str(tmp_path / "asked.jsonl"))
    (batch,) = data.predict_dataloader()
    with torch.no_grad(), pytest.raises(InputError, match=r"outputs are NaN for \{'prompt': 'x:'.*use other weights"):
        broken.predict_step(batch, 0)


def test_a_broken_row_leaves_others_as_they_are(causal_folder: Callable[[str], Path]) -> None:
    module = CausalModule(str(causal_folder("llama")))
    ids, mask = torch.tensor([[40, 41], [50, 51]]), torch.ones(2, 2, dtype=torch.bool)

    def first_is_nan(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        logits = call().clone()
        logits[0, -1, 5] = torch.nan
        return logits

    with torch.no_grad():
        whole = module.backbone.generate(ids, mask, 4, (2,))
        found = module.backbone.generate(ids, mask, 4, (2,), first_is_nan)
    assert found == [None, whole[1]]


def test_a_way_to_answer_is_found_where_only_some_outputs_are_nan(tokenizer: Any) -> None:
    backbone = backbone_of("mamba", tokenizer)
    forward = backbone.model.forward

    @functools.wraps(forward)
    def odd(input_ids: torch.Tensor, **more: Any) -> Any:
        found = forward(input_ids=input_ids, **more)
        found.logits[(input_ids == 5).any(1)] = torch.nan  # which is in the first of the prompts that are tried
        return found

    backbone.model.forward = odd
    assert find_way(backbone.model, len(tokenizer), backbone.sample_tokens.reading) == "alone"


def test_there_is_no_largest_of_nan() -> None:
    scores = torch.tensor([[0.0, torch.nan], [1.0, 1.0], [-torch.inf, -torch.inf], [torch.inf, 0.0]])
    assert lowest_argmax(scores).tolist() == [-1, 0, 0, 0]
    metric = Accuracy()
    metric.update(lowest_argmax(scores), torch.tensor([-1, 0, 0, 1]), torch.tensor([True, True, True, False]))
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_an_answer_that_ended_before_is_one() -> None:
    class Model(torch.nn.Module):
        config = None

        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            self.step = getattr(self, "step", 0) + 1
            logits = torch.zeros(2, 1, 5)
            logits[0, 0, [0, 3, 2][min(self.step, 2)]], logits[1, 0, 4] = 1, 1  # 3, then the end
            if self.step > 2:
                logits[0] = torch.nan
            return type("Out", (), {"logits": logits})

    ids = torch.ones(2, 1, dtype=torch.int64)
    found = greedy(Model(), ids, ids.bool(), 4, (2,), lambda call: call(), cached=False)
    assert found == [[3], [4, 4, 4, 4]]
