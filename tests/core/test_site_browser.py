"""The documentation site in Chromium: no request leaves it, its scripts have no error, its formulas are drawn.

``make test-browser``, after ``make docs``. What is missing for it is said where it is skipped.
"""

from pathlib import Path

import pytest
from chromium import program, visit

SITE = Path(__file__).parents[2] / "docs" / "_build"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(program() is None, reason="no Chromium: install it (Debian: apt-get install chromium)"),
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site in docs/_build: make docs"),
]
# a page of each sort, the search with a word, and how many formulas it has at least
PAGES = {
    "index.html": 0,
    "rules.html": 0,
    "protocols.html": 1,
    "made/rules/metagpt.html": 0,
    "made/commands/fit.html": 0,
    "made/api.html": 0,
    "tutorials/fuse.html": 0,
    "search.html": 0,
}
DRAWN = "window.MathJax?.startup ? MathJax.startup.promise.then(() => {0}) : {0}"
COUNT = "document.querySelectorAll('mjx-container').length"


@pytest.mark.parametrize("page", PAGES)
def test_no_request_leaves_the_site(page: str) -> None:
    seen = visit(SITE / page, [DRAWN.replace("{0}", COUNT), "document.fonts.ready.then(() => document.title)"])
    assert seen.values[0] >= PAGES[page]
    assert seen.values[1]
    site = f"{SITE.resolve().as_uri()}/"
    assert len(seen.requests) > 1
    assert [url for url in seen.requests if not url.startswith((site, "data:"))] == []
    assert seen.errors == []


def test_a_request_that_leaves_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script src='http://127.0.0.1:9/x.js'></script>")
    assert "http://127.0.0.1:9/x.js" in visit(page, []).requests
