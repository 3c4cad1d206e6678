"""What a release says of itself, it says once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from lowest import bounds, plain, recorded

from fusionlab.__main__ import main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_changelog_and_the_citation() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert PROJECT["version"] in capsys.readouterr().out


def test_what_is_told_to_be_an_extra_is_one() -> None:
    texts = [
        path.read_text() for folder in ("fusionlab", "docs", "tests") for path in (ROOT / folder).rglob("*.[pm][yd]")
    ]
    texts.append((ROOT / "README.md").read_text())
    told = {extra for text in texts for extra in re.findall(r"fusionlab\[(\w+)\]", text)}
    assert {"search", "gguf", "loggers"} <= told
    assert told <= set(PROJECT["optional-dependencies"])
    assert (ROOT / "fusionlab" / "py.typed").is_file()


def test_lower_bounds_are_those_with_which_the_tests_passed() -> None:
    """``make test-lowest`` writes the record at its end; who changes a bound runs it again."""
    stated, passed = ({name: plain(each) for name, each in versions.items()} for versions in (bounds(), recorded()))
    assert stated == passed


def test_a_requirement_says_one_lower_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowest.ROOT", tmp_path)

    def stated(required: str, more: str) -> dict[str, str]:
        extras = f'[project.optional-dependencies]\nx = ["{more}"]'
        built = '[build-system]\nrequires = ["d>=7"]\n'
        text = f'{built}[project]\nname = "a"\ndependencies = ["{required}"]\n{extras}'
        (tmp_path / "pyproject.toml").write_text(text)
        return bounds()

    assert stated("b[c]>=1.0", "a[test]") == {"b": "1.0", "d": "7"}
    for required, extra in (("b", "a[y]"), ("b>=1,<2", "a[y]"), ("b>=1", "b>=2")):
        with pytest.raises(ValueError, match=r"expected NAME>=VERSION, and one version for each name"):
            stated(required, extra)
