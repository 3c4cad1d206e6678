"""``push`` sends a model's folder by the stock client to a stand-in for the hub, over its LFS path."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from hub_client import go_offline
from hub_server import READS, WRITES, Fault, Hub
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from fusionlab.__main__ import main

# the stock client hands its HTTP library files in a way that this deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "fusionlab.json"}
STAYS = ("optimizer.pt", "last.ckpt", "fusion_stats.json", "trainer_state.json", ".env", "adapter_model.bin", "run.log")
PUSH = ["push", "--repo", "ours/adapter"]


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a token that may write."""
    monkeypatch.setenv("HF_TOKEN", WRITES)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder, with what must not be sent."""
    folder = tmp_path / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"state")
    for name in STAYS:
        (folder / name).write_text("never")
    (folder / "README.md").write_text("---\nbase_model: owner/base\nlicense: mit\n---\n# mine\n")
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 1, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "fusionlab.json").write_text("{}")
    save_file({"w": torch.ones(8)}, folder / "adapter_model.safetensors")
    return folder


def shard(folder: Path) -> None:
    """The folder as a full model in two files."""
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for number, (key, name) in enumerate(names.items()):
        save_file({key: torch.full((64,), float(number))}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def on_hub(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories["models", "ours/adapter"]
    return repository.commits[repository.branches[branch]]


def test_a_folder_is_sent_whole(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PUSH, "--private", str(folder)]) == 0
    files = on_hub(hub)
    assert set(files) == SENT | {".gitattributes"}
    assert all(files[name] == (folder / name).read_bytes() for name in SENT)
    assert hub.repositories["models", "ours/adapter"].private
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert hub.uploaded == [hashlib.sha256(weights).hexdigest()]  # the large files, by LFS
    shown = capsys.readouterr()
    assert WRITES not in shown.out + shown.err
    assert "pushed 4 files" in shown.out
    commits = len(hub.asked("POST", "/commit/"))
    assert main([*PUSH, str(folder)]) == 0
    assert len(hub.uploaded) == 1
    assert len(hub.asked("POST", "/commit/")) == commits  # nothing is new


def test_another_branch(hub: Hub, folder: Path) -> None:
    assert main([*PUSH, str(folder), "--revision", "next", "--message", "try"]) == 0
    assert set(on_hub(hub)) == {".gitattributes"}
    assert set(on_hub(hub, "next")) == SENT | {".gitattributes"}


def test_a_full_model_s_files(hub: Hub, folder: Path) -> None:
    shard(folder)
    assert main([*PUSH, "--folder", str(folder)]) == 0
    parts = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    more = {"README.md", "fusionlab.json", "config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert set(on_hub(hub)) == parts | more | {".gitattributes"}


def test_masks(hub: Hub, folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    for name in ("unified.safetensors", "masks.safetensors"):
        save_file({"w": torch.ones(8)}, folder / name)
    assert main([*PUSH, str(folder)]) == 0
    parts = {"README.md", "fusionlab.json", "unified.safetensors", "masks.safetensors"}
    assert set(on_hub(hub)) == parts | {".gitattributes"}


def test_after_a_broken_push_the_next_sends_what_is_missing(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(folder)
    second = hashlib.sha256((folder / "model-00002-of-00002.safetensors").read_bytes()).hexdigest()
    hub.faults.append(Fault("PUT", second, None))
    assert main([*PUSH, str(folder)]) == 2
    assert "give the same command again" in capsys.readouterr().err
    assert len(hub.uploaded) == 1
    assert set(on_hub(hub)) == {".gitattributes"}  # whole or not at all
    hub.faults.clear()
    hub.uploaded.clear()
    assert main([*PUSH, str(folder)]) == 0
    assert hub.uploaded == [second]
    assert "model-00001-of-00002.safetensors" in on_hub(hub)


def test_a_dry_run_asks_nobody(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PUSH, str(folder), "--dry_run", "--private"]) == 0
    shown = capsys.readouterr().out
    assert hub.requests == []
    assert "would send 4 files" in shown
    assert "private, where it is new" in shown
    assert all(f"  {name}  " in shown for name in SENT)
    assert "not sent: .env, adapter_model.bin, checkpoints/last.ckpt, fusion_stats.json" in shown


REFUSED = {
    "the token reads only": (READS, Fault("PUT", "never", 200), r"403"),
    "no such token": ("hf_other", Fault("PUT", "never", 200), r"\(401\)"),
    "no such owner": (WRITES, Fault("POST", "repos/create", 404), r"\(404\)"),
    "too many": (WRITES, Fault("POST", "preupload", 429, headers={"Retry-After": "7"}), r"429, Retry-After 7 s"),
    "too many, no time": (WRITES, Fault("POST", "preupload", 429), r"\(429\); try again later"),
    "a fault of the hub": (WRITES, Fault("POST", "objects/batch", 500), r"has a fault \(500\)"),
    "broken off": (WRITES, Fault("POST", "/commit/", None), "the hub did not answer, or broke off"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(
    case: str, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token, fault, told = REFUSED[case]
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults.append(fault)
    assert main([*PUSH, str(folder)]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1
    assert token not in shown.out + shown.err
    assert re.search(told, shown.err), shown.err


def test_without_a_token_or_a_network(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main([*PUSH, str(folder)]) == 2
    assert "no token for the hub" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_two\twords")
    assert main([*PUSH, str(folder)]) == 2
    assert "two" not in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", WRITES)
    go_offline(monkeypatch)
    assert main([*PUSH, str(folder)]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert hub.requests == []


def test_what_is_private_does_not_go_to_a_public_repository(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("ours/adapter", {"README.md": b""})
    assert main([*PUSH, str(folder), "--private"]) == 2
    assert "exists and is public" in capsys.readouterr().err
    assert hub.uploaded == []


def drop(name: str) -> None:
    Path(name).unlink()


def halve(name: str) -> None:
    Path(name).write_bytes(Path(name).read_bytes()[:-4])


BAD = {
    "no folder": (lambda: None, ["nowhere"], "no folder 'nowhere'"),
    "two folders": (lambda: None, ["mine", "other"], "expected one folder, got 2"),
    "a run": (lambda: Path("mine/config.yaml").write_text(""), ["mine"], "is a run folder, with checkpoints"),
    "no card": (lambda: drop("mine/README.md"), ["mine"], "has no README.md"),
    "a card that is no YAML": (lambda: Path("mine/README.md").write_text("---\na: [b\n---\n"), ["mine"], "is not YAML"),
    "no safetensors": (lambda: drop("mine/adapter_model.safetensors"), ["mine"], "only safetensors are sent"),
    "half of the weights": (lambda: halve("mine/adapter_model.safetensors"), ["mine"], "adapter_model.safetensors"),
    "no owner": (lambda: None, ["mine", "--repo", "adapter"], "expected OWNER/NAME"),
    "a flag that there is not": (lambda: None, ["mine", "--publik"], "publik"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_sent_is_told_before_anything_is_asked(
    case: str, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, flags, told = BAD[case]
    monkeypatch.chdir(folder.parent)
    spoil()
    assert main([*PUSH, *flags]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert len(shown.strip().splitlines()) == 1
    assert hub.requests == []
