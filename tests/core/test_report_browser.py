"""The report's page in Chromium: axe-core finds nothing grave, nothing is asked for, keys and buttons do what they say.

``make test-browser``. What is missing for it is said where it is skipped.
"""

import json
import os
from pathlib import Path

import pytest
from chromium import program, visit
from report_folders import rows_of_run, written, written_sweep

from fusionlab.reporting.comparison import comparisons
from fusionlab.reporting.markup import as_html
from fusionlab.reporting.sections import sections_of

AXE = Path(os.environ.get("FUSIONLAB_AXE", "axe.min.js"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(program() is None, reason="no Chromium: install it (Debian: apt-get install chromium)"),
]
FINDINGS = (
    "axe.run(document).then(found => JSON.stringify(found.violations.map("
    "each => [each.id, each.impact, each.nodes.slice(0, 3).map(node => node.html.slice(0, 120))])))"
)
WIDTH = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs and a sweep, with all that a page can hold but pictures."""
    root = tmp_path_factory.mktemp("report")
    folders = [written(root / name, rows_of_run()) for name in ("one", "two")]
    log = folders[0] / "metrics.csv"
    log.write_text("step,train/a/loss,train/b/loss\n" + "\n".join(f"{step},1.0,{2 / (step + 1)}" for step in range(9)))
    folders.append(written_sweep(root / "sweep"))
    sections = [section for folder in folders for section in sections_of(folder)]
    path = root / "report.html"
    path.write_text(as_html("A report", [*comparisons(folders, ["one", "two", "sweep"]), *sections]))
    return path


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: FUSIONLAB_AXE names no axe.min.js (npm install axe-core)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_axe_finds_nothing_grave_and_nothing_sticks_out(page: Path, width: int, scheme: str) -> None:
    unfold = "document.querySelectorAll('details').forEach(each => { each.open = true })"
    seen = visit(page, [WIDTH, unfold, f"{AXE.read_text()};0", FINDINGS], width=width, scheme=scheme)
    assert seen.values[0] <= width
    assert [each for each in json.loads(seen.values[3]) if each[1] in ("serious", "critical")] == []


def test_no_request_leaves_the_page_and_its_script_has_no_error(page: Path) -> None:
    seen = visit(page, ["document.querySelectorAll('svg.chart .point').length"])
    assert seen.values[0] > 20
    assert seen.requests == [page.resolve().as_uri()]
    assert seen.errors == []


def test_arrows_go_from_point_to_point_and_say_its_numbers(page: Path) -> None:
    press = (
        "(key => { document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})); "
        "const at = document.activeElement; const told = document.getElementById('told'); "
        "return [at.getAttribute('aria-label'), told.hidden ? null : told.textContent] })"
    )
    focus = "document.querySelector('svg.chart .point').focus()"
    first, second, last, back = visit(page, [
        f"{focus}; {press}('x')", f"{press}('ArrowRight')", f"{press}('End')", f"{press}('Home')",
    ]).values  # fmt: skip
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert second != first
    assert last[0] == last[1]
    assert back == first


def test_a_column_sorts_by_numbers_first_from_the_highest(page: Path) -> None:
    column = (
        "(() => { const table = [...document.querySelectorAll('table')].find(each => each.tHead.textContent.includes("
        "'data version')); table.querySelector('th:nth-child({0}) button').click(); "
        "return [...table.tBodies[0].rows].map(row => row.cells[0].textContent) })()"
    )
    by_name = [column.replace("{0}", "1")] * 2
    down, up = visit(page, by_name).values
    assert down == sorted(down, reverse=True)
    assert up == sorted(down)
    assert len(set(down)) > 1
