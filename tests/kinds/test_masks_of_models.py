"""Masks of what a model has beside plain matrices: tied weights, running statistics, counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusionlab
from fusionlab.fusion.making import fuse_weights
from fusionlab.layout import MASKS, UNIFIED
from fusionlab.rules import Emr, Tall
from fusionlab.tensors.masked import MaskedVectors

TIED = ("lm_head.weight", "model.embed_tokens.weight")
RULES: dict[str, Any] = {"emr": Emr(), "tall": Tall(0.4)}


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=30, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def tensors_of(vectors: MaskedVectors, task: str, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """θ_t by the formula, from u, bits and s_t."""
    found = {}
    for name in vectors.unified.tensors:
        unified, bits = vectors.unified.read(name).flatten(), vectors.masks.read(name)[vectors.tasks.index(task)]
        kept = [(int(bits[place // 8]) >> (place % 8)) & 1 for place in range(unified.numel())]
        moved = vectors.scales[task] * torch.tensor(kept) * unified
        found[name] = base[name] + moved.view(base[name].shape)
    return found


@pytest.mark.parametrize("stored", ["once", "under both names"])
@pytest.mark.parametrize("name", RULES)
def test_tied_weights_have_one_vector_and_one_mask(name: str, stored: str, tmp_path: Path) -> None:
    """Streamed as in memory; each task's model is tied again, and its norm counts what is tied once."""
    models = {part: llama(seed) for seed, part in enumerate(("base", "a", "b"))}
    for part, model in models.items():
        model.save_pretrained(tmp_path / part)
        if stored != "once":
            file = tmp_path / part / "model.safetensors"
            both = {each: model.state_dict()[each].clone() for each in TIED}
            save_file(load_file(file) | both, file, metadata={"format": "pt"})
    recipe = {
        "base": str(tmp_path / "base"),
        "finetuned": {task: str(tmp_path / task) for task in "ab"},
        "rule": RULES[name],
        "output": str(tmp_path / "out"),
    }
    recipe["rule"] = {"class_path": name, "init_args": {} if name == "emr" else {"mask_threshold": 0.4}}
    fusionlab.fuse_checkpoints(recipe)
    unified, masks = (load_file(tmp_path / "out" / file) for file in (UNIFIED, MASKS))
    assert len(set(unified) & set(TIED)) == 1
    assert set(masks) == set(unified)
    loaded = fusionlab.load(tmp_path / "out").weights
    states = {part: dict(model.named_parameters()) for part, model in models.items()}
    made = fuse_weights(RULES[name], models["base"], {task: states[task] for task in "ab"}).weights
    assert isinstance(made, MaskedVectors)
    assert isinstance(loaded, MaskedVectors)
    assert made.scales == loaded.scales
    base = {each: value.detach() for each, value in states["base"].items()} | {
        TIED[0]: models["base"].lm_head.weight.detach()
    }
    for task in "ab":
        output = tmp_path / f"one-{task}"
        whole = {"base": recipe["base"], "finetuned": {task: str(tmp_path / "out")}, "output": str(output)}
        fusionlab.fuse_checkpoints(whole | {"rule": "average", "save": "weights"})
        again = transformers.LlamaForCausalLM.from_pretrained(output)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        for vectors in (loaded, made):
            for each, value in tensors_of(vectors, task, base).items():
                torch.testing.assert_close(again.state_dict()[each], value, rtol=0, atol=1e-6)
    norm = fuse_weights(RULES[name], models["base"], {task: states[task] for task in "ab"}).norms["a"]
    expected = (
        sum((states["a"][each] - value).detach().double().square().sum() for each, value in states["base"].items())
        ** 0.5
    )
    assert norm == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_running_statistics_are_averaged_for_all_tasks_and_counters_stay(name: str) -> None:
    """They have no mask: a variance stays one, and so it is the same whoever is asked for."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        network[0].weight.data = torch.randn(5, 3)
        network.train()
        for _ in range(seed + 1):
            network(torch.randn(8, 3))
        networks.append(network.eval())
    base, first, second = ({key: value.clone() for key, value in each.state_dict().items()} for each in networks)
    finetuned = {"a": first, "b": second}
    vectors = fusionlab.fuse(RULES[name], base, finetuned=finetuned).weights
    assert isinstance(vectors, MaskedVectors)
    assert not {"1.running_mean", "1.running_var", "1.num_batches_tracked"} & set(vectors.masks.tensors)
    assert "1.num_batches_tracked" not in vectors.unified.tensors
    for task, own in finetuned.items():
        state = fusionlab.weights_of(vectors, task, base)
        for key in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(state[key], (first[key] + second[key]) / 2)  # type: ignore[index]
        assert not torch.allclose(state["1.running_mean"], own["1.running_mean"])  # type: ignore[index]
        assert (state["1.running_var"] > 0).all()  # type: ignore[index]
        assert "0.weight" in vectors.masks.tensors
