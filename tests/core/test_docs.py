"""The documentation says what the package is: its generated pages, its numbers, its links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import fusionlab
from fusionlab.__main__ import COMMANDS
from fusionlab.commands.fuse.mergekit.methods import METHODS as MERGEKIT
from fusionlab.evaluation.rows import LM_EVAL, ROW_FIELDS
from fusionlab.reporting.protocols import Denominators, Score, measure
from fusionlab.rules.config import known_rules, known_task_known_rules
from fusionlab.search.base import known_searches, rule_or_search

DOCS = Path(__file__).parents[2] / "docs"
METHODS = {**known_rules(), **known_task_known_rules(), **known_searches()}


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages, check = _module("pages"), _module("check")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("docs") / "made"
    pages.write(folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_formula_cost_and_a_configuration_that_loads(name: str, made: Path) -> None:
    text = (made / "rules" / f"{name}.md").read_text()
    first = (METHODS[name].__doc__ or "").partition("\n\n")[0].split()
    assert pages._text(" ".join(first)) in " ".join(text.split())
    assert "- cost: " in text
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    expected = METHODS["validated_masks" if name == "tall" else name]  # without a threshold the search for it
    assert type(rule_or_search(yaml.safe_load(shown)["rule"])) is expected


def test_figures_are_those_of_the_results(made: Path) -> None:
    text = (made / "rules" / "ties.md").read_text()
    assert "| full | 0.571 ± 0.034 | 0.418 ± 0.022 | 0.364 ± 0.030 |" in text
    assert "| tangent_lora | 0.495 ± 0.031 | 0.655 ± 0.007 | 0.597 ± 0.021 |" in text
    assert "| average | 0.531 ± 0.048 |" in (made / "finetuning" / "full.md").read_text()
    assert "When it helps here" not in (made / "rules" / "karcher.md").read_text()
    measured = {line[1] for folder in pages._TABLES for line in pages.measured(folder)}
    assert measured == set(pages._MEASURED_AS), "a rule of the tables has no page"


def test_every_flag_is_listed(made: Path) -> None:
    parsers = pages.parsers()
    assert set(parsers) == {"fit", "validate", "test", "predict", "fuse", "sweep", "push", "report"}
    for command, parser in parsers.items():
        text = (made / "commands" / f"{command}.md").read_text()
        found = [name for name, _, _ in pages.flags(parser)]
        assert len(found) > 3
        assert all(f"| `--{name}` |" in text for name in found)
    assert (
        "| `--memory_budget` | `1GB` | bytes beyond the libraries, such as 1GB. |"
        in (made / "commands" / "fuse.md").read_text()
    )


def test_every_public_name_is_there(made: Path) -> None:
    headings = re.findall(r"^## (\w+)$", (made / "api.md").read_text(), flags=re.MULTILINE)
    assert headings == fusionlab.__all__


def test_every_row_field_is_there() -> None:
    known = yaml.safe_load((DOCS / "rows.yaml").read_text())
    assert list(known["fields"]) == list(ROW_FIELDS)
    assert list(known["further"]) == ["limited", LM_EVAL, "masks", "mask_thresholds"]


def test_the_worked_example_is_what_the_package_computes() -> None:
    text = (DOCS / "protocols.md").read_text()
    full = {"digits": 0.90, "signs": 0.80}
    methods: dict[str, tuple[dict[str, float], dict[str, float]]] = {
        "A": ({"digits": 0.80, "signs": 0.75}, {"digits": 0.60, "signs": 0.60}),
        "B": ({"digits": 0.60, "signs": 0.60}, {"digits": 0.54, "signs": 0.56}),
    }
    for name, (own, fused) in methods.items():
        found = measure(Score(tuple(full), (), fused), Denominators(tuple(full), own, full))
        said = " | ".join(f"{found[criterion]:.3f}" for criterion in ("abs_sub", "own_sub", "full_sub"))
        assert f"| method {name} | {said} |" in text


def test_links_of_the_pages_lead_somewhere(made: Path) -> None:
    written = [*DOCS.glob("*.md"), *(DOCS / "tutorials").glob("*.md"), *made.rglob("*.md")]
    count = 0
    for page in written:
        place = DOCS / "made" / page.relative_to(made) if page.is_relative_to(made) else page
        for link in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            target = (place.parent / link).resolve()
            generated = target.is_relative_to(DOCS / "made")
            real = made / target.relative_to(DOCS / "made") if generated else target
            assert real.is_file(), f"{page.name}: {link}"
            count += 1
    assert count > 30


def test_a_broken_link_and_a_foreign_script_are_found(tmp_path: Path) -> None:
    def site(body: str) -> list[Any]:
        (tmp_path / "a.html").write_text(f"<h1 id='top'>a</h1>{body}")
        found: list[Any] = check.faults(tmp_path)
        return found

    assert site("<a href='a.html#top'>x</a><a href='https://arxiv.org'>y</a>") == []
    assert site("<a href='b.html'>x</a>") == ["a.html: no b.html"]
    assert site("<a href='#bottom'>x</a>") == ["a.html: no part #bottom"]
    assert site("<script src='https://host/x.js'></script>") == ["a.html: loads https://host/x.js"]


def test_mergekit_methods_are_those_that_are_read() -> None:
    listed = (DOCS / "migration.md").read_text().partition("`merge_method` are read: ")[2].partition(".\n")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(MERGEKIT)


def test_flags_of_every_shown_command_exist() -> None:
    known = {command: {name for name, _, _ in pages.flags(parser)} for command, parser in pages.parsers().items()}
    classes = {"model", "data", "rule", "finetuned"}
    count = 0
    for page in [*DOCS.glob("*.md"), *(DOCS / "tutorials").glob("*.md"), DOCS.parent / "README.md"]:
        text = page.read_text().replace("\\\n", " ")
        for command, arguments in re.findall(r"python -m fusionlab (\w+)([^`\n]*)", text):
            assert command in COMMANDS, f"{page.name}: {command}"
            for flag in re.findall(r"--([\w.]+)", arguments):
                is_of_class = flag.partition(".")[0] in classes and "." in flag
                assert is_of_class or flag in known[command], f"{page.name}: {command} --{flag}"
                count += 1
    assert count > 40
