"""Whether an adapter is given the base that it was made for: values decide, names do not; the dry run says the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import fusionlab
from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.errors import InputError
from fusionlab.runs.loading import base_hash

WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
Make = Callable[[Path], str]


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and the adapters ``a`` of PEFT and ``own`` of this package."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder / "a")
    adapters.save_adapter(folder / "own", replace(adapters.load_adapter(folder / "a"), method="l_lora", a0_hash="same"))
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copy(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor], name: str = "other") -> str:
    """A copy of the base under another path, each tensor changed."""
    shutil.copytree(folder / "base", folder / name)
    state = {key: change(key, value).contiguous() for key, value in load_file(folder / "base" / WEIGHTS).items()}
    save_file(state, folder / name / WEIGHTS, metadata={"format": "pt"})
    return str(folder / name)


def fuse(task: str = "a", *flags: str, base: str = "base", output: str = "out") -> int:
    inputs = ["--base", base, f"--finetuned.{task}", task, "--output", output]
    return main(["fuse", *inputs, "--rule", "average", *flags])


def both(capsys: pytest.CaptureFixture[str], *arguments: str, expected: int = 0, **where: str) -> tuple[str, str]:
    """What the dry run and the run say; both end alike."""
    told = []
    for flags in (("--dry_run",), ()):
        capsys.readouterr()
        assert fuse(*arguments, *flags, **where) == expected
        told.append(capsys.readouterr())
    return tuple(each.err if expected else each.out for each in told)  # type: ignore[return-value]


def notes(folder: Path, output: str = "out") -> list[str]:
    return json.loads((folder / output / "fusion.json").read_text())["notes"]


def linked(folder: Path) -> str:
    (folder / "link").symlink_to(folder / "base")
    return "link"


def pickled(folder: Path) -> str:
    shutil.copytree(folder / "base", folder / "pickled")
    torch.save(load_file(folder / "base" / WEIGHTS), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / WEIGHTS).unlink()
    return "pickled"


def sharded(folder: Path) -> str:
    transformers.LlamaForCausalLM.from_pretrained(folder / "base").save_pretrained(
        folder / "sharded", max_shard_size="4KB"
    )
    return "sharded"


SAME: dict[str, Make] = {
    "its path": lambda folder: str(folder / "base"),
    "a relative path": lambda folder: "./base/",
    "a link": linked,
    "a renamed copy": lambda folder: copy(folder, lambda name, value: value),
    "in bfloat16": lambda folder: copy(folder, lambda name, value: value.bfloat16()),
    "in float16": lambda folder: copy(folder, lambda name, value: value.half()),
    "in float64": lambda folder: copy(folder, lambda name, value: value.double()),
    "through bfloat16": lambda folder: copy(folder, lambda name, value: value.bfloat16().float()),
    "a pickle": pickled,
    "shards": sharded,
    "no name": lambda folder: "",
    "other where it adapts nothing": lambda folder: copy(folder, lambda name, x: x + ("lm_head" in name)),
}


@pytest.mark.parametrize("task", ["a", "own"])
@pytest.mark.parametrize("case", SAME)
def test_the_same_base_under_another_name(case: str, task: str, models: Path, capsys) -> None:
    edit(models / task / "adapter_config.json", base_model_name_or_path=SAME[case](models))
    dry, _ = both(capsys, task)
    assert "was made for" not in dry
    assert notes(models) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_copy_in_another_dtype_as_the_base(recorded: bool, dtype: torch.dtype, models: Path, capsys) -> None:
    edit(models / "own" / "adapter_config.json", base_model_name_or_path=str(models / "base"))
    if recorded:
        edit(models / "own" / "fusionlab.json", base_hash=hash_of(models / "base"))
    both(capsys, "own", base=copy(models, lambda name, value: value.to(dtype)))
    assert notes(models) == []


def packed(folder: Path) -> str:
    """As bitsandbytes saves four bits."""
    shutil.copytree(folder / "base", folder / "packed")
    state = {}
    for name, value in load_file(folder / "base" / WEIGHTS).items():
        is_packed = "proj" in name
        state[name] = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8) if is_packed else value.half()
        if is_packed:
            state[f"{name}.absmax"] = torch.zeros(value.numel() // 64 or 1, dtype=torch.uint8)
            state[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
    save_file(state, folder / "packed" / WEIGHTS, metadata={"format": "pt"})
    edit(folder / "packed" / "config.json", quantization_config={"load_in_4bit": True})
    return "packed"


def without_weights(folder: Path) -> str:
    shutil.copytree(folder / "base", folder / "empty")
    (folder / "empty" / WEIGHTS).unlink()
    return "empty"


def renamed(folder: Path) -> str:
    shutil.copytree(folder / "base", folder / "renamed")
    state = {f"inner.{name}": value for name, value in load_file(folder / "base" / WEIGHTS).items()}
    save_file(state, folder / "renamed" / WEIGHTS, metadata={"format": "pt"})
    return "renamed"


UNKNOWN: dict[str, Make] = {
    "a path that is gone": lambda folder: "/gone/checkpoint-100",
    "a relative path that is gone": lambda folder: "../outputs/llama",
    "a mirror's id": lambda folder: "mirror/llama-tiny",
    "an id with a revision": lambda folder: "owner/llama@main",
    "an id without owner": lambda folder: "gpt2",
    "packed to four bits": packed,
    "in eight bits": lambda folder: copy(folder, lambda name, x: (x * 9).to(torch.int8) if "proj" in name else x),
    "in float8": lambda folder: copy(folder, lambda name, x: x.to(torch.float8_e4m3fn)),
    "a folder without weights": without_weights,
    "other names": renamed,
    "no path at all": lambda folder: "a\0b",
}


@pytest.mark.parametrize("task", ["a", "own"])
@pytest.mark.parametrize("case", UNKNOWN)
def test_values_that_are_not_known_are_said_and_passed(case: str, task: str, models: Path, capsys) -> None:
    named = UNKNOWN[case](models)
    edit(models / task / "adapter_config.json", base_model_name_or_path=named)
    dry, run = both(capsys, task)
    expected = f"adapter {task!r} was made for {named!r}, and whether 'base' is the same model is not known: "
    assert expected in dry
    assert expected in run
    assert len(notes(models)) == 1
    written = json.loads((models / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "base"


def one_element(name: str, value: torch.Tensor) -> torch.Tensor:
    if name == f"{Q}.weight":
        value = value.clone()
        value[7, 11] += 0.01
    return value


OTHER: dict[str, Make] = {
    "elsewhere": lambda folder: copy(folder, lambda name, x: x + 0.1),
    "one element": lambda folder: copy(folder, one_element),
    "one layer": lambda folder: copy(folder, lambda name, x: x * 1.5 if "layers.1" in name else x),
    "trained a little": lambda folder: copy(folder, lambda name, x: x + 1e-4 * torch.randn_like(x)),
    "another one in bfloat16": lambda folder: copy(folder, lambda name, x: (x + 0.02).bfloat16()),
    "zeros": lambda folder: copy(folder, lambda name, x: torch.zeros_like(x)),
}


@pytest.mark.parametrize("task", ["a", "own"])
@pytest.mark.parametrize("case", OTHER)
def test_known_and_other_values_are_refused_unless_insisted(case: str, task: str, models: Path, capsys) -> None:
    named = OTHER[case](models)
    edit(models / task / "adapter_config.json", base_model_name_or_path=named)
    dry, run = both(capsys, task, expected=2)
    assert dry == run
    assert dry.count("\n") == 1
    assert re.search(r"was made for another base \(.*other\).* in 'base'.*--allow_other_base", dry)
    assert not (models / "out").exists()
    dry, run = both(capsys, task, "--allow_other_base")
    assert "as allow_other_base says" in dry
    assert "as allow_other_base says" in run
    record = json.loads((models / "out" / "fusion.json").read_text())
    assert record["allow_other_base"] is True
    assert len(record["notes"]) == 1


def hash_of(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    model = transformers.LlamaForCausalLM.from_pretrained(folder).to(dtype)
    return base_hash(model, [f"model.layers.{n}.self_attn.{part}_proj" for n in range(2) for part in "qv"])


RECORDED = {
    "its own": (lambda folder: hash_of(folder / "base"), "/gone", "same"),
    "of its bfloat16 copy": (lambda folder: hash_of(folder / "base", torch.bfloat16), "/gone", "same"),
    "of its float16 copy": (lambda folder: hash_of(folder / "base", torch.float16), "", "same"),
    "another one": (lambda folder: "0" * 16, "/gone", "unknown"),
    "another one, no name": (lambda folder: "0" * 16, "", "unknown"),
    "another one, a mirror": (lambda folder: "1" * 16, "mirror/llama", "unknown"),
    "of a copy that is no longer there": (lambda folder: "1" * 16, "base", "other"),
}


@pytest.mark.parametrize("task", ["a", "own"])
@pytest.mark.parametrize("case", RECORDED)
def test_a_recorded_hash(case: str, task: str, models: Path, capsys) -> None:
    """It decides where it is known; where it differs and no values are, an adapter of one point is refused."""
    recorded, named, verdict = RECORDED[case]
    edit(models / task / "adapter_config.json", base_model_name_or_path=named)
    own = models / task / "fusionlab.json"
    own.write_text(json.dumps((json.loads(own.read_text()) if own.exists() else {}) | {"base_hash": recorded(models)}))
    is_refused = verdict == "other" or (verdict == "unknown" and task == "own")
    dry, run = both(capsys, task, expected=2 if is_refused else 0)
    if is_refused:
        assert dry == run
        assert "was made for another base" in dry
        both(capsys, task, "--allow_other_base")
    assert len(notes(models)) == (verdict != "same")


def test_adapters_that_name_one_base_in_several_ways(models: Path, capsys) -> None:
    copied = copy(models, lambda name, value: value.bfloat16())
    for task, named in (("a", "mirror/llama"), ("own", copied)):
        edit(models / task / "adapter_config.json", base_model_name_or_path=named)
    for rule in ("average", "tsv_m"):
        flags = ["--base", "base", "--finetuned.a", "a", "--finetuned.b", "own", "--output", rule, "--rule", rule]
        assert main(["fuse", *flags]) == 0
        written = json.loads((models / rule / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "base"
        assert fuse(rule, "--save", "weights", output=f"{rule}-again") == 0
        assert notes(models, f"{rule}-again") == []


@pytest.mark.parametrize("as_state", [False, True])
def test_from_python(as_state: bool, models: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(models / "base")
    base = load_file(models / "base" / WEIGHTS) if as_state else model
    config = models / "a" / "adapter_config.json"
    edit(config, base_model_name_or_path="mirror/llama")
    fusionlab.fuse("average", base, finetuned={"a": models / "a"})
    assert "whether 'this" in caplog.text
    edit(config, base_model_name_or_path=OTHER["one element"](models))
    with pytest.raises(InputError, match=f"was made for another base .*{Q} has other values there"):
        fusionlab.fuse("average", base, finetuned={"a": models / "a"})
    caplog.clear()
    fusionlab.fuse("average", base, finetuned={"a": models / "a"}, allow_other_base=True)
    assert "as allow_other_base says" in caplog.text
    edit(config, base_model_name_or_path=str(models / "base"))
    caplog.clear()
    fusionlab.fuse("average", base, finetuned={"a": models / "a"})
    assert caplog.text == ""


def test_an_id_in_the_cache_is_known(models: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As the hub's library lays its cache out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "hub"))
    for name, change in (("same", 0.0), ("else", 0.1)):
        repository = models / "hub" / f"models--owner--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        (repository / "snapshots").mkdir()
        moved = copy(models, lambda key, value, change=change: value + change, name)
        shutil.move(moved, repository / "snapshots" / "abc")
    edit(models / "a" / "adapter_config.json", base_model_name_or_path="owner/same")
    both(capsys, "a")
    assert notes(models) == []
    edit(models / "a" / "adapter_config.json", base_model_name_or_path="owner/else")
    dry, _ = both(capsys, "a", expected=2, output="second")
    assert "was made for another base (owner/else)" in dry
