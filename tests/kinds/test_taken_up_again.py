"""A run is not gone on with, nor given more tasks, on other samples or another base than it was trained on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS
from fusionlab.runs.folder import RunFolder


def picture(file: Path, seed: int) -> None:
    """An uncompressed image: all have one size."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 36, 3), np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two tasks, and a run over the first one."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(ASSETS / "tiny-clip", root / "base")
    for number in range(48):
        for task in ("one", "two"):
            split = ("train", "validation", "test")[number % 3]
            picture(root / task / split / "ab"[number % 2] / f"{number}.bmp", number + 1000 * (task == "two"))
    assert fit(root, ["one"]) == 0
    return root


def fit(root: Path, tasks: list[str]) -> int:
    definitions = json.dumps([{"name": task, "path": str(root / task)} for task in tasks])
    argv = ["fit", "--model.backbone", str(root / "base"), "--model.rank", "1", "--data.tasks", definitions]
    argv += ["--data.batch_size", "4", "--data.eval_batch_size", "8", "--data.cache_dir", str(root / "cache")]
    argv += ["--trainer.max_steps", "2", "--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]
    return main([*argv, "--trainer.default_root_dir", str(root / "run")])


def of(root: Path, old: Path) -> Path:
    """The copied run says where the copy lies."""
    for file in (root / "run").rglob("config.yaml"):
        file.write_text(file.read_text().replace(str(old), str(root)))
    return root


def image_exchanged(root: Path, split: str) -> None:
    file = sorted((root / "one" / split).rglob("*.bmp"))[0]
    before = file.stat()
    picture(file, 77)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def image_of_another_class(root: Path) -> None:
    file = sorted((root / "one" / "train" / "a").glob("*.bmp"))[0]
    file.rename(root / "one" / "train" / "b" / file.name)


def image_added(root: Path) -> None:
    picture(root / "one" / "train" / "a" / "99.bmp", 99)


def weights_moved(root: Path, part: str) -> None:
    file = root / "base" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if part in name)
    save_file(state | {name: state[name] + 0.01 * torch.randn_like(state[name])}, file, {"format": "pt"})


def setting(root: Path, file: str, **changes: object) -> None:
    path = root / "base" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DECIDES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an image exchanged": (lambda root: image_exchanged(root, "train"), "samples"),
    "an image in another class": (image_of_another_class, "samples"),
    "an image more": (image_added, "samples"),
    "a filter": (lambda root: setting(root, "preprocessor_config.json", resample=2), "samples, settings of the base"),
    "a mean": (lambda root: setting(root, "preprocessor_config.json", image_mean=[0.4] * 3), "settings of the base"),
    "an activation": (
        lambda root: setting(root, "config.json", vision_config=vision(root) | {"hidden_act": "relu"}),
        "settings of the base",
    ),
    "a weight of the image tower": (lambda root: weights_moved(root, "vision_model.encoder"), "weights of the base"),
    "a weight of the text tower": (lambda root: weights_moved(root, "text_model.encoder"), "weights of the base"),
}  # fmt: skip
DOES_NOT: dict[str, Callable[[Path], None]] = {
    "nothing": lambda root: None,
    "a test image": lambda root: image_exchanged(root, "test"),
    "a validation image": lambda root: image_exchanged(root, "validation"),
    "a file beside the base": lambda root: (root / "base" / "notes.txt").write_text("x") and None,
    "what made the base": lambda root: setting(root, "config.json", transformers_version="0"),
}


def vision(root: Path) -> dict[str, object]:
    return json.loads((root / "base" / "config.json").read_text())["vision_config"]


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return of(tmp_path / "copy", trained)


@pytest.mark.parametrize(
    ("how", "case"),
    [*(("more tasks", case) for case in DECIDES), *(("unfinished", case) for case in list(DECIDES)[::3])],
)
def test_what_was_trained_on_something_else(
    case: str, how: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = DECIDES[case]
    change(copied)
    if how == "unfinished":
        (copied / "run" / "results.json").unlink()
    before = {file: file.read_bytes() for file in (copied / "run").rglob("*") if file.is_file()}
    capsys.readouterr()
    assert fit(copied, ["one", "two"] if how == "more tasks" else ["one"]) == 2
    message = capsys.readouterr().err
    assert "was trained on what is another now" in message
    assert f"one ({named})" in message
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("case", DOES_NOT)
def test_what_was_not_trained_on(case: str, copied: Path) -> None:
    adapter = copied / "run" / "adapters" / "one" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    DOES_NOT[case](copied)
    assert fit(copied, ["one", "two"]) == 0
    assert adapter.read_bytes() == before
    if case == "a validation image":
        (copied / "run" / "results.json").unlink()
        assert fit(copied, ["one", "two"]) == 0


def test_a_checkpoint_of_an_earlier_version_goes_on(copied: Path) -> None:
    path = copied / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["trained_on"]
    torch.save(checkpoint, path)
    assert fit(copied, ["one", "two"]) == 0


def test_a_base_that_was_converted_for_an_earlier_run_goes_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = {"data": {"init_args": {"tasks": ["one"]}}}
    for overwrite in (False, True):
        folder.begin(config, "new", [], overwrite=overwrite)
        assert not (folder.path / "base").exists()
        (folder.path / "base").mkdir()
        (folder.path / "base" / "model.safetensors").write_bytes(b"of the file that was there then")
