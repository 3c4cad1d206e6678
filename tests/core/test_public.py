"""The public list: every name is there, documented, and handed out without anything heavy before it is asked for."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusionlab
from fusionlab.__main__ import main
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", fusionlab.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    public = getattr(fusionlab, name)
    assert len(inspect.getdoc(public) or "") > 30
    assert public.__doc__, f"{name} has the docstring of its base"


def test_the_list_is_complete() -> None:
    assert {"fuse", "fuse_checkpoints", "sweep", "evaluate", "load", "FusionCallback"} <= set(fusionlab.__all__)
    used = set(re.findall(r"fusionlab\.(\w+)\(", (ROOT / "README.md").read_text()))
    assert used <= set(fusionlab.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'fuze'; it has .*fuse_checkpoints"):
        fusionlab.fuze  # noqa: B018


@pytest.mark.parametrize("name", ["fuse", "fuse_checkpoints", "sweep", "evaluate", "load"])
def test_functions_say_what_they_take_give_and_refuse(name: str) -> None:
    function = getattr(fusionlab, name)
    for section in ("Args:", "Returns:", *(["Raises:"] if name != "evaluate" else [])):
        assert section in (inspect.getdoc(function) or ""), section
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in (inspect.getdoc(function) or ""), argument


def seen_in(code: str, cwd: Path) -> set[str]:
    """The packages that Python has imported after ``code``."""
    code = f"import sys; {code}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import fusionlab; assert fusionlab.__all__"
    assert not {"torch", "lightning", "transformers", "datasets", "numpy"} & seen_in(code, tmp_path)


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, object]:
    import torch
    from safetensors.torch import save_file

    for number, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        state = {"w": torch.full((4, 3), float(number)), "b": torch.full((3,), 2.0 * number)}
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    finetuned = {name: str(tmp_path / name) for name in ("a", "b")}
    return {"base": str(tmp_path / "base"), "finetuned": finetuned, "output": str(tmp_path / "out"), "rule": "average"}


def test_fuse_without_a_model_imports_neither_lightning_nor_a_model(
    checkpoints: dict[str, object], tmp_path: Path
) -> None:
    seen = seen_in(f"import fusionlab; fusionlab.fuse_checkpoints({checkpoints!r})", tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "fusionlab.engine" in seen
    assert not {"lightning", "pytorch_lightning", "peft", "datasets", "fusionlab.modules", "fusionlab.data"} & seen
    assert not [name for name in seen if name.startswith("transformers.models.") and ".modeling_" in name]


@pytest.mark.parametrize("given", ["recipe", "mapping", "path"])
def test_a_recipe_is_given_in_three_ways(given: str, checkpoints: dict[str, object], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "recipe.yaml").write_text(json.dumps(checkpoints))
    ways = {"recipe": Recipe(**checkpoints), "mapping": checkpoints, "path": tmp_path / "recipe.yaml"}  # type: ignore[arg-type]
    assert fusionlab.fuse_checkpoints(ways[given]) == tmp_path / "out"
    fused = load_file(tmp_path / "out" / "model.safetensors")
    assert (fused["w"] == 1.5).all()
    assert (fused["b"] == 3.0).all()


def test_hints_name_no_flag_that_appends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "--bas", "x"]) == 2
    assert capsys.readouterr().err == "fusionlab: unknown key 'bas'; did you mean 'base'?\n"


MISTAKES = {
    "key": ({"fintuned": {}}, "unknown key 'fintuned'; did you mean 'finetuned'"),
    "type": ({"threads": "many"}, "threads: expected int, got 'many'"),
    "choice": ({"save": "both"}, "save: no such choice 'both'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_recipe_is_refused_as_on_the_command_line(
    case: str, checkpoints: dict[str, object], tmp_path: Path
) -> None:
    more, expected = MISTAKES[case]
    with pytest.raises(InputError, match=expected):
        fusionlab.fuse_checkpoints({**checkpoints, **more})
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(checkpoints: dict[str, object]) -> None:
    checkpoints.pop("output")
    with pytest.raises(InputError, match="missing: output"):
        fusionlab.fuse_checkpoints(checkpoints)
    with pytest.raises(InputError, match="missing: output"):
        fusionlab.sweep({"methods": ["lora"]})
