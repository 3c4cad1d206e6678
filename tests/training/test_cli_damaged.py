"""Damaged files of a run that is gone on with, fused or swept: one message on stderr, exit code 2, nothing changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusionlab.__main__ import main
from fusionlab.commands.sweep.ledger import Ledger
from fusionlab.errors import InputError
from fusionlab.runs.leases import Leases

RUN = ["fit", "--data.max_samples", "8", "--trainer.enable_progress_bar", "false", "--fusion.rules", "[average]"]
RUN += ["--trainer.default_root_dir", "run", "--trainer.max_steps", "1"]
ONE, BOTH = [*RUN, "--data.tasks", "[digits]"], [*RUN, "--data.tasks", "[digits, signs]"]
SWEEP = ["sweep", "--output", "swept", "--runs", "[run]", "--rules", "[average]", "--dry_run"]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 3],
    "binary": lambda content: bytes(range(256)),
    "a list": lambda content: b"[1, 2]",
}
OF_RUN = r"the run in 'run': 'run/config\.yaml'"
MEND = r"put the file back, or run it anew by fit --overwrite$"
CONFIGS = {
    "empty": rf"{OF_RUN} holds nothing, expected a mapping; {MEND}",
    "cut": rf"{OF_RUN}( is not YAML: .*|: data is missing); {MEND}",
    "binary": rf"{OF_RUN} is not YAML: .*; {MEND}",
    "a list": rf"{OF_RUN} holds a list, expected a mapping; {MEND}",
    "a folder": rf"{OF_RUN} cannot be read: is a directory; {MEND}",
}
LAST = r"the run's own 'run/checkpoints/last\.ckpt' is no checkpoint, or is cut short; give --overwrite to start anew"
OF_PART = r"the run in 'run/parts/digits': 'run/parts/digits/"
CKPT = r"the checkpoint of digits"
PARTS: dict[str, tuple[str, str | None, str]] = {
    "an empty mark": ("trained.json", "empty", rf"{OF_PART}trained\.json' is not valid JSON: it is empty; {MEND}"),
    "a mark of something else": ("trained.json", "a list", rf"{OF_PART}trained\.json' holds a list, expected"),
    "an empty configuration": ("config.yaml", "empty", rf"{OF_PART}config\.yaml' holds nothing, expected"),
    "no configuration": ("config.yaml", None, rf"{OF_PART}config\.yaml' cannot be read: no such file or directory"),
    "no checkpoint": ("checkpoints/last.ckpt", None, rf"{CKPT}: '\S+last\.ckpt' cannot be read: no such file"),
    "a cut checkpoint": ("checkpoints/last.ckpt", "cut", rf"{CKPT} '\S+last\.ckpt' is no checkpoint, or is cut short"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``finished``, a run of one task, and ``parts``, one of two tasks of which one is trained."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(ONE) == 0
        Path("run").rename("finished")
        assert main([*ONE, "--train_only"]) == 0
        Path("run").rename("parts")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damage(path: Path, how: str | None) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how is not None:
        path.write_bytes(DAMAGES[how](content))


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def assert_told(argv: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents()
    capfd.readouterr()
    code = main(argv)
    stderr = capfd.readouterr().err
    assert code == 2, stderr
    assert stderr.startswith("fusionlab: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert re.search(message, stderr), stderr
    assert contents() == before


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("argv", [ONE, [*ONE, "--dry_run"], BOTH, SWEEP], ids=["fit", "dry_run", "extend", "sweep"])
def test_configuration(argv: list[str], how: str, whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "finished", "run")
    damage(Path("run/config.yaml"), how)
    if argv is ONE:  # an unfinished one
        Path("run/results.json").unlink()
    assert_told(argv, CONFIGS[how], capfd)


@pytest.mark.parametrize("how", ["empty", "cut", "binary", "a folder"])
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["fit", "dry_run"])
def test_last_checkpoint(more: list[str], how: str, whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "finished", "run")
    Path("run/results.json").unlink()
    damage(Path("run/checkpoints/last.ckpt"), how)
    assert_told([*ONE, *more], "last.ckpt' cannot be read: is a directory" if how == "a folder" else LAST, capfd)


def test_last_checkpoint_without_optimizer(whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "finished", "run")
    Path("run/results.json").unlink()
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, "run/checkpoints/last.ckpt")
    assert_told(ONE, r"is no whole checkpoint of fit: it lacks optimizer_states; give --overwrite", capfd)


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["fit", "dry_run"])
def test_part(more: list[str], case: str, whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, how, message = PARTS[case]
    shutil.copytree(whole / "parts", "run")
    damage(Path("run/parts/digits") / name, how)
    assert_told([*BOTH, *more], message, capfd)


def test_tasks_that_were_taken_over(whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "finished", "run")
    Path("run/results.json").unlink()
    Path("run/parts").mkdir()
    Path("run/parts/taken.json").write_text("{}")
    assert_told(ONE, r"the run in 'run': 'run/parts/taken\.json' holds \{\}, expected a list of names; put", capfd)


@pytest.mark.parametrize("content", ["", "[1]", '{"host": "a"', "{}"])
def test_a_damaged_lease_is_held_until_its_age_is_over(content: str, tmp_path: Path) -> None:
    lease = tmp_path / "digits.json"
    lease.write_text(content)
    leases = Leases(tmp_path, seconds=60)
    holder = leases.take("digits")
    assert holder is not None
    assert re.fullmatch(r"a process that '\S+digits\.json' does not tell, which is damaged; .* is \d+ s old", holder)
    assert lease.read_text() == content
    old = time.time() - 61
    os.utime(lease, (old, old))
    assert leases.take("digits") is None
    assert json.loads(lease.read_text()) == leases.owner
    leases.close()
    assert not lease.exists()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_record_of_a_sweep(how: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.put("abc", {"kind": "point"})
    damage(tmp_path / "points" / "ab" / "abc.json", how)
    message = r"ledger: '\S+abc\.json' (is not valid JSON|holds a list).*; remove the file, so that it is made anew"
    with pytest.raises(InputError, match=message):
        ledger.get("abc")
    with pytest.raises(InputError, match=message):
        list(ledger.records())


def test_fit_beside_a_damaged_lease(whole: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("run/leases").mkdir(parents=True)
    Path("run/leases/digits.json").write_text("")
    assert_told(ONE, r"task 'digits' is being trained by a process that 'run/leases/digits\.json' does not", capfd)
