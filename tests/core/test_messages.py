"""What is said of usual mistakes: it names what came, and what to do."""

import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fusionlab.__main__ import main
from fusionlab.backbones.quiet import reason_of
from fusionlab.commands.messages import readable
from fusionlab.commands.trainer import lightning_errors
from fusionlab.errors import InputError
from fusionlab.modules import ClipModule

RUN = Path(__file__).parents[1] / "fixtures" / "at_3a16601" / "run_clip"
FUSE = ["fuse", "--base", "tiny-clip", "--rule", "average"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(RUN, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


MISTAKES: dict[str, tuple[list[str], str]] = {
    "report: misspelt": (["report", "runn"], "give the folder of a finished run or sweep. did you mean 'run'?"),
    "report: a file": (["report", "run/results.json"], "is a file; give the folder of a finished run or sweep, such"),
    "report: unfinished": (["report", "half"], "the run is not finished; give its fit again"),
    "fuse: misspelt": ([*FUSE, "--finetuned.a", "run/adapters/digit", "--output", "out"], "did you mean 'digits'?"),
    "fuse: a run": (
        [*FUSE, "--finetuned.a", "run", "--output", "out"],
        "It is the folder of a run: give adapters/NAME or fused/NAME in it.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_what_to_do(
    mistake: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("a: 1\n")
    argv, expected = MISTAKES[mistake]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "run"]


def test_a_list_that_is_none_is_shown_as_one() -> None:
    told = "Parser key \"data.tasks\": Does not validate. Expected a <class 'list'>. Got value: digits"
    assert readable(told, [], "fit") == "data.tasks: expected a list, got 'digits'; a list is written '[digits]'"


def test_a_configuration_that_is_not_there() -> None:
    told = "Parser key \"config\": File does not exist: '/x/none.yaml'"
    assert readable(told, [], "fit") == "--config: '/x/none.yaml' does not exist; give a YAML file"


REASONS: list[tuple[Exception, str]] = [
    (RuntimeError("Error while deserializing header: invalid header length"), "download the model again"),
    (OSError("Error no file named model.safetensors, found in x."), "x; give a folder with its weight files"),
]


@pytest.mark.parametrize(("error", "expected"), REASONS)
def test_a_model_that_is_not_whole(error: Exception, expected: str) -> None:
    assert expected in reason_of(error)


def test_a_device_that_is_not_there() -> None:
    with (
        pytest.raises(InputError, match=r"No supported gpu backend found!; give --trainer\.accelerator auto"),
        lightning_errors(),
    ):
        raise MisconfigurationException("No supported gpu backend found!")


def test_training_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ClipModule("tiny-clip")
    module.trainer = Trainer(max_steps=-1, max_epochs=-1, logger=False, accelerator="cpu", enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", float("inf"))
    with pytest.raises(InputError, match="give max_steps or max_epochs"):
        module.configure_optimizers()
