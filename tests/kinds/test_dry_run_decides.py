"""What ``fuse --dry_run`` passes then works, and what it refuses the run refuses with the same message.

Bad and good bases, inputs and flags alone and in drawn combinations. Only what values tell may differ (NaN and Inf,
norms of zero), and the dry run lists it as not yet checked. Every refusal is exit code 2 and one message.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from often import often
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fusionlab.__main__ import main

WEIGHTS, ADAPTER, PEFT = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab29\nsize 12345\n"
TENSOR = "model.layers.0.mlp.up_proj.weight"
VALUES = r"NaN or Inf|is zero|are zero|all zero"  # what a run may refuse that its dry run passes
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, the full models ``full`` and ``more``, the adapters ``lora`` and ``second``."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    (folder / "base" / "LICENSE").write_text("free\n")
    state = load_file(folder / "base" / WEIGHTS)
    for name in ("full", "more"):
        shutil.copytree(folder / "base", folder / name)
        moved = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in state.items()}
        save_file(moved, folder / name / WEIGHTS, metadata={"format": "pt"})
    for name in ("lora", "second"):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(model, settings).save_pretrained(folder / name)
        edit(folder / name / PEFT, base_model_name_or_path=None)
    return folder


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def write(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return change


def state(change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> Change:
    """Other tensors in a file."""

    def apply(folder: Path) -> None:
        found = load_file(folder / file)
        changed = change(found)
        save_file(found if changed is None else changed, folder / file, metadata={"format": "pt"})

    return apply


def pickled(content: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> Change:
    def apply(folder: Path) -> None:
        name = "adapter_model.bin" if file == ADAPTER else "pytorch_model.bin"
        torch.save(content(load_file(folder / file)), folder / name)
        (folder / file).unlink()

    return apply


def fields(name: str, **values: Any) -> Change:
    return lambda folder: edit(folder / name, **values)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.__setitem__(key, value)


def dangling(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / "blobs" / "gone")

    return change


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def shards(change: Callable[[dict[str, str]], Any]) -> Change:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        weight_map = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        changed = change(weight_map)
        edit(folder / "model.safetensors.index.json", weight_map=weight_map if changed is None else changed)

    return apply


def as_index(value: Any) -> Change:
    return shards(lambda weight_map: value)


def cast(dtype: torch.dtype) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {key: value.to(dtype) for key, value in found.items()}


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-7])


MODEL: dict[str, Change] = {
    "as it is": lambda folder: None,
    "weights: a pointer": write(WEIGHTS, POINTER),
    "weights: nothing": write(WEIGHTS, b""),
    "weights: a page": write(WEIGHTS, b"<html>"),
    "weights: truncated": truncated,
    "weights: a folder": a_folder(WEIGHTS),
    "weights: none": removed(WEIGHTS),
    "weights: a pruned blob": dangling(WEIGHTS),
    "weights: float8": state(cast(torch.float8_e4m3fn)),
    "weights: one in float8": state(lambda found: put(TENSOR, found[TENSOR].to(torch.float8_e5m2))(found)),
    "weights: complex": state(lambda found: put(TENSOR, found[TENSOR].to(torch.complex64))(found)),
    "weights: bfloat16": state(cast(torch.bfloat16)),
    "weights: float64": state(cast(torch.float64)),
    "weights: integers": state(lambda found: put(TENSOR, (found[TENSOR] * 100).to(torch.int8))(found)),
    "weights: no tensors": state(lambda found: {}),
    "weights: one missing": state(lambda found: {key: value for key, value in found.items() if key != TENSOR}),
    "weights: one more": state(put("extra.weight", torch.ones(3, 3))),
    "weights: an empty one": state(put("extra.weight", torch.ones(0, 3))),
    "weights: a scalar": state(put("logit_scale", torch.tensor(2.5))),
    "weights: a counter": state(put("steps", torch.tensor(7))),
    "weights: a mask": state(put("mask", torch.full((4, 4), -torch.inf).triu(1))),
    "weights: another shape": state(put(TENSOR, torch.ones(24, 15))),
    "weights: another rank": state(put(TENSOR, torch.ones(24, 16, 1))),
    "weights: prefixed": state(lambda found: {f"inner.{key}": value for key, value in found.items()}),
    "weights: fewer rows": state(lambda found: put("lm_head.weight", torch.ones(30, 16))(found)),
    "bin": pickled(lambda found: found),
    "bin: a list": pickled(lambda found: list(found.values())),
    "bin: nested": pickled(lambda found: {"state_dict": found}),
    "bin: an object": pickled(lambda found: {"config": Path("x"), **found}),
    "bin: sparse": pickled(lambda found: {**found, TENSOR: found[TENSOR].to_sparse()}),
    "bin: number names": pickled(lambda found: dict(enumerate(found.values()))),
    "bin: empty": pickled(lambda found: {}),
    "shards": shards(lambda weight_map: None),
    "index: no map": as_index(None),
    "index: a list": as_index([1]),
    "index: empty": as_index({}),
    "index: a gone shard": shards(lambda weight_map: dict.fromkeys(weight_map, "b.safetensors")),
    "index: outside": shards(lambda weight_map: dict.fromkeys(weight_map, "../a.safetensors")),
    "index: one name more": shards(lambda weight_map: {**weight_map, "x": "a.safetensors"}),
    "config: none": removed("config.json"),
    "config: a pointer": write("config.json", POINTER),
    "config: a list": write("config.json", b"[]"),
    "config: half": write("config.json", b'{"model_type": '),
    "config: empty": write("config.json", b"{}"),
    "config: a folder": a_folder("config.json"),
    "config: unknown type": fields("config.json", model_type="never_heard_of"),
    "config: unknown type and class": fields("config.json", model_type="nope", architectures=["NopeForCausalLM"]),
    "config: type null": fields("config.json", model_type=None),
    "config: type with a path": fields("config.json", model_type="../../etc"),
    "config: classes null": fields("config.json", architectures=None),
    "config: no classes": fields("config.json", architectures=[]),
    "config: a class of another kind": fields("config.json", architectures=["ViTForImageClassification"]),
    "config: a class that is no name": fields("config.json", architectures=["not a class"]),
    "config: a class that is no model": fields("config.json", architectures=["LlamaConfig"]),
    "config: size null": fields("config.json", hidden_size=None),
    "config: size of text": fields("config.json", hidden_size="16"),
    "config: heads that do not divide": fields("config.json", num_attention_heads=3),
    "config: no heads": fields("config.json", num_attention_heads=0),
    "config: tied": fields("config.json", tie_word_embeddings=True),
    "config: tied null": fields("config.json", tie_word_embeddings=None),
    "config: vocabulary of text": fields("config.json", vocab_size="many"),
    "config: a part that is a list": fields("config.json", text_config=[1]),
    "config: code that is gone": fields(
        "config.json", architectures=["Own"], auto_map={"AutoModelForCausalLM": "modeling_own.Own"}
    ),
    "config: a map that is a list": fields("config.json", auto_map=["a.b"]),
    "config: a map to null": fields("config.json", auto_map={"AutoConfig": None, "AutoModel": None}),
    "config: named weights": fields("config.json", transformers_weights="other.safetensors"),
    "config: named weights outside": fields("config.json", transformers_weights="../base/model.safetensors"),
    "config: quantized": fields("config.json", quantization_config={"quant_method": "gptq"}),
    "config: quantized null": fields("config.json", quantization_config=None),
    "tokenizer: broken": write("tokenizer.json", b"{"),
    "tokenizer: a list": write("tokenizer.json", b"[1]"),
    "tokenizer: a vocabulary of numbers": write("tokenizer.json", b'{"model": {"vocab": 3}}'),
    "tokenizer: tokens null": write("tokenizer.json", b'{"model": {"vocab": {"a": 1}}, "added_tokens": [{}]}'),
    "tokenizer: a pruned blob": dangling("tokenizer.json"),
    "generation: broken": write("generation_config.json", b"{"),
    "modules: outside": write("modules.json", b'[{"path": "../../x", "type": "sentence_transformers.models.Dense"}]'),
    "modules: broken": write("modules.json", b"["),
    "modules: of numbers": write("modules.json", b'[{"path": 3}]'),
    "beside: a pruned blob": dangling("chat_template.jinja"),
    "beside: a folder": a_folder("original"),
    "beside: statistics that are broken": write("fusion_stats.json", b"{"),
    "beside: statistics that are a folder": a_folder("fusion_stats.json"),
    "beside: a record that is broken": write("fusion.json", b"{"),
    "beside: an own record of numbers": write("fusionlab.json", b'{"method": 3}'),
    "code that raises": lambda folder: [
        write("modeling_own.py", b"raise RuntimeError\nclass Own(:\n")(folder),
        edit(folder / "config.json", architectures=["Own"], auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
    ],
    "code that is no text": lambda folder: [
        write("modeling_own.py", b"\xff\xfe\x00class")(folder),
        edit(folder / "config.json", architectures=["Own"], auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
    ],
    "values: NaN": state(lambda found: found[TENSOR].__setitem__((0, 0), torch.nan)),
    "values: Inf": state(lambda found: found[TENSOR].__setitem__((0, 0), torch.inf)),
    "values: zero": state(lambda found: {key: torch.zeros_like(value) for key, value in found.items()}),
    "values: huge": state(lambda found: {key: value * 1e38 for key, value in found.items()}),
}
FACTOR = f"base_model.model.{TENSOR.removesuffix('.weight')}.lora_A.weight"
PEFT_FILE: dict[str, Change] = {
    "as it is": lambda folder: None,
    "weights: a pointer": write(ADAPTER, POINTER),
    "weights: nothing": write(ADAPTER, b""),
    "weights: none": removed(ADAPTER),
    "weights: a pruned blob": dangling(ADAPTER),
    "weights: no tensors": state(lambda found: {}, ADAPTER),
    "weights: float8": state(cast(torch.float8_e4m3fn), ADAPTER),
    "weights: float16": state(cast(torch.float16), ADAPTER),
    "weights: integers": state(cast(torch.int32), ADAPTER),
    "weights: one half": state(lambda found: {key: value for key, value in found.items() if key != FACTOR}, ADAPTER),
    "weights: another rank": state(put(FACTOR, torch.ones(3, 16)), ADAPTER),
    "weights: narrower": state(put(FACTOR, torch.ones(2, 15)), ADAPTER),
    "weights: of no layer": state(
        lambda found: {key.replace("layers.0", "layers.9"): value for key, value in found.items()}, ADAPTER
    ),
    "weights: an embedding beside": state(put("base_model.model.lm_head.weight", torch.ones(32, 16)), ADAPTER),
    "weights: a resized one beside": state(put("base_model.model.lm_head.weight", torch.ones(40, 16)), ADAPTER),
    "weights: a magnitude": state(put(FACTOR.replace("lora_A", "lora_magnitude_vector"), torch.ones(24)), ADAPTER),
    "bin": pickled(lambda found: found, ADAPTER),
    "bin: empty": pickled(lambda found: {}, ADAPTER),
    "bin: a list": pickled(lambda found: [1], ADAPTER),
    "bin: sparse": pickled(lambda found: {key: value.to_sparse() for key, value in found.items()}, ADAPTER),
    "config: a pointer": write(PEFT, POINTER),
    "config: empty": write(PEFT, b"{}"),
    "config: null": write(PEFT, b"null"),
    "config: rank null": fields(PEFT, r=None),
    "config: rank of text": fields(PEFT, r="2"),
    "config: rank zero": fields(PEFT, r=0),
    "config: alpha NaN": fields(PEFT, lora_alpha=float("nan")),
    "config: alpha huge": fields(PEFT, lora_alpha=1e300),
    "config: alpha zero": fields(PEFT, lora_alpha=0),
    "config: a pattern that is none": fields(PEFT, rank_pattern={"(": 2}),
    "config: a pattern of text": fields(PEFT, alpha_pattern={"q_proj": "8"}),
    "config: targets that are no pattern": fields(PEFT, target_modules="(q_proj"),
    "config: targets null": fields(PEFT, target_modules=None),
    "config: base of a number": fields(PEFT, base_model_name_or_path=3),
    "config: base gone": fields(PEFT, base_model_name_or_path="/gone"),
    "config: base is an adapter": fields(PEFT, base_model_name_or_path="second"),
    "config: base is empty text": fields(PEFT, base_model_name_or_path=""),
    "config: base is other": fields(PEFT, base_model_name_or_path="full"),
    "config: of another kind": fields(PEFT, peft_type="IA3"),
    "config: kind null": fields(PEFT, peft_type=None),
    "config: DoRA": fields(PEFT, use_dora=True),
    "config: trains biases": fields(PEFT, bias="all"),
    "config: saves modules": fields(PEFT, modules_to_save=["lm_head"]),
    "config: transposed": fields(PEFT, fan_in_fan_out=True),
    "own: a tangent": write("fusionlab.json", b'{"method": "tangent_lora"}'),
    "own: an unknown method": write("fusionlab.json", b'{"method": "magic"}'),
    "own: another base": write("fusionlab.json", b'{"method": "l_lora", "base_hash": "0000"}'),
    "own: factors that are gone": write("fusionlab.json", b'{"lora_alpha": {"q": [1, false]}}'),
    "own: other factors": write("fusionlab.json", b'{"unpadded_ranks": {"q": 1}}'),
    "own: attention that is not fused": write("fusionlab.json", b'{"fused_attention": {"attn": {"q_proj": [0, 1]}}}'),
    "own: broken": write("fusionlab.json", b"{"),
    "published, broken": write("linearized_adapter_model.safetensors", b""),
    "tokenizer: broken": write("tokenizer.json", b"{"),
    "statistics: broken": write("fusion_stats.json", b"[]"),
    "values: NaN": state(put(FACTOR, torch.full((2, 16), torch.nan)), ADAPTER),
    "values: zero": state(lambda found: {key: value * 0 for key, value in found.items()}, ADAPTER),
    "values: huge": state(lambda found: {key: value * 1e30 for key, value in found.items()}, ADAPTER),
}
NAMES: dict[str, str] = {
    "a file": "full/model.safetensors",
    "an index": "base/config.json",
    "a text": "base/LICENSE",
    "a factor file": "lora/adapter_model.safetensors",
    "gone": "./gone",
    "an id": "owner/never-there",
    "an id without owner": "gpt2",
    "base+lora": "base+lora",
    "an id of base+lora": "owner/base+owner/lora",
    "a zero byte": "a\0b",
    "too long": "x" * 5000,
    "a long part": "full/" + "x" * 300,
    "below a file": "full/config.json/x",
    "a user without a home": "~nobody-of-that-name/x",
    "the parent": ".",
    "spaces": "  ",
    "half a character": "\udc80",
    "embedded": "tiny-clip",
}
FLAGS: dict[str, list[str]] = {
    "none": [],
    "output there": ["--output", "full"],
    "output below a file": ["--output", "base/LICENSE/out"],
    "output too long": ["--output", "x" * 300],
    "output nothing": ["--output", ""],
    "output here": ["--output", "."],
    "output inside the base": ["--output", "base/out"],
    "output deep": ["--output", "new/deep/out"],
    "output a zero byte": ["--output", "a\0b"],
    "bfloat16": ["--dtype", "bfloat16"],
    "no dtype": ["--dtype", "float7"],
    "rounded inputs": ["--input_dtype", "float16"],
    "as weights": ["--save", "weights"],
    "as an adapter": ["--save", "adapter"],
    "in bfloat16 as weights": ["--save", "weights", "--dtype", "bfloat16"],
    "rank 1": ["--rank", "1"],
    "rank 0": ["--rank", "0"],
    "a huge rank": ["--rank", "5000"],
    "left to the base": ["--mismatched_tensors", "base"],
    "left to the base, as weights": ["--mismatched_tensors", "base", "--save", "weights"],
    "little memory": ["--memory_budget", "1KB"],
    "no memory": ["--memory_budget", "lots"],
    "small shards": ["--max_shard_size", "100"],
    "threads": ["--threads", "3"],
    "a variant": ["--variant", "fp16"],
    "no variant": ["--variant", "../x"],
    "hash": ["--hash"],
    "any base": ["--allow_other_base"],
    "task arithmetic": ["--rule", "task_arithmetic"],
    "task arithmetic of others": ["--rule", "task_arithmetic", "--rule.scaling_coefficient", "{x: 1, y: 2}"],
    "ties": ["--rule", "ties", "--rule.density", "0.5"],
    "ties, too dense": ["--rule", "ties", "--rule.density", "2"],
    "ties of text": ["--rule", "ties", "--rule.density", "half"],
    "slerp": ["--rule", "slerp"],
    "tsv_m": ["--rule", "tsv_m"],
    "tsv_m, rank 1": ["--rule", "tsv_m", "--rank", "1"],
    "knots": ["--rule", "knots"],
    "lines": ["--rule", "lines"],
    "dare": ["--rule", "dare", "--rule.rule", "average"],
    "karcher": ["--rule", "karcher"],
    "metagpt": ["--rule", "metagpt"],
    "model_stock": ["--rule", "model_stock"],
    "a search": ["--rule", "lorahub"],
    "no rule": ["--rule", "magic"],
    "a rule of numbers": ["--rule", "7"],
    "no flag": ["--magic", "1"],
    "a recipe that is gone": ["--config", "gone.yaml"],
    "a recipe that is a folder": ["--config", "base"],
    "a recipe that is no text": ["--config", "base/model.safetensors"],
}


def given(folder: Path, base: Change, lora: Change, full: Change, name: str, flags: list[str]) -> list[str]:
    base(folder / "base")
    lora(folder / "lora")
    full(folder / "full")
    inputs = ["--base", "base", "--finetuned.x", name, "--finetuned.y", "second" if name == "lora" else "more"]
    return ["fuse", *inputs, "--rule", "average", *([] if "--output" in flags else ["--output", "out"]), *flags]


def decide(folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The dry run and the run; returns the refusal."""
    before = sorted(folder.rglob("*"))
    code = main([*arguments, "--dry_run"])
    dry = capsys.readouterr()
    assert sorted(folder.rglob("*")) == before
    ran = main(arguments)
    run = capsys.readouterr()
    assert {code, ran} <= {0, 2}
    if code == 2:
        assert ran == 2
        assert dry.err == run.err
        assert dry.err.count("\n") == 1
        assert "Traceback" not in dry.err
        assert dry.out == run.out == ""
        assert sorted(folder.rglob("*")) == before
        return dry.err
    assert "not yet checked" in dry.out
    if ran == 2:
        assert re.search(VALUES, run.err), run.err
        assert run.err.count("\n") == 1
        assert not (folder / "out").exists()
        return ""
    assert run.err == "" or "\r" in run.err
    return ""


AS_IS = MODEL["as it is"]


@pytest.mark.parametrize("with_what", often(["full", "lora"], "lora"))
@pytest.mark.parametrize("kind", MODEL)
def test_a_base(kind: str, with_what: str, models: Path, capsys) -> None:
    decide(models, given(models, MODEL[kind], AS_IS, AS_IS, with_what, []), capsys)


@pytest.mark.parametrize("kind", MODEL)
def test_a_full_model(kind: str, models: Path, capsys) -> None:
    decide(models, given(models, AS_IS, AS_IS, MODEL[kind], "full", ["--rule", "metagpt"]), capsys)


@pytest.mark.parametrize("kind", PEFT_FILE)
def test_an_adapter(kind: str, models: Path, capsys) -> None:
    decide(models, given(models, AS_IS, PEFT_FILE[kind], AS_IS, "lora", []), capsys)


@pytest.mark.parametrize("kind", NAMES)
def test_a_name(kind: str, models: Path, capsys) -> None:
    decide(models, given(models, AS_IS, AS_IS, AS_IS, NAMES[kind], []), capsys)
    arguments = ["fuse", "--base", NAMES[kind], "--finetuned.x", "full", "--output", "again", "--rule", "average"]
    decide(models, arguments, capsys)


@pytest.mark.parametrize("name", often(["full", "lora"], "lora"))
@pytest.mark.parametrize("kind", FLAGS)
def test_flags(kind: str, name: str, models: Path, capsys) -> None:
    decide(models, given(models, AS_IS, AS_IS, AS_IS, name, FLAGS[kind]), capsys)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_combinations(seed: int, models: Path, capsys) -> None:
    """Good parts are drawn more often than bad ones, so that what is deep is reached."""
    draw = random.Random(seed)
    works = ["as it is", "bin", "shards", "weights: bfloat16", "weights: one more", "weights: a counter"]
    works += ["weights: another shape", "weights: one missing", "config: unknown type", "config: none"]
    base, full = (MODEL[draw.choice([*works, draw.choice(list(MODEL))])] for _ in range(2))
    lora = PEFT_FILE[draw.choice(["as it is", "weights: narrower", "weights: of no layer", *PEFT_FILE])]
    flags = FLAGS[draw.choice(list(FLAGS))] + FLAGS[draw.choice(["none", "left to the base", "metagpt", "as weights"])]
    decide(models, given(models, base, lora, full, draw.choice(["full", "lora"]), flags), capsys)


MERGEKIT: dict[str, Any] = {
    "base+lora": {"merge_method": "linear", "models": [{"model": "base+lora", "parameters": {"weight": 1}}]},
    "a model that is a mapping": {"merge_method": "linear", "models": [{"model": {"path": "full"}}]},
    "no models": {"merge_method": "linear"},
    "a method that is none": {"merge_method": "magic", "models": []},
    "a method of numbers": {"merge_method": 3, "models": []},
    "slices": {"merge_method": "linear", "slices": [{"sources": []}]},
    "a weight of text": {"merge_method": "linear", "models": [{"model": "full", "parameters": {"weight": "a"}}]},
    "a good one": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("full", "lora")],
    },
    "an unknown dtype": {
        "merge_method": "linear",
        "dtype": "int9",
        "models": [{"model": "full", "parameters": {"weight": 1}}],
    },
}


@pytest.mark.parametrize("kind", MERGEKIT)
def test_a_recipe_of_mergekit(kind: str, models: Path, capsys) -> None:
    (models / "recipe.yaml").write_text(json.dumps(MERGEKIT[kind]))
    told = decide(models, ["fuse", "--config", "recipe.yaml", "--output", "out"], capsys)
    assert (told == "") == (kind == "a good one")


TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = TOWER | {"image_size": 8, "patch_size": 4}


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE))


def clip() -> Any:
    config = transformers.CLIPConfig(text_config=TOWER | {"vocab_size": 16}, vision_config=IMAGE, projection_dim=8)
    return transformers.CLIPModel(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        **TOWER, vocab_size=16, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.MixtralForCausalLM(config)


def resnet() -> Any:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**config))


ARCHITECTURES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "vit": (vit, ["q_proj", "up_proj", "fc1", "projection"]),
    "clip": (clip, ["q_proj", "visual_projection", "patch_embedding"]),
    "t5": (t5, ["q", "wo"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "mixtral": (mixtral, ["q_proj", "o_proj"]),
    "resnet": (resnet, ["convolution"]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "parts that are lists": {"vision_config": [1], "text_config": [2]},
    "parts that are null": {"vision_config": None, "text_config": None},
    "sizes null": {"hidden_size": None, "d_model": None, "n_embd": None},
    "sizes of text": {"hidden_size": "8", "d_model": "8", "n_embd": "8", "projection_dim": "8"},
    "no layers": {"num_hidden_layers": 0, "num_layers": 0, "n_layer": 0},
    "layers below zero": {"num_hidden_layers": -1, "num_layers": -1, "n_layer": -1},
    "another class": {"architectures": ["LlamaForCausalLM"]},
    "its inner class": {"architectures": ["ViTModel"]},
    "an unknown class": {"architectures": ["NeverHeardOf"]},
    "an unknown type": {"model_type": "never_heard_of"},
    "another type": {"model_type": "bert"},
    "tied of text": {"tie_word_embeddings": "no"},
    "untied": {"tie_word_embeddings": False},
    "an activation that is none": {"hidden_act": "magic", "activation_function": "magic", "feed_forward_proj": "a-b-c"},
}


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By name a folder with ``base``, the full model ``full`` and the adapter ``lora``."""
    root = tmp_path_factory.mktemp("architectures")
    for name, (make, targets) in ARCHITECTURES.items():
        folder = root / name
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(folder / "base")
        shutil.copytree(folder / "base", folder / "full")
        found = load_file(folder / "base" / WEIGHTS)
        moved = {key: value + 0.01 if value.is_floating_point() else value for key, value in found.items()}
        save_file(moved, folder / "full" / WEIGHTS, metadata={"format": "pt"})
        settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        get_peft_model(model, settings).save_pretrained(folder / "lora", save_embedding_layers=False)
    return root


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("architecture", often(ARCHITECTURES, "clip", "gpt2"))
def test_other_architectures(
    architecture: str, kind: str, architectures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    shutil.copytree(architectures / architecture, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    edit(tmp_path / "base" / "config.json", **SETTINGS[kind])
    for name, flags in (("lora", ["--save", "weights"]), ("full", ["--rule", "lines"])):
        inputs = ["--base", "base", "--finetuned.x", name, "--output", f"out{len(os.listdir())}", "--rule", "average"]
        decide(tmp_path, ["fuse", *inputs, *flags], capsys)


def test_an_unwritable_parent(models: Path, capsys) -> None:
    os.mkfifo(models / "pipe")
    for output in ("pipe/out", "/proc/nowhere/out", "/dev/null/out"):
        told = decide(models, given(models, AS_IS, AS_IS, AS_IS, "full", ["--output", output]), capsys)
        assert "cannot be" in told
