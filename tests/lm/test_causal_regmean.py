"""RegMean and RegMean++ on language models: transposed layers, experts, tied heads, and prompts without padding."""

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
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.search import Regmean, RegmeanPlusPlus, Search, ValidationProblem

LAYERS = {"llama": 7, "gpt2": 4, "phi3": 4, "mixtral": 4}  # of a block


def made(folder: Path, root: Path, **options: Any) -> tuple[CausalModule, ChatTasks, dict[str, dict[str, Tensor]]]:
    """A model, prompts of many lengths beside whole texts, and full weights as if trained."""
    prompts = [{"prompt": f"film {'x ' * (i % 5)}{i}:", "completion": " one two"} for i in range(40)]
    rows = {"count": prompts, "tale": [{"text": f"one or two film {i}"} for i in range(40)]}
    for name, of_task in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    module = CausalModule(str(folder))
    tasks = [{"name": name, "path": str(root / f"{name}.jsonl")} for name in rows]
    data = ChatTasks(tasks, tokenizer=module.backbone.tokenizer, cache_dir=str(root / "cache"), **options)
    data.setup()
    module.prepare_tasks(data.tasks)
    generator = torch.Generator().manual_seed(1)
    base = base_state(module.base_model)
    states = {
        task: {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for task in rows
    }
    return module, data, states


@pytest.mark.parametrize(
    "kind", [kind if kind == "gpt2" else pytest.param(kind, marks=pytest.mark.slow) for kind in LAYERS]
)
def test_every_kind_of_model(kind: str, causal_folder: Callable[[str], Path], tmp_path: Path) -> None:
    module, data, states = made(causal_folder(kind), tmp_path)
    finetuned = Finetuned(module, states)
    searches: list[Search] = [Regmean(num_samples=4), RegmeanPlusPlus(num_samples=4)]
    for search in searches:
        problem = ValidationProblem(tuple(states), finetuned, module, data, lambda rules: [])
        found = search.search(problem)
        names = set(found.rule.layers)  # type: ignore[attr-defined]
        head = {"lm_head.weight"} & set(base_state(module.base_model))  # where it is not the embeddings'
        assert len(names - head) == 2 * LAYERS[kind]
        assert head <= names
        assert {layer.transposed for layer in found.rule.layers.values()} == {kind == "gpt2"} | (
            {False} if head else set()
        )  # type: ignore[attr-defined]
        model = finetuned.make(finetuned.plan(found.rule, finetuned.tasks))
        assert all(value.isfinite().all() for value in model.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_are_read_alone_and_without_padding(
    packing: bool, causal_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    module, data, states = made(causal_folder("llama"), tmp_path, packing=packing, max_length=96)
    finetuned = Finetuned(module, states)
    runs = ValidationProblem(tuple(states), finetuned, module, data, lambda rules: []).training
    shapes: list[Tensor] = []
    logits = module.backbone.logits
    module.backbone.logits = lambda ids, *rest: (shapes.append(ids), logits(ids, *rest))[1]  # type: ignore[method-assign]
    grams = runs.expert_grams("count", 10)
    assert all(len(ids) == 1 and (ids != 0).all() for ids in shapes)
    assert len({ids.shape[1] for ids in shapes}) > 1
    texts = [module.backbone.tokenizer.decode(ids[0]) for ids in shapes]
    assert all(text.rstrip().endswith(":") for text in texts), texts
    name, read = "model.layers.1.mlp.up_proj", []
    layer = module.base_model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    longest = max(ids.shape[1] for ids in shapes)
    padded = torch.cat([torch.nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in shapes])
    with torch.no_grad(), module.use(states["count"]):
        logits(padded)
    handle.remove()
    kept = torch.arange(longest) < torch.tensor([[ids.shape[1]] for ids in shapes])
    rows = read[0][kept].double()
    torch.testing.assert_close(grams[f"{name}.weight"][0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
