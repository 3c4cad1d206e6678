"""Benchmarks and studies ask the package for what it has: they run for hours, and not in the suite."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = [path for path in sorted(FOLDER.rglob("*.py")) if "results" not in path.parts]


def lacking(source: str) -> list[str]:
    """What the source imports of fusionlab, or takes from its modules, that is not there."""
    tree, modules, missing = ast.parse(source), dict[str, ModuleType](), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "fusionlab":
                    modules[alias.asname or "fusionlab"] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fusionlab":
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                try:
                    found = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    missing.append(f"{node.module}.{alias.name}")
                    continue
                if isinstance(found, ModuleType):
                    modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                missing.append(f"{module.__name__}.{node.attr}")
    return missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_it_asks_for_is_there(path: Path) -> None:
    assert not lacking(path.read_text())


def test_what_is_not_there_is_found() -> None:
    source = "import fusionlab\nfrom fusionlab import search\nfrom fusionlab.rules import Nothing\nsearch.lost(1)\n"
    assert sorted(lacking(source + "fusionlab.gone\nsearch.Lorahub")) == [
        "fusionlab.gone",
        "fusionlab.rules.Nothing",
        "fusionlab.search.lost",
    ]
