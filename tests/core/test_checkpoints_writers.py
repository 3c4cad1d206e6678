"""Folders that appear whole or not at all, and weights that the safetensors library reads back."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusionlab.errors import InputError
from fusionlab.files import write_folder
from fusionlab.tensors import open_checkpoint, save_state

STATE = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "wide": torch.randn(2, 2, dtype=torch.float64),
    "ids": torch.arange(6).view(2, 3),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).T,
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 60])
def test_every_dtype_comes_back_through_the_library_and_through_us(max_shard_size: int, tmp_path: Path) -> None:
    with write_folder(tmp_path / "out") as staging:
        save_state(staging, STATE, {"made": "here"}, max_shard_size=max_shard_size)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == 60)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for found in (read, open_checkpoint(tmp_path / "out").state()):
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], STATE[name]) and found[name].dtype == STATE[name].dtype for name in STATE)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with write_folder(tmp_path / "deep" / "out") as staging:
        (staging / "file").write_text("content")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "content"
    assert names(tmp_path / "deep") == ["out"]


def test_nothing_remains_of_a_block_that_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with write_folder(tmp_path / "out") as staging:
            (staging / "file").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert names(tmp_path) == []


def test_a_full_disk_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the disk of '.*out' is full"), write_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_what_exists_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with write_folder(tmp_path / "out", overwrite=True) as staging:
            (staging / content).touch()
    assert names(tmp_path / "out") == ["new"]
    with pytest.raises(InputError, match=r"the output '.*out' exists"), write_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_leftovers_go_unless_a_process_holds_them(tmp_path: Path) -> None:
    dead, held, other = (tmp_path / name for name in (".out.tmp-1-aa", ".out.tmp-2-bb", ".outer.tmp-3-cc"))
    for folder in (dead, held, other):
        folder.mkdir()
    handle = os.open(held, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    with write_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [held.name, other.name, "out"]
    os.close(handle)


def test_a_folder_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process looks between its making and its lock."""
    lock, removed = fcntl.flock, []

    def locked(handle: int, how: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".out.tmp-*"))
            removed[0].rmdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    with write_folder(tmp_path / "out") as staging:
        (staging / "file").touch()
    assert names(tmp_path / "out") == ["file"]
    assert len(removed) == 1


def test_an_output_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """What a crash between the two renames of a replacement leaves."""
    aside = tmp_path / ".out.tmp-1-aa-old"
    aside.mkdir()
    (aside / "kept").touch()
    with pytest.raises(InputError, match="exists"), write_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "out") == ["kept"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with write_folder(tmp_path / "out") as staging:
            (staging / "ours").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(InputError, match="appeared meanwhile"):
        race()
    assert names(tmp_path / "out") == ["theirs"]


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"w: torch\.complex64 cannot be stored"):
        save_state(tmp_path, {"w": torch.zeros(2, dtype=torch.complex64)})


def test_readers_give_any_piece_in_any_dtype(tmp_path: Path) -> None:
    state = {"w": torch.randn(100, 41).bfloat16()}
    save_state(tmp_path, state)
    weights = open_checkpoint(tmp_path).weights
    for start, count in ((0, 4100), (17, 333), (4099, 1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            out = torch.empty(count, dtype=dtype)
            weights.read_into("w", start, out)
            assert torch.equal(out, state["w"].flatten()[start : start + count].to(dtype))


def test_the_index_says_where_everything_is(tmp_path: Path) -> None:
    save_state(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)}, max_shard_size=16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    assert index["metadata"] == {"total_size": 32}
