"""The documentation's tutorials and commands run, with training cut to two steps."""

import sys
from pathlib import Path

import pytest
from tutorials import DOCS, blocks, run_page

TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
OTHERS = [page for page in sorted(DOCS.glob("*.md")) if any(language == "bash" for language, _ in blocks(page))]


def test_all_pages_are_there() -> None:
    assert [page.stem for page in TUTORIALS] == ["chat", "fuse", "images", "rule"]
    assert [page.stem for page in OTHERS] == ["migration", "recipes", "start"]


SLOW = {"chat", "fuse", "images", "recipes", "migration", "start"}  # half a minute each; make test-slow
PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
    for page in (*TUTORIALS, *OTHERS)
]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    run_page(page, tmp_path, cut=True)
