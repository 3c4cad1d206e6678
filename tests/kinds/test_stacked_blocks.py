"""Models stacked from ranges of blocks: in our own recipe and by mergekit's slices, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from fusionlab.__main__ import main

DEPTH = 4
KINDS = [
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "full_attention",
]  # of the layers, as config.json lists them
MODELS = ("base", "a", "b")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, tie_word_embeddings=False,
    )  # fmt: skip
    config.layer_types, config.sliding_window = KINDS, 8
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
    return root


def weights(root: Path, name: str) -> dict[str, Tensor]:
    return load_file(root / name / "model.safetensors")


def placed(root: Path, content: Any) -> Any:
    """A recipe with the paths of the models in the place of their names."""
    if isinstance(content, dict):
        return {key: placed(root, each) for key, each in content.items()}
    if isinstance(content, list):
        return [placed(root, each) for each in content]
    return str(root / content) if content in MODELS else content


def run(root: Path, recipe: dict[str, Any], output: Path, *flags: str) -> int:
    output.with_suffix(".yaml").write_text(json.dumps(placed(root, recipe)))
    return main(["fuse", "--config", str(output.with_suffix(".yaml")), "--output", str(output), *flags])


def at(index: int, of: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"model.layers.{index}."
    return {name.removeprefix(start): tensor for name, tensor in of.items() if name.startswith(start)}


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end], "parameters": parameters}


UPSCALED = [("a", 0, 3), ("b", 1, 4)]
OWN = [{"model": model, "layers": [first, end]} for model, first, end in UPSCALED]
PASSTHROUGH = {"merge_method": "passthrough", "slices": [{"sources": [source(*each)]} for each in UPSCALED]}
RECIPES = {
    "mergekit": PASSTHROUGH,
    "own": {"base": OWN, "finetuned": {"stack": OWN}, "rule": "passthrough"},
}


@pytest.mark.parametrize("kind", RECIPES)
def test_upscaling(kind: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, RECIPES[kind], tmp_path / "out", "--dry_run") == 0
    assert "[0:3] + " in capsys.readouterr().out
    assert run(root, RECIPES[kind], tmp_path / "out") == 0
    found, a, b = weights(tmp_path, "out"), weights(root, "a"), weights(root, "b")
    for index, (model, its) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        expected = at(its, model)
        assert expected.keys() == at(index, found).keys()
        assert all(torch.equal(at(index, found)[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], b["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    assert len(found) == 3 + 6 * len(at(0, a))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [KINDS[k] for k in (0, 1, 2, 1, 2, 3)]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(loaded.model.layers) == 6
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_what_a_configuration_says_block_by_block_goes_with_the_blocks(tmp_path: Path) -> None:
    """Which blocks of a SmolLM3 turn their queries and keys: the other ones would be another function."""
    torch.manual_seed(0)
    config = transformers.SmolLM3Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, pad_token_id=0, no_rope_layers=[1, 1, 0, 1],
    )  # fmt: skip
    transformers.SmolLM3ForCausalLM(config).save_pretrained(tmp_path / "a")
    content = json.loads((tmp_path / "a" / "config.json").read_text()) | {"mlp_layer_types": ["a", "b", "c", "d"]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(content))
    given = {"merge_method": "passthrough", "slices": [{"sources": [source("a", 2, 4)]}]}
    assert run(tmp_path, given, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["no_rope_layers"], found["mlp_layer_types"]) == ([0, 1], ["c", "d"])


def test_scales_of_a_slice(root: Path, tmp_path: Path) -> None:
    quiet = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": [0.5, 1.0]}, {"value": 1.0}]
    slices = [{"sources": [source("a", 0, 4)]}, {"sources": [source("a", 1, 4, scale=quiet)]}]
    assert run(root, {"merge_method": "passthrough", "slices": slices}, tmp_path / "out") == 0
    found, a = weights(tmp_path, "out"), weights(root, "a")
    for index in range(DEPTH):
        assert all(torch.equal(at(index, found)[name], tensor) for name, tensor in at(index, a).items())
    for place, its in enumerate((1, 2, 3)):
        expected = at(its, a)
        expected["self_attn.o_proj.weight"] *= 0
        expected["mlp.down_proj.weight"] *= (0.5, 0.75, 1.0)[place]
        assert all(torch.equal(at(DEPTH + place, found)[name], tensor) for name, tensor in expected.items())


def slerped(t: float, first: Tensor, second: Tensor) -> Tensor:
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def test_slerp_of_slices(root: Path, tmp_path: Path) -> None:
    slices = [
        {"sources": [source("a", 0, 3), source("base", 0, 3)], "parameters": {"t": [0.2, 0.8]}},
        {"sources": [source("base", 2, 4), source("a", 1, 3)], "parameters": {"t": [0.3, 0.4]}},
    ]
    assert run(root, {"merge_method": "slerp", "base_model": "base", "slices": slices}, tmp_path / "out") == 0
    found, base, a = weights(tmp_path, "out"), weights(root, "base"), weights(root, "a")
    blocks = [(0, 0, 0.2), (1, 1, 0.5), (2, 2, 0.8), (2, 1, 0.3), (3, 2, 0.4)]
    for index, (of_base, of_a, t) in enumerate(blocks):
        for name, tensor in at(index, found).items():
            expected = slerped(t, at(of_base, base)[name], at(of_a, a)[name])
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    for name, t in (("model.embed_tokens.weight", 0.2), ("model.norm.weight", 0.3), ("lm_head.weight", 0.3)):
        torch.testing.assert_close(found[name], slerped(t, base[name], a[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "ties", "linear", "karcher", "nuslerp"])
def test_one_slice_of_all_layers_is_the_models(method: str, root: Path, tmp_path: Path) -> None:
    names = ["base", "a"] if method == "slerp" else ["a", "b"]
    own = {"weight": [0.2, 0.9]} if method in ("task_arithmetic", "ties", "linear", "nuslerp") else {}
    shared = {"t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.5}]} if method == "slerp" else {}
    given = {"merge_method": method, "parameters": shared}
    if method not in ("linear", "karcher"):
        given["base_model"] = "base"
    models = [{"model": name, "parameters": own} for name in names]
    sources = [source(name, 0, DEPTH, **own) for name in names]
    if method in ("task_arithmetic", "ties", "nuslerp"):
        sources.append(source("base", 0, DEPTH))
    assert run(root, given | {"models": models}, tmp_path / "one") == 0
    assert run(root, given | {"slices": [{"sources": sources}]}, tmp_path / "two") == 0
    one, two = weights(tmp_path, "one"), weights(tmp_path, "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], weights(root, "a")["lm_head.weight"])


def test_task_arithmetic_on_a_shorter_model(root: Path, tmp_path: Path) -> None:
    slices = [{"sources": [source("a", 2, 4, weight=[0.5, 1.0]), source("base", 2, 4)]}]
    given = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices}
    for repeated in ("out", "again"):  # norms that are kept beside whole models are not those of a part
        assert run(root, given, tmp_path / repeated) == 0
        found, base, a = weights(tmp_path, repeated), weights(root, "base"), weights(root, "a")
        for index, weight in enumerate((0.5, 1.0)):
            for name, tensor in at(index, found).items():
                start = at(index + 2, base)[name]
                torch.testing.assert_close(tensor, start + weight * (at(index + 2, a)[name] - start))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


TWO = {"sources": [source("a", 0, 2), source("base", 0, 2)]}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (PASSTHROUGH | {"models": [{"model": "a"}]}, "expected a list of models, or slices with sources, and not both"),
        (PASSTHROUGH | {"slices": [TWO]}, "passthrough takes one source a slice"),
        (PASSTHROUGH | {"slices": [{"sources": [source("a", 2, 9)]}]}, "has 4 blocks, layers [2, 9] were asked for"),
        (PASSTHROUGH | {"slices": [{"sources": [source("a", 2, 2)]}]}, "the sources of slice 1 have [0] layers"),
        (PASSTHROUGH | {"slices": [{"sources": [{"model": "a"}]}]}, "slices.0.sources.0.layer_range is missing"),
        (PASSTHROUGH | {"slices": [{**TWO, "residual_weight": 1.0}]}, "'residual_weight' in slice 1 is not supported"),
        (
            {"merge_method": "slerp", "base_model": "base", "slices": [TWO, {"sources": [source("a", 0, 2)]}]},
            "slerp needs base_model",
        ),
        (
            {"merge_method": "linear", "slices": [TWO, {"sources": [source("b", 0, 2), source("a", 0, 2)]}]},
            "linear merges the same models in every slice",
        ),
        ({"base": OWN, "finetuned": {"s": "a"}, "rule": "passthrough"}, "num_hidden_layers 4 (the base has 6)"),
        ({"base": [{"model": "a"}], "finetuned": {"s": "a"}}, "base: expected {model: PATH, layers: [FIRST, END]}"),
        ({"base": [{"modle": "a"}], "finetuned": {"s": "a"}}, "base: unknown key 'modle'; did you mean 'model'?"),
        ({"base": "a", "finetuned": {"s": []}}, "finetuned.s: expected a path, or a list"),
        (
            {"base": [{"model": "tiny-clip", "layers": [0, 1]}], "finetuned": {"s": "a"}},
            "'tiny-clip' has 2 stacks of blocks, expected one",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_key(
    recipe: dict[str, Any], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, recipe, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_norms_kept_beside_whole_models_are_not_those_of_a_part(root: Path, tmp_path: Path) -> None:
    whole = {"base": "base", "finetuned": {"a": "a", "b": "b"}, "rule": "metagpt"}
    assert run(root, whole, tmp_path / "whole") == 0  # keeps norms beside a and b
    part = {task: [{"model": task, "layers": [1, 2]}] for task in ("base", "a", "b")}
    base = part.pop("base")
    for repeated in ("out", "again"):
        assert run(root, {"base": base, "finetuned": part, "rule": "metagpt"}, tmp_path / repeated) == 0
        found = json.loads((tmp_path / repeated / "fusion.json").read_text())["scaling_coefficients"]
        squares = {}
        for task in ("a", "b"):
            both = weights(root, task), weights(root, "base")
            names = [name for name in both[0] if not name.startswith("model.layers.") or ".layers.1." in name]
            squares[task] = sum(float((both[0][name] - both[1][name]).double().square().sum()) for name in names)
        assert found == {task: pytest.approx(square / sum(squares.values())) for task, square in squares.items()}
    assert run(root, whole, tmp_path / "whole again") == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "whole again"))
    assert one == two
