"""What a release says of itself, it says once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_changelog_and_the_citation() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_what_is_told_to_be_an_extra_is_one() -> None:
    texts = [
        path.read_text() for folder in ("fusionlab", "docs", "tests") for path in (ROOT / folder).rglob("*.[pm][yd]")
    ]
    texts.append((ROOT / "README.md").read_text())
    told = {extra for text in texts for extra in re.findall(r"fusionlab\[(\w+)\]", text)}
    assert {"search", "gguf", "loggers"} <= told
    assert told <= set(PROJECT["optional-dependencies"])
    assert (ROOT / "fusionlab" / "py.typed").is_file()
