"""WEMoE on language models and T5: a sample's prompt decides its weights, whatever is padded, ranked or generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionlab import CausalModule, ChatTasks
from fusionlab.adapters import base_state
from fusionlab.adapters.routed import RoutedWeights
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.errors import InputError
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.modules import T5Module
from fusionlab.rules.routed import RoutedMlp, RoutedMlps, Router
from fusionlab.search import ValidationProblem, Wemoe, check_data
from fusionlab.search.mlps import mlps_of

LAYERS = {"llama": 3, "gpt2": 2, "phi3": 2}  # of an MLP
WORDS = ["positive", "negative", "not"]


def moved(base: dict[str, Tensor], tasks: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return {
        task: {
            name: value + 0.05 * torch.randn(value.shape, generator=draws) if value.dim() > 1 else value
            for name, value in base.items()
        }
        for task in tasks
    }


def routed_model(module: Any, tasks: tuple[str, ...] = ("one", "other")) -> RoutedWeights:
    """With routers that differ much between samples."""
    states = moved({name: value.clone() for name, value in base_state(module.base_model).items()}, tasks)
    linear = [name.removesuffix(".weight") for name in next(iter(states.values()))]
    draws, found = torch.Generator().manual_seed(2), {}
    for name, mlp in mlps_of(module.base_model, linear).items():
        tensors = Router.constant(0.3, len(tasks), mlp.width).tensors
        router = Router.of({part: each + torch.randn(each.shape, generator=draws) for part, each in tensors.items()})
        found[name] = RoutedMlp(mlp.layers, router)
    finetuned = Finetuned(module, states)
    weights = finetuned.make(finetuned.plan(RoutedMlps.of(0.3, found, tasks), tasks))
    assert isinstance(weights, RoutedWeights)
    return weights


def prompts_of(module: CausalModule, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Padded on the left."""
    rows = [module.backbone.tokenizer(text).input_ids for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[7] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "phi3"))])
@torch.no_grad()
def test_a_causal_models_sample_is_its_prompt(kind: str, causal_folder: Callable[[str], Path]) -> None:
    """Alone or padded in a batch, with more words ranked beside one or not, with a cache or without."""
    module = CausalModule(str(causal_folder(kind))).eval()
    backbone, weights = module.backbone, routed_model(module)
    assert {len(mlp.layers) for mlp in weights.mlps.values()} == {LAYERS[kind]}
    texts = ["film", "a film one two three:", "no no no no no four"]
    ids, mask = prompts_of(module, texts)
    answers = [tuple(backbone.tokenizer(word).input_ids) for word in WORDS]
    tree, fewer = AnswerTree.of(answers), AnswerTree.of(answers[:1])
    plain = backbone.log_likelihoods(ids, mask, tree)
    with module.use(weights):
        together = backbone.log_likelihoods(ids, mask, tree)
        cached, uncached = (backbone.generate(ids, mask, 6, [2], cached=cached) for cached in (True, False))
        for row, text in enumerate(texts):
            one = prompts_of(module, [text])
            alone = backbone.log_likelihoods(*one, tree)
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-3)
            torch.testing.assert_close(
                backbone.log_likelihoods(*one, fewer)[0, 0], alone[0, 0][: fewer.lengths[0]], rtol=0, atol=2e-3
            )
            assert backbone.generate(*one, 6, [2]) == [cached[row]]
            apart = backbone._apart(*one, tree, lambda call: call())
            torch.testing.assert_close(apart[0], alone[0], rtol=0, atol=2e-3)
    assert cached == uncached
    assert (together - plain).abs().max() > 0.05
    with (
        module.use(weights),
        pytest.raises(InputError, match="chosen by each sample's prompt, and what is run here has"),
    ):
        module.loss("tale", {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("kind", ["tied", "untied"])
@torch.no_grad()
def test_t5s_sample_is_its_text(kind: str, t5_folder: Callable[[str], Path]) -> None:
    """Two matrices and three; padding is left out, and words beside a word, and what was generated before."""
    module = T5Module(str(t5_folder(kind))).eval()
    backbone, weights = module.backbone, routed_model(module)
    assert {len(mlp.layers) for mlp in weights.mlps.values()} == {2 if kind == "tied" else 3}
    texts = ["the sentence is good", "a", "not positive: is the sentence bad? the a the a is not good"]
    batch = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch.input_ids, batch.attention_mask
    every, first = backbone.answers(WORDS, "task"), backbone.answers(WORDS[:1], "task")
    plain = backbone.log_likelihoods(ids, mask, every)
    with module.use(weights):
        together = backbone.log_likelihoods(ids, mask, every)
        for row, text in enumerate(texts):
            own = backbone.tokenizer([text], return_tensors="pt")
            alone = backbone.log_likelihoods(own.input_ids, own.attention_mask, every)
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4)
            lone = backbone.log_likelihoods(own.input_ids, own.attention_mask, first)
            torch.testing.assert_close(lone[0, 0], alone[0, 0], rtol=0, atol=1e-4)
        by_cache = backbone.decode(backbone.generate(ids, mask, 5))
        by_logits = backbone.decode(backbone.generate_by_logits(ids, mask, 5, lambda call: call()))
    assert by_cache == by_logits
    assert (together - plain).abs().max() > 0.05


def test_experts_are_left_alone(causal_folder: Callable[[str], Path]) -> None:
    module = CausalModule(str(causal_folder("mixtral")))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp, model\.layers\.1\.mlp choose among experts"):
        routed_model(module)


def test_ranked_tasks_are_searched_and_others_refused(causal_folder: Callable[[str], Path], tmp_path: Path) -> None:
    rows = {
        "mood": [{"text": f"a film {'x ' * (i % 4)}{i}", "label": i % 2} for i in range(40)],
        "side": [{"text": f"{i} is it?", "label": i % 2} for i in range(40)],
        "count": [{"prompt": f"film {i}:", "completion": " one two"} for i in range(40)],
    }
    for name, of_task in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    ranked = {"input_columns": ["text"], "label_words": ["positive", "negative"]}
    tasks: list[dict[str, Any]] = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in rows]
    module = CausalModule(str(causal_folder("llama")))

    def data_of(some: list[dict[str, Any]]) -> ChatTasks:
        data = ChatTasks(some, tokenizer=module.backbone.tokenizer, cache_dir=str(tmp_path / "cache"))
        data.setup()
        return data

    data = data_of([each | ranked for each in tasks[:2]])
    module.prepare_tasks(data.tasks)
    base = {name: value.clone() for name, value in base_state(module.base_model).items()}
    finetuned = Finetuned(module, moved(base, ("mood", "side")))
    problem = ValidationProblem(finetuned.tasks, finetuned, module, data, lambda rules: [])
    search = Wemoe(num_steps=2, batch_size=3, learning_rate=0.1)
    found, again = search.search(problem), search.search(problem)
    assert found.rule == again.rule
    assert found.num_samples == 12
    assert problem.training.cost == pytest.approx(2 * 6 * (1 / 32 + 1 / 32) / 2, rel=0.5)  # of about 32 samples each
    with pytest.raises(InputError, match="rules wemoe need tasks with classes or label words, and count has a score"):
        check_data({"wemoe": search}, data_of([tasks[0] | ranked, tasks[2]]))
