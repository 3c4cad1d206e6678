"""Norms kept beside an input are believed only for the very content that they were measured on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionlab.__main__ import main
from fusionlab.adapters import Adapter, Factors, save_adapter
from fusionlab.layout import STATS
from fusionlab.tensors import fingerprints
from fusionlab.tensors.fingerprints import END_BYTES, file_records, fingerprint

SHAPES = {"layers.0.w": (80, 70), "layers.1.w": (4, 3), "bias": (5,)}  # the first is longer than both of its ends


def state_of(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def moved(base: dict[str, Tensor], seed: int, scale: float) -> dict[str, Tensor]:
    task_vector = state_of(seed, scale)
    return {name: base[name] + task_vector[name] for name in base}


def write_safetensors(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def write_sharded(folder: Path, state: dict[str, Tensor]) -> None:
    files = {name: f"model-0000{1 + (name == 'bias')}-of-00002.safetensors" for name in state}
    for file in sorted(set(files.values())):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_old_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "safetensors": write_safetensors,
    "sharded": write_sharded,
    "bin": write_bin,
    "old bin": write_old_bin,
}


def exchanged(folder: Path, write: Callable[[Path], None]) -> None:
    """Write other content into the same files; size (but of old pickles) and modification time are as before."""
    before = {path.name: path.stat() for path in folder.iterdir() if path.name != STATS}
    write(folder)
    for name, found in before.items():
        os.utime(folder / name, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert abs((folder / name).stat().st_size - found.st_size) <= (64 if name.endswith(".bin") else 0)


def fuse(folder: Path, name: str, *flags: str, inputs: dict[str, str] | None = None) -> dict[str, float]:
    inputs = inputs or {"a": str(folder / "a"), "b": str(folder / "b")}
    argv = ["fuse", "--base", str(folder / "base"), "--finetuned", json.dumps(inputs), "--rule", "metagpt"]
    assert main([*argv, "--output", str(folder / name), *flags]) == 0
    return json.loads((folder / name / "fusion.json").read_text())["scaling_coefficients"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    write_safetensors(tmp_path / "base", state_of(0))
    return tmp_path


def of_norms(first: float, second: float) -> dict[str, float]:
    return {"a": pytest.approx(first**2 / (first**2 + second**2), rel=1e-5),
            "b": pytest.approx(second**2 / (first**2 + second**2), rel=1e-5)}  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--hash",)], ids=["", "hash"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_exchanged_for_one_of_equal_size_and_time(kind: str, flags: tuple[str, ...], folder: Path) -> None:
    base = state_of(0)
    for task in ("a", "b"):
        WRITERS[kind](folder / task, moved(base, 3, 0.1))
    assert fuse(folder, "first", *flags) == of_norms(1, 1)
    exchanged(folder / "a", lambda path: WRITERS[kind](path, moved(base, 3, 0.3)))
    assert fuse(folder, "second", *flags) == of_norms(3, 1)
    assert fuse(folder, "third", *flags) == of_norms(3, 1)


PLACES = {
    "first tensor, its beginning": ("layers.0.w", 0),
    "first tensor, its end": ("layers.0.w", -1),
    "inside the last of the first 4 KiB": ("layers.0.w", END_BYTES // 4 - 1),
    "inside the first of the last 4 KiB": ("layers.0.w", -(END_BYTES // 4)),
    "a small tensor": ("layers.1.w", 6),
    "the last tensor": ("bias", 4),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", WRITERS)
def test_without_the_change_time_the_ends_of_every_tensor_tell(
    kind: str, place: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "times", lambda found: {"mtime_ns": found.st_mtime_ns})
    state, (name, index) = moved(state_of(0), 3, 0.1), PLACES[place]
    for task in ("a", "b"):
        WRITERS[kind](folder / task, state)
    assert fuse(folder, "first") == of_norms(1, 1)
    state[name] = state[name].clone()
    state[name].view(-1)[index] += 1000
    exchanged(folder / "a", lambda path: WRITERS[kind](path, state))
    assert fuse(folder, "second")["a"] > 0.99


@pytest.mark.parametrize("kind", ["safetensors", "sharded"])
def test_hash_means_all_of_the_content(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle of a tensor, with no time to tell: believed by default, as is said, and never with --hash."""
    monkeypatch.setattr(fingerprints, "times", lambda found: {})
    state = moved(state_of(0), 3, 0.1)
    for task in ("a", "b"):
        WRITERS[kind](folder / task, state)
    for name in ("first", "hashed first"):
        assert fuse(folder, name, *(["--hash"] if "hashed" in name else [])) == of_norms(1, 1)
    state["layers.0.w"] = state["layers.0.w"].clone()
    state["layers.0.w"].view(-1)[2500] += 1000
    exchanged(folder / "a", lambda path: WRITERS[kind](path, state))
    assert fuse(folder, "second") == of_norms(1, 1)
    assert fuse(folder, "hashed", "--hash")["a"] > 0.99


def test_hash_is_by_content_whatever_the_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionlab.rules import Metagpt

    for task, scale in (("a", 0.3), ("b", 0.1)):
        write_safetensors(folder / task, moved(state_of(0), 3, scale))
    assert fuse(folder, "first", "--hash") == of_norms(3, 1)
    for task in ("a", "b"):
        os.utime(folder / task / "model.safetensors", (1, 1))
    measure, measured = Metagpt.measure, []
    monkeypatch.setattr(Metagpt, "measure", lambda *args: measured.append(args[2].numel()) or measure(*args))
    assert fuse(folder, "again", "--hash") == of_norms(3, 1)
    assert set(measured) <= {4}  # the tiny tensors that a rule is tried on
    assert fuse(folder, "by times") == of_norms(3, 1)
    assert set(measured) > {4}


@pytest.mark.parametrize("flags", [(), ("--hash",)], ids=["", "hash"])
def test_another_base_of_equal_size_and_time(flags: tuple[str, ...], folder: Path) -> None:
    base = state_of(0)
    write_safetensors(folder / "a", moved(base, 3, 0.1))
    write_safetensors(folder / "b", moved(base, 4, 0.1))
    first = fuse(folder, "first", *flags)
    other = {name: value - 0.5 * (moved(base, 3, 0.1)[name] - value) for name, value in base.items()}
    exchanged(folder / "base", lambda path: write_safetensors(path, other))
    second = fuse(folder, "second", *flags)
    assert abs(second["a"] - first["a"]) > 0.05


def adapter(scale: float, lora_alpha: float = 16.0) -> Adapter:
    generator = torch.Generator().manual_seed(7)
    factors = {
        "layers.0": Factors(torch.randn(2, 70, generator=generator), scale * torch.randn(80, 2, generator=generator),
                            lora_alpha),
    }  # fmt: skip
    return Adapter(factors, base_model="base")


@pytest.mark.parametrize("change", ["factors", "lora_alpha", "factors, whose times are kept", "nothing"])
@pytest.mark.parametrize("flags", [(), ("--hash",)], ids=["", "hash"])
def test_adapters(change: str, flags: tuple[str, ...], folder: Path) -> None:
    write_safetensors(folder / "base", {"layers.0.weight": torch.randn(80, 70)})
    for task in ("a", "b"):
        save_adapter(folder / task, adapter(0.1))
        (folder / task / "config.json").unlink()
    assert fuse(folder, "first", *flags) == of_norms(1, 1)
    if change == "nothing":
        kept = (folder / "a" / STATS).read_bytes()
        assert fuse(folder, "second", *flags) == of_norms(1, 1)
        assert (folder / "a" / STATS).read_bytes() == kept
        return
    if change == "lora_alpha":
        path = folder / "a" / "adapter_config.json"
        before, text = path.stat(), path.read_text()
        assert '"lora_alpha": 16' in text
        path.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 48'))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        file = folder / "a" / "adapter_model.safetensors"
        before, state = file.stat(), load_file(file)
        save_file({name: 3 * value if "lora_B" in name else value for name, value in state.items()}, file,
                  {"format": "pt"})  # fmt: skip
        if "times" in change:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fuse(folder, "second", *flags) == of_norms(3, 1)


def test_single_files(folder: Path) -> None:
    base, inputs = state_of(0), {"a": str(folder / "a.safetensors"), "b": str(folder / "b.pt")}
    save_file(moved(base, 3, 0.1), inputs["a"])
    torch.save(moved(base, 3, 0.1), inputs["b"])
    assert fuse(folder, "first", inputs=inputs) == of_norms(1, 1)
    for path, save in ((Path(inputs["a"]), save_file), (Path(inputs["b"]), torch.save)):
        before = path.stat()
        save(moved(base, 3, 0.3), path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fuse(folder, "second", inputs=inputs) == of_norms(1, 1)
    norms = json.loads((folder / "second" / "fusion.json").read_text())["norms"]
    first = json.loads((folder / "first" / "fusion.json").read_text())["norms"]
    assert norms == {task: pytest.approx(3 * value, rel=1e-4) for task, value in first.items()}


def test_norms_of_files_that_change_while_they_are_measured_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusionlab.fusion import streamed

    base = state_of(0)
    for task in ("a", "b"):
        write_safetensors(folder / task, moved(base, 3, 0.1))
    run = streamed.run

    def changed(*args: Any, **kwargs: Any) -> Any:
        outcome = run(*args, **kwargs)
        write_safetensors(folder / "a", moved(base, 3, 0.3))
        return outcome

    monkeypatch.setattr(streamed, "run", changed)
    fuse(folder, "first")
    assert "the files of 'a' or of the base changed meanwhile" in capsys.readouterr().out
    assert not (folder / "a" / STATS).exists()
    assert (folder / "b" / STATS).exists()
    monkeypatch.undo()
    assert fuse(folder, "second") == of_norms(3, 1)


def test_norms_kept_by_an_earlier_version_are_measured_again(folder: Path, tmp_path: Path) -> None:
    """A run by commit 3a16601: what its key lacked is not believed, whatever it says."""
    run = Path(__file__).parents[1] / "fixtures" / "at_3a16601" / "run_clip"
    shutil.copytree(run / "adapters", tmp_path / "adapters")
    expected = json.loads((run / "fused" / "metagpt" / "fusion.json").read_text())
    for task in ("digits", "signs"):
        path = tmp_path / "adapters" / task / STATS
        content = json.loads(path.read_text())
        assert content["schema"] == 2
        [entry] = content["task_vectors"].values()
        entry["squared_norm"] = {name: [1e6] for name in entry["squared_norm"]}
        path.write_text(json.dumps(content))
    from fusionlab.backbones import ASSETS

    argv = ["fuse", "--base", str(ASSETS / "tiny-clip"), "--rule", "metagpt", "--output", str(tmp_path / "fused")]
    for task in ("digits", "signs"):
        argv += [f"--finetuned.{task}", str(tmp_path / "adapters" / task)]
    assert main(argv) == 0
    record = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    assert record["scaling_coefficients"] == pytest.approx(expected["scaling_coefficients"], rel=1e-6)
    assert json.loads((tmp_path / "adapters" / "digits" / STATS).read_text())["schema"] > 2


@pytest.mark.parametrize("change", ["content", "name", "size", "modified", "nothing"])
@pytest.mark.parametrize("content", [False, True])
def test_what_a_file_is_known_by(change: str, content: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"r": 1}')
    before = fingerprint(file_records([file], content=content))
    if change == "content":
        file.write_text('{"r": 2}')
    elif change == "name":
        file = file.rename(tmp_path / "b.json")
    elif change == "size":
        file.write_text('{"r": 10}')
    elif change == "modified":
        os.utime(file, (1, 1))
    same = change == "nothing" or (content and change == "modified")
    assert (fingerprint(file_records([file], content=content)) == before) is same
