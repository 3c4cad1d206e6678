"""``python -m fusionlab fuse``: flags and recipes, the result folder, and everything that is refused before it runs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionlab.__main__ import main
from fusionlab.commands.fuse.command import parse
from fusionlab.engine import fuse
from fusionlab.rules.config import from_config, known_rules
from fusionlab.runs import loading

CONFIG = {"model_type": "llama", "hidden_size": 8, "vocab_size": 10, "dtype": "float32"}
SHAPES = {"embed.weight": (10, 8), "layers.0.w": (8, 8), "layers.1.w": (8, 8), "norm": (8,)}


def state_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}
    if seed == 0:
        return base
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


def save(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or CONFIG))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with base, a and b; paths in recipes are relative to it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, state_of(seed))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("the base's own card")
    return tmp_path


FLAGS = ["fuse", "--base", "base", "--finetuned.a", "a", "--finetuned.b", "b", "--output", "out"]


def test_flags_give_a_folder_with_everything(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--rule", "ties", "--rule.density", "0.5", "--dtype", "bfloat16", "--hash"]) == 0
    names = {path.name for path in (models / "out").iterdir()}
    carried = {"config.json", "tokenizer.json", "generation_config.json"}
    assert names == carried | {"model.safetensors", "fusion.json", "README.md"}
    assert json.loads((models / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(models / "out" / "model.safetensors").values()} == {torch.bfloat16}
    record = json.loads((models / "out" / "fusion.json").read_text())
    assert record["rule"]["init_args"]["density"] == 0.5
    assert len(record["finetuned"]["a"]["files"][0]["sha256"]) == 64
    rounded = {name: tensor.bfloat16() for name, tensor in state_of(0).items()}
    fused = load_file(models / "out" / "model.safetensors")
    survived = sum(int((fused[name] != rounded[name]).sum()) for name in SHAPES)
    assert record["rounding"]["survived_elements"] == survived
    assert record["rounding"]["survived"] == survived / record["rounding"]["updated_elements"]
    assert record["row"] == {"model": "fused", "rule": "ties", "scaling_coefficients": {}, "fused_tasks": ["a", "b"]}
    card = (models / "out" / "README.md").read_text()
    assert "fused by ties" in card
    assert "the base's own card" not in card
    assert "wrote out" in capsys.readouterr().out
    assert loading.load(models / "out").labels["rule"] == "ties"


def test_updates_lost_by_rounding_are_counted_in_the_stored_dtype(models: Path) -> None:
    """A third is not a bfloat16: rounding alone moves it, which is no update; 1e-4 is lost beside it, 0.5 is not."""
    save(models / "base", {"w": torch.full((4,), 1 / 3)})
    save(models / "a", {"w": torch.full((4,), 1 / 3) + torch.tensor([0.0, 1e-4, 1e-4, 0.5])})
    assert main([*FLAGS[:5], "--output", "out", "--rule", "average", "--dtype", "bfloat16"]) == 0
    rounding = json.loads((models / "out" / "fusion.json").read_text())["rounding"]
    assert rounding == {"updated_elements": 3, "survived_elements": 1, "survived": 1 / 3}


RECIPES = sorted((Path(__file__).parents[2] / "configs" / "fuse").glob("*.yaml"))


def test_there_is_a_recipe_for_every_rule() -> None:
    assert len(RECIPES) == 22
    parts = {"trim": "ties_metagpt", "dare": "dare_metagpt", "disjoint_mean": "ties"}
    assert {parts.get(name, name) for name in known_rules()} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_rule_fuses(path: Path) -> None:
    recipe = parse(["--config", str(path)])
    shapes = {"layers.0.w": (4, 3), "layers.1.w": (4, 3), "lm_head.weight": (3,)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    finetuned = {task: {name: torch.randn(shape) for name, shape in shapes.items()} for task in recipe.finetuned}
    fused = fuse(from_config(recipe.rule), base, finetuned=finetuned).state
    assert all(fused[name].isfinite().all() for name in base)


def test_a_recipe_and_flags_over_it(models: Path) -> None:
    recipe = {"base": "base", "finetuned": {"a": "a", "b": "b"}, "rule": "average", "output": "first"}
    (models / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", "recipe.yaml"]) == 0
    assert main(["fuse", "--config=recipe.yaml", "--output", "second", "--rule", "metagpt"]) == 0
    fused = load_file(models / "first" / "model.safetensors")
    torch.testing.assert_close(fused["norm"], (state_of(1)["norm"] + state_of(2)["norm"]) / 2)
    assert json.loads((models / "second" / "fusion.json").read_text())["row"]["rule"] == "metagpt"


def test_task_arithmetic_without_a_coefficient_says_which_it_took(models: Path, capsys) -> None:
    assert main([*FLAGS, "--rule", "task_arithmetic"]) == 0
    record = json.loads((models / "out" / "fusion.json").read_text())
    assert record["scaling_coefficients"] == {"a": 0.3, "b": 0.3}
    assert "no scaling_coefficient was given: 0.3" in record["notes"][0]
    assert "no scaling_coefficient was given: 0.3" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_writes_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(models.rglob("*"))
    assert main([*FLAGS, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "4 tensors, 216 elements" in printed
    assert "2 over the inputs" in printed
    assert "nothing was written" in printed
    assert sorted(models.rglob("*")) == before


def test_statistics_are_kept_while_the_inputs_are_unchanged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionlab.rules import Metagpt

    measured = []
    measure = Metagpt.measure
    monkeypatch.setattr(Metagpt, "measure", lambda *args: measured.append(args[1:3]) or measure(*args))

    def names() -> list[str]:
        """Measured since the last call, without the two tiny tensors that a rule is tried on."""
        found = sorted(name for name, base in measured if base.numel() != 4)
        measured.clear()
        return found

    assert main(FLAGS) == 0
    assert names() == sorted(SHAPES)
    assert main([*FLAGS[:-1], "again"]) == 0
    assert not names()
    first, again = (json.loads((models / name / "fusion.json").read_text()) for name in ("out", "again"))
    assert first["scaling_coefficients"] == again["scaling_coefficients"]
    assert first["norms"] == again["norms"]
    save(models / "a", state_of(7))  # other content, new time
    assert main([*FLAGS[:-1], "third"]) == 0
    assert names() == sorted(SHAPES)
    assert json.loads((models / "third" / "fusion.json").read_text())["norms"]["a"] != first["norms"]["a"]


def test_unreadable_statistics_are_measured_again(models: Path) -> None:
    (models / "a" / "fusion_stats.json").write_text("{broken")
    assert main(FLAGS) == 0
    assert "squared_norm" in (models / "a" / "fusion_stats.json").read_text()


def test_mismatched_tensors_from_the_base(models: Path) -> None:
    grown = state_of(1) | {"embed.weight": torch.randn(12, 8), "extra": torch.zeros(2)}
    save(models / "a", grown, CONFIG | {"vocab_size": 12})
    assert main([*FLAGS, "--mismatched_tensors", "base", "--rule", "average"]) == 0
    fused = load_file(models / "out" / "model.safetensors")
    assert torch.equal(fused["embed.weight"], state_of(0)["embed.weight"])
    assert not torch.equal(fused["norm"], state_of(0)["norm"])
    record = json.loads((models / "out" / "fusion.json").read_text())["tensors"]
    assert record["from_base"] == {"embed.weight": "shape (12, 8) in 'a' (expected (10, 8))"}
    assert record["not_used"] == {"a": ["extra"]}


def test_pickled_weights_and_single_files(models: Path) -> None:
    for name in "ab":
        torch.save(load_file(models / name / "model.safetensors"), models / f"{name}.pt")
    shutil.rmtree(models / "b")
    (models / "b").mkdir()
    shutil.copy(models / "b.pt", models / "b" / "pytorch_model.bin")
    assert main([*FLAGS[:4], "a.pt", *FLAGS[5:], "--rule", "average"]) == 0
    torch.testing.assert_close(
        load_file(models / "out" / "model.safetensors")["norm"], (state_of(1)["norm"] + state_of(2)["norm"]) / 2
    )
    assert (models / "a.pt.fusion_stats.json").is_file()


TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
EMBED = "model.embed_tokens.weight"


def with_llama_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding under the name that the architecture ties ``lm_head.weight`` to."""
    return {EMBED if name == "embed.weight" else name: tensor for name, tensor in state.items()}


def test_a_pickled_base_with_tied_names_is_stored_once(models: Path) -> None:
    for name in ("base", "a", "b"):
        state = with_llama_names(load_file(models / name / "model.safetensors"))
        (models / name / "model.safetensors").unlink()
        torch.save(state | {"lm_head.weight": state[EMBED]}, models / name / "pytorch_model.bin")
        (models / name / "config.json").write_text(json.dumps(CONFIG | TIED))
    assert main([*FLAGS, "--rule", "average"]) == 0
    assert load_file(models / "out" / "model.safetensors").keys() == with_llama_names(state_of(0)).keys()
    (models / "base" / "config.json").write_text(json.dumps(CONFIG | TIED | {"tie_word_embeddings": False}))
    assert main([*FLAGS[:-1], "untied", "--rule", "average"]) == 0
    untied = load_file(models / "untied" / "model.safetensors")
    assert torch.equal(untied["lm_head.weight"], untied[EMBED])


def test_a_safetensors_base_keeps_its_names_and_counts_tied_ones_once(models: Path) -> None:
    for name in ("base", "a", "b"):
        state = with_llama_names(load_file(models / name / "model.safetensors"))
        more = {"lm_head.weight": state[EMBED].clone()} if name != "b" else {}
        save(models / name, state | more, CONFIG | TIED)
    assert main(FLAGS) == 0  # b has no lm_head: its embedding stands for it
    fused = load_file(models / "out" / "model.safetensors")
    assert torch.equal(fused["lm_head.weight"], fused[EMBED])
    record = json.loads((models / "out" / "fusion.json").read_text())
    assert record["tensors"]["tied"] == {"lm_head.weight": EMBED}
    expected = sum(((state_of(1)[name] - state_of(0)[name]).double() ** 2).sum() for name in SHAPES) ** 0.5
    assert record["norms"]["a"] == pytest.approx(expected.item(), rel=1e-12)


def test_values_are_rounded_to_the_input_dtype_first(models: Path) -> None:
    assert main([*FLAGS, "--rule", "average", "--input_dtype", "bfloat16"]) == 0
    mean = (state_of(1)["norm"].bfloat16().float() + state_of(2)["norm"].bfloat16().float()) / 2
    torch.testing.assert_close(load_file(models / "out" / "model.safetensors")["norm"], mean, rtol=0, atol=1e-6)


def header(path: Path, change: Callable[[dict[str, Any]], None], data: bytes | None = None) -> None:
    """Rewrite the header of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    content = json.loads(raw[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (raw[8 + length :] if data is None else data))


def shard(models: Path, weight_map: dict[str, str]) -> None:
    (models / "a" / "model.safetensors").rename(models / "a" / "model-1.safetensors")
    (models / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ALL_IN_ONE = dict.fromkeys(SHAPES, "model-1.safetensors")


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def evil_pickle(models: Path) -> None:
    (models / "a" / "model.safetensors").unlink()
    with (models / "a" / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"w": Evil()}, file, protocol=2)


def nested_pickle(models: Path) -> None:
    (models / "a" / "model.safetensors").unlink()
    torch.save({"state_dict": state_of(1)}, models / "a" / "pytorch_model.bin")


A = "a/model.safetensors"
BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing folder": (lambda m: shutil.rmtree(m / "a"), "'a' does not exist, and is no hub id"),
    "empty folder": (lambda m: (m / A).unlink(), "'a' has no weights: .* it holds config.json"),
    "missing shard": (
        lambda m: shard(m, ALL_IN_ONE | {"norm": "model-2.safetensors"}),
        "missing shard of 'a': model-2.safetensors",
    ),
    "index outside": (
        lambda m: shard(m, ALL_IN_ONE | {"norm": "../b/model.safetensors"}),
        r"points outside its folder: \.\./b/model.safetensors",
    ),
    "index of other names": (
        lambda m: shard(m, ALL_IN_ONE | {"nrm": "model-1.safetensors"}),
        "does not fit its shards: nrm",
    ),
    "index without a map": (lambda m: shard(m, None), "has no weight_map"),  # type: ignore[arg-type]
    "truncated data": (
        lambda m: (m / A).write_bytes((m / A).read_bytes()[:-4]),
        "truncated or corrupt: its tensors end",
    ),
    "truncated header": (
        lambda m: (m / A).write_bytes((m / A).read_bytes()[:40]),
        "it says a header of .* the file has 40",
    ),
    "no header": (lambda m: (m / A).write_bytes(b"abc"), "truncated or corrupt"),
    "header is no JSON": (lambda m: (m / A).write_bytes(struct.pack("<Q", 4) + b"abcd"), "its header is not JSON"),
    "offsets overlap": (
        lambda m: header(m / A, lambda h: h["norm"].update(data_offsets=[0, 32])),
        "offsets overlap at|leave a hole at",
    ),
    "offsets pass the end": (
        lambda m: header(m / A, lambda h: h["norm"].update(shape=[800], data_offsets=[832, 4032])),
        "truncated or corrupt",
    ),
    "shape against bytes": (
        lambda m: header(m / A, lambda h: h["norm"].update(shape=[9])),
        "norm has 32 bytes, its shape",
    ),
    "negative shape": (
        lambda m: header(m / A, lambda h: h["norm"].update(shape=[-8])),
        r"the entry of norm has shape \(-8,\)",
    ),
    "no offsets": (lambda m: header(m / A, lambda h: h["norm"].pop("data_offsets")), "the entry of norm lacks"),
    "float8": (lambda m: header(m / A, lambda h: h["norm"].update(dtype="F8_E4M3")), "norm is stored as F8_E4M3"),
    "other shape": (
        lambda m: save(m / "a", state_of(1) | {"norm": torch.zeros(9)}),
        r"norm: shape \(9,\) in 'a' \(expected \(8,\)\).*mismatched_tensors: base",
    ),
    "other names": (
        lambda m: save(m / "a", {name.replace("layers", "layer"): t for name, t in state_of(1).items()}),
        r"layers.0.w: missing in 'a'.*not in the base: layer.0.w, layer.1.w \(did you mean 'layers.0.w'",
    ),
    "other architecture": (
        lambda m: save(m / "a", state_of(1), CONFIG | {"model_type": "mistral"}),
        "another architecture: model_type 'mistral' .the base has 'llama'",
    ),
    "NaN": (
        lambda m: save(m / "a", state_of(1) | {"norm": torch.full((8,), torch.nan)}),
        "norm of 'a' has NaN or Inf",
    ),
    "Inf in the base": (
        lambda m: save(m / "base", state_of(0) | {"norm": torch.full((8,), torch.inf)}),
        "norm of the base has NaN or Inf",
    ),
    "zero task vectors": (
        lambda m: [save(m / name, state_of(0)) for name in "ab"],
        "metagpt: the task vectors of a, b are all zero",
    ),
    "code in a pickle": (evil_pickle, "is not plain weights and is not opened"),
    "nested pickle": (nested_pickle, "is not a mapping of names to tensors"),
    "output exists": (lambda m: (m / "out").mkdir(), "the output '.*out' exists"),
    "config is no JSON": (lambda m: (m / "a" / "config.json").write_text("{"), "config.json' is not valid JSON"),
    "several files": (
        lambda m: [
            (m / A).rename(m / "a" / "x.safetensors"),
            shutil.copy(m / "a/x.safetensors", m / "a/y.safetensors"),
        ],
        "has no index and several weight files: x.safetensors, y.safetensors",
    ),
    "disk too small": (
        lambda m: header(m / "base/model.safetensors", lambda h: None),
        "the disk of 'out' is too small: 864 bytes are needed, 100 are free",
    ),
}


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Exit code 2, one message that matches, nothing on the other stream and nothing new on the disk."""
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert re.search(message, printed.err), printed.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case: str, models: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, message = BAD_FILES[case]
    spoil(models)
    if case == "disk too small":
        free = shutil.disk_usage(models)._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(FLAGS, message, capsys, models)


BAD_ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "misspelt flag": (
        [*FLAGS, "--mismatchd_tensors", "base"],
        "unknown key 'mismatchd_tensors'; did you mean 'mismatched_tensors'",
    ),
    "missing flags": (["fuse", "--base", "base"], "missing: finetuned, output"),
    "wrong type": ([*FLAGS, "--threads", "many"], "threads: expected int, got 'many'"),
    "wrong choice": ([*FLAGS, "--save", "both"], "save: no such choice 'both'; known: auto, weights, adapter"),
    "threads": ([*FLAGS, "--threads", "0"], "threads: expected a whole number from 1, got 0"),
    "rule": ([*FLAGS, "--rule", "metagtp"], "no such rule; did you mean 'metagpt'"),
    "rule argument": ([*FLAGS, "--rule", "ties", "--rule.init_args.densty", "1"], "unknown argument 'densty'"),
    "rule and tasks": ([*FLAGS, "--finetuned.c", "a", "--rule", "slerp"], "slerp is between two models, got 3"),
    "dtype": ([*FLAGS, "--dtype", "bfloat61"], "dtype: no such dtype 'bfloat61'; did you mean 'bfloat16'"),
    "budget": ([*FLAGS, "--memory_budget", "lots"], "memory_budget: expected bytes or a size .* got 'lots'"),
    "small budget": ([*FLAGS, "--memory_budget", "1MB"], "memory_budget: metagpt on blocks .* the budget is 1,000,000"),
    "adapter output": ([*FLAGS, "--save", "adapter"], "save: an adapter needs adapters .* 'a' is a full model"),
    "rank": ([*FLAGS, "--rank", "4"], "rank: only a fused adapter can be cut down"),
    "no recipe": (["fuse", "--config", "nowhere.yaml"], "--config: 'nowhere.yaml' does not exist"),
    "hub id offline": (
        [*FLAGS[:4], "nobody/nothing-here", *FLAGS[5:]],
        "'nobody/nothing-here' does not exist here, and cannot",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(case: str, models: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(*BAD_ARGUMENTS[case], capsys, models)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("finetned: {a: a}", "unknown key 'finetned'; did you mean 'finetuned'"),
        ("base: [a", "is not YAML"),
        ("- base", "holds a list, expected a mapping"),
        ("base: base\noutput: out\nfinetuned: {}", "finetuned: expected a path by task, got none"),
        ("base: base\noutput: out\nfinetuned: [a]", "finetuned: expected .* got"),
        ("merge_method: linear\nslices: []", "models: expected a list of models, or slices"),
    ],
)
def test_bad_recipes_are_refused(content: str, message: str, models: Path, capsys) -> None:
    (models / "recipe.yaml").write_text(content)
    refused(["fuse", "--config", "recipe.yaml"], message, capsys, models)
