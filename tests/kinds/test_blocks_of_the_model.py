"""Blocks are counted over the model, whatever part is fused: in ``fuse``, in the run, in the sweep, from Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionlab import adapters, rules
from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors, base_state
from fusionlab.backbones import load_backbone
from fusionlab.engine import fuse
from fusionlab.fusion.finetuned import Finetuned
from fusionlab.fusion.making import fuse_weights

ALPHA, BETA = 0.5, 0.6  # two tasks, so alpha is 1/2
LINES = rules.Lines(beta=BETA)


def expected(name: str, depths: dict[str, int]) -> float:
    """alpha + beta l/(L-1), with the number of blocks of each stack written down by hand."""
    for stack, depth in depths.items():
        match = re.match(re.escape(stack) + r"(\d+)\.", name)
        if match:
            return ALPHA + (BETA * int(match[1]) / (depth - 1) if depth > 1 else 0.0)
    return ALPHA


# names of models: their stacks with the number of blocks of each
NAMES = {
    "decoder": (
        {"model.layers.": 6},
        ["model.embed_tokens.weight", "model.layers.{}.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"],
    ),
    "t5": (
        {"encoder.block.": 4, "decoder.block.": 3},
        [
            "shared.weight",
            "encoder.block.{}.layer.0.SelfAttention.q.weight",
            "encoder.block.{}.layer.1.DenseReluDense.wi.weight",
            "decoder.block.{}.layer.0.SelfAttention.q.weight",
            "decoder.block.{}.layer.1.EncDecAttention.v.weight",
            "encoder.final_layer_norm.weight",
        ],
    ),
    "clip": (
        {"vision_model.encoder.layers.": 5, "text_model.encoder.layers.": 3},
        [
            "logit_scale",
            "vision_model.encoder.layers.{}.self_attn.q_proj.weight",
            "text_model.encoder.layers.{}.mlp.fc1.weight",
            "visual_projection.weight",
        ],
    ),
    "open_clip": (
        {"visual.transformer.resblocks.": 4, "transformer.resblocks.": 2},
        ["positional_embedding", "visual.transformer.resblocks.{}.attn.in_proj_weight", "transformer.resblocks.{}.x"],
    ),
    "timm": ({"blocks.": 3}, ["patch_embed.proj.weight", "blocks.{}.attn.qkv.weight", "norm.weight"]),
    "experts": (
        {"model.layers.": 3},
        ["model.layers.{}.mlp.experts.0.w", "model.layers.{}.mlp.experts.7.w", "model.norm.weight"],
    ),
    "one block": ({"h.": 1}, ["h.{}.attn.c_attn.weight", "wte.weight"]),
}


def state_of(model: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    depths, patterns = NAMES[model]
    names = []
    for pattern in patterns:
        stack = pattern.partition("{}")[0]
        names += [pattern.format(number) for number in range(depths[stack])] if "{}" in pattern else [pattern]
    generator = torch.Generator().manual_seed(0)
    return depths, {name: torch.randn(3, 2, generator=generator) for name in names}


# which tensors the task vectors touch
PARTS = {
    "all": lambda name: True,
    "first block": lambda name: not re.search(r"\.[1-9]\.|^[1-9]\.", name),
    "middle": lambda name: re.search(r"(?:layers|block|resblocks|blocks|h)\.[01]\.", name),
    "last block": lambda name: re.search(r"\.2\.", name),
    "outside": lambda name: not re.search(r"\.\d+\.", name),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "under transforms"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", NAMES)
def test_in_memory(model: str, part: str, wrapped: bool) -> None:
    depths, base = state_of(model)
    touched = [name for name in base if PARTS[part](name)] or list(base)[:1]
    generator = torch.Generator().manual_seed(1)
    vectors = {task: {name: torch.randn(3, 2, generator=generator) for name in touched} for task in "ab"}
    rule: Any = rules.Dare(rules.Trim(LINES, density=1.0), drop_rate=0.0) if wrapped else LINES
    fused = fuse(rule, base, vectors).state
    for name in base:
        total = base[name].clone()
        if name in touched:
            total += expected(name, depths) * (vectors["a"][name] + vectors["b"][name])
        torch.testing.assert_close(fused[name], total)
    coefficients = fuse(LINES, base, vectors).scaling_coefficients
    for given in (coefficients[task] for task in "ab"):
        found = given if isinstance(given, dict) else dict.fromkeys(touched, given)
        assert found == {name: pytest.approx(expected(name, depths)) for name in touched}


def test_models_that_lack_or_change_tensors() -> None:
    """Tensors left to the base by ``mismatched_tensors`` count as blocks all the same."""
    depths, base = state_of("decoder")
    short = {name: value + 1 for name, value in base.items() if ".5." not in name}
    other = {name: value[:2] + 1 if ".4." in name else value + 1 for name, value in base.items()}
    fused = fuse(LINES, base, finetuned={"a": short, "b": other}, mismatched_tensors="base").state
    for name in base:
        moved = 0.0 if ".4." in name or ".5." in name else 2 * expected(name, depths)
        torch.testing.assert_close(fused[name] - base[name], torch.full((3, 2), moved))


def adapters_on(base: dict[str, Tensor], modules: list[str], method: str = "lora") -> dict[str, Adapter]:
    made = {}
    for seed, task in enumerate("ab"):
        generator, factors = torch.Generator().manual_seed(seed), {}
        for number, module in enumerate(modules):
            rows, columns = base[f"{module}.weight"].shape
            own = torch.Generator().manual_seed(number) if method == "l_lora" else generator
            lora_a = torch.randn(2, columns, generator=own)
            factors[module] = Factors(lora_a, 0.1 * torch.randn(rows, 2, generator=generator), 4.0)
        made[task] = Adapter(factors, method, "", "same" if method == "l_lora" else "")
    return made


MODULES = {
    "tiny-clip": {"vision_model.encoder.layers.": None, "text_model.encoder.layers.": None},
    "tiny-t5": {"encoder.block.": None, "decoder.block.": None},
}


def real(model: str) -> tuple[Any, dict[str, Tensor], dict[str, int]]:
    backbone = load_backbone(model)
    base = base_state(backbone.model)
    depths = {
        stack: 1 + max(int(name.removeprefix(stack).partition(".")[0]) for name in base if name.startswith(stack))
        for stack in MODULES[model]
    }
    assert min(depths.values()) > 2
    return backbone, base, depths


@pytest.mark.parametrize("blocks", [(0, 1), (1,)], ids=["first two", "second"])
@pytest.mark.parametrize("method", ["lora", "l_lora", "full"])
@pytest.mark.parametrize("model", MODULES)
def test_run_sweep_and_fuse_agree(model: str, method: str, blocks: tuple[int, ...], tmp_path: Path) -> None:
    """Adapters and weights of some blocks of one stack, over real models: one answer, by hand."""
    _, base, depths = real(model)
    stack = next(iter(depths))
    modules = [
        name.removesuffix(".weight")
        for name, value in base.items()
        if value.dim() == 2 and any(name.startswith(f"{stack}{number}.") for number in blocks)
    ]
    finetuned: dict[str, Any] = adapters_on(base, modules, "lora" if method == "full" else method)
    if method == "full":
        finetuned = {
            task: {name: base[name] + value for name, value in each.task_vector().items()}
            for task, each in finetuned.items()
        }
    wanted = {f"{module}.weight": pytest.approx(expected(f"{module}.weight", depths)) for module in modules}
    in_run = fuse_weights(LINES, base, finetuned).scaling_coefficients
    planned = Finetuned(base, finetuned).plan(LINES, ["a", "b"])
    in_sweep = {name: of["a"] for name, of in (planned.coefficients or {}).items()}
    if method == "full":  # the whole files are fused, whose other tensors differ in nothing
        assert {name: in_run["a"][name] for name in wanted} == {name: in_sweep[name] for name in wanted} == wanted
        return
    if len(set(map(expected, wanted, [depths] * len(wanted)))) > 1:
        assert in_run["a"] == in_run["b"] == wanted
    else:
        assert in_run == dict.fromkeys("ab", next(iter(wanted.values())))
    assert in_sweep == wanted
    for task, adapter in finetuned.items():
        adapters.save_adapter(tmp_path / task, adapter)
    recipe = {
        "base": model,
        "finetuned": {task: str(tmp_path / task) for task in "ab"},
        "output": str(tmp_path / "out"),
    }
    recipe["rule"] = {"class_path": "lines", "init_args": {"beta": BETA}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
    stored = json.loads((tmp_path / "out" / "fusion.json").read_text())["scaling_coefficients"]
    assert stored == in_run
    fused = adapters.load_adapter(tmp_path / "out").task_vector()
    for name, coefficient in wanted.items():
        total = expected(name, depths) * sum(each.task_vector()[name] for each in finetuned.values())
        torch.testing.assert_close(fused[name], total, rtol=1e-5, atol=1e-6)
        assert coefficient == in_sweep[name]
