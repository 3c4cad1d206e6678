"""What ``push`` sends names no place of this machine, whatever the folder's records name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import WRITES, Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import fusionlab
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS
from fusionlab.fusion.folders import save_finetuned, save_fused

pytestmark = [
    # the stock client hands its HTTP library files in a way that this deprecates
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),
    # PEFT asks transformers for a property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PUSH = ["push", "--repo", "ours/model"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a token that may write."""
    monkeypatch.setenv("HF_TOKEN", WRITES)
    return hub


def on_hub(hub: Hub) -> dict[str, bytes]:
    repository = hub.repositories["models", "ours/model"]
    return repository.commits[repository.branches["main"]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base in a folder of this machine, whose files name others."""
    shutil.copytree(ASSETS / "tiny-clip", tmp_path / "models" / "base")
    (tmp_path / "models" / "base" / "README.md").unlink(missing_ok=True)
    config = tmp_path / "models" / "base" / "config.json"
    places = {"_name_or_path": "/another/machine/first", "note": f"made in {Path.home()}/work, (by me)"}
    config.write_text(json.dumps(json.loads(config.read_text()) | places))
    return config.parent


def of_a_run(base: Path, method: str, rule: str) -> Path:
    """A fused model of a run on the base in a folder, moved at random in place of training."""
    module = fusionlab.ClipModule(str(base), method=method, **({} if method == "full" else {"rank": 2}))
    generator = torch.Generator().manual_seed(1)
    parameters = module.adaptation.add(["a", "b"])
    for parameter in (each for task in ("a", "b") for each in parameters[task]):
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    finetuned = {task: module.finetuned(task) for task in ("a", "b")}
    row = {"method": method, "model": "fused", "rule": rule, "fused_tasks": ["a", "b"]}
    save_fused(base.parent / "out", fusionlab.fuse(rule, module, finetuned=finetuned), module.backbone, row)
    save_finetuned(base.parent / "tuned", finetuned["a"], module.backbone, {"model": "finetuned", "finetuned_on": "a"})
    return base.parent / "out"


def by_fuse(base: Path) -> Path:
    """Full weights by ``fuse``, its inputs given by their whole paths."""
    stored = load_file(base / "model.safetensors")
    for name, change in {"a": 0.1, "b": 0.2}.items():
        shutil.copytree(base, base.parent / name)
        moved = {key: value + change if key.endswith("fc1.weight") else value for key, value in stored.items()}
        save_file(moved, base.parent / name / "model.safetensors", metadata={"format": "pt"})
    inputs = [f"--finetuned.{name}={base.parent / name}" for name in ("a", "b")]
    rest = ["--base", str(base), "--rule", "average", "--output", str(base.parent / "out")]
    assert main(["fuse", *inputs, *rest]) == 0
    return base.parent / "out"


MADE: dict[str, Any] = {
    "fuse": by_fuse,
    "adapters of a run": lambda base: of_a_run(base, "lora", "average"),
    "what an adapter was fused of": lambda base: of_a_run(base, "lora", "average").parent / "tuned",
    "full weights of a run": lambda base: of_a_run(base, "full", "average"),
    "masks": lambda base: of_a_run(base, "lora", "emr"),
}


@pytest.mark.parametrize("made", MADE)
def test_nothing_that_is_sent_names_a_place_here(
    made: str, hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MADE[made](base)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert any(str(tmp_path).encode() in data for path, data in before.items() if path.name != "README.md")
    capsys.readouterr()
    assert main([*PUSH, str(folder)]) == 0
    told = capsys.readouterr().out
    assert "models/base' is a folder of this machine, which others do not have; where it is on the hub, give" in told
    assert "is sent otherwise than it is here: 'base' for '" in told
    for name, data in on_hub(hub).items():
        for place in (tmp_path, Path.home()):
            assert f"{place}/".encode() not in data, name
            assert f'{place}"'.encode() not in data, name
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    commits = len(hub.asked("POST", "/commit/"))
    assert main([*PUSH, str(folder)]) == 0
    assert len(hub.asked("POST", "/commit/")) == commits  # nothing is new


def test_what_fuse_records_keeps_its_names(hub: Hub, base: Path) -> None:
    folder = by_fuse(base)
    assert main([*PUSH, str(folder)]) == 0
    files = on_hub(hub)
    here, there = (json.loads(text) for text in ((folder / "fusion.json").read_text(), files["fusion.json"]))
    assert there["base"] == here["base"] | {"name": "base"}
    assert {task: each["name"] for task, each in there["finetuned"].items()} == {"a": "a", "b": "b"}
    assert {key: value for key, value in there.items() if key not in ("base", "finetuned")} == {
        key: value for key, value in here.items() if key not in ("base", "finetuned")
    }
    config = json.loads(files["config.json"])
    assert (config["_name_or_path"], config["note"]) == ("first", "made in work, (by me)")


def an_adapter(folder: Path, base: str, head: str = "license: mit\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{head}---\n# mine\n")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 1, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "fusionlab.json").write_text(json.dumps({"base": base}))
    save_file({"w": torch.ones(8)}, folder / "adapter_model.safetensors")
    return folder


def test_the_base_s_id_in_place_of_a_folder(hub: Hub, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = an_adapter(base.parent / "mine", str(base))
    assert main([*PUSH, str(folder), "--base", "owner/base@v1"]) == 0
    files = on_hub(hub)
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "v1")
    assert json.loads(files["fusionlab.json"])["base"] == "owner/base@v1"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.text.strip()) == ("owner/base", "mit", "# mine")
    assert "is a folder of this machine" not in capsys.readouterr().out


def test_a_folder_of_the_hub_s_cache_is_its_id(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = tmp_path / "hub" / "models--owner--small-base" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    folder = an_adapter(tmp_path / "mine", str(cached))
    assert main([*PUSH, str(folder)]) == 0
    config = json.loads(on_hub(hub)["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/small-base", COMMIT)
    assert json.loads(on_hub(hub)["fusionlab.json"])["base"] == f"owner/small-base@{COMMIT}"
    assert "is a folder of this machine" not in capsys.readouterr().out


def test_a_dry_run_says_what_is_rewritten(hub: Hub, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = an_adapter(base.parent / "mine", str(base))
    assert main([*PUSH, str(folder), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"note: adapter_config.json is sent otherwise than it is here: 'base' for '{base}'" in shown
    assert re.findall(r"  ([\w.]+)  [\d,]+ bytes, rewritten", shown) == ["adapter_config.json", "fusionlab.json"]
    assert hub.requests == []


def say(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def in_the_header(folder: Path) -> None:
    save_file({"w": torch.ones(8)}, folder / "adapter_model.safetensors", metadata={"from": f"{Path.home()}/runs/1"})


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "a licence": (lambda folder: say(folder, "LICENSE", f"see {folder.parent}/terms."), [], "LICENSE names '"),
    "a card": (lambda folder: say(folder, "README.md", f"---\nlicense: mit\n---\ncd {Path.home()}/work"), [],
               f"README.md names '{Path.home()}/work'"),
    "a card that gets a base": (lambda folder: say(folder, "README.md", f"---\nlicense: mit\n---\n{folder}"),
                                ["--base", "owner/base"], "README.md names '"),
    "weights": (in_the_header, [], f"adapter_model.safetensors names '{Path.home()}/runs/1'"),
    "no id": (lambda folder: None, ["--base", "base"], "expected the base's id on the hub"),
    "another base": (lambda folder: say(folder, "README.md", "---\nbase_model: owner/base\n---\n"),
                     ["--base", "owner/other"], "names 'owner/base' as its base; leave --base out"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rewritten_is_refused_by_name(
    case: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, flags, told = REFUSED[case]
    folder = an_adapter(tmp_path / "mine", "owner/base")
    spoil(folder)
    assert main([*PUSH, str(folder), *flags]) == 2
    assert told in capsys.readouterr().err
    assert hub.requests == []


def test_words_of_a_vocabulary_are_no_places(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    folder = an_adapter(tmp_path / "mine", "owner/base")
    words = json.dumps({"model": {"vocab": {"/root/": 0, "/usr/lib": 1}}})
    say(folder, "tokenizer.json", words)
    assert main([*PUSH, str(folder)]) == 0
    assert on_hub(hub)["tokenizer.json"].decode() == words


def test_a_sweep_s_folder_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(tmp_path, "sweep.json", "{}")
    assert main([*PUSH, str(tmp_path)]) == 2
    assert "is a sweep's folder; give one model's" in capsys.readouterr().err
