"""The names in a run's folder and in a sweep's stand in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import structure

from fusionlab import layout

ELSEWHERE = {"data", "backbones", "foreign", "layout"}  # caches and others' formats, which have names of their own
MODULES = {
    name: path for name, path in structure.modules_of(structure.PACKAGE).items()
    if structure.room_of(name) not in ELSEWHERE
}  # fmt: skip


def values() -> set[str]:
    found = set(layout.SCORED.values())
    for name, value in vars(layout).items():
        if name.isupper() and isinstance(value, str):
            found |= set(value.split("/"))
    return found


NAMES = values()
FILES = {name for name in NAMES if "." in name}


def texts(node: ast.AST) -> list[ast.AST]:
    """A text itself, or the parts of a formatted one."""
    return list(node.values) if isinstance(node, ast.JoinedStr) else [node]


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of literals that name a file of such a folder, or a folder in it where a path is made."""
    tree = ast.parse(source)
    in_paths: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            in_paths |= {id(text) for side in (node.left, node.right) for text in texts(side)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("glob", "rglob", "with_name", "joinpath", "Path", "RunFolder"):
                in_paths |= {id(text) for given in node.args for text in texts(given)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split("/")
            if parts[-1].lstrip(".*") in FILES or (id(node) in in_paths and NAMES & set(parts)):
                yield node.lineno, node.value


@pytest.mark.parametrize("module", MODULES)
def test_names_come_from_the_layout(module: str) -> None:
    found = list(literals(MODULES[module].read_text()))
    assert not found, f"{MODULES[module]}: take these from fusionlab/layout.py: {found}"


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ('folder / "fused" / rule', True),
        ('folder / f"fused/{rule}"', True),
        ('(folder / "x").glob("*/fusion.json")', True),
        ('path.name != "scores.png"', True),
        ('for name in ("config.yaml",): pass', True),
        ('row = {"model": "fused"}', False),
        ('cost["seconds"] / cost["points"]', False),
        ('folder / "config.json"', False),
        ('message = "see fusion.json"', False),
    ],
)
def test_what_counts_as_such_a_name(source: str, is_found: bool) -> None:
    assert bool(list(literals(source))) == is_found


def test_the_layout_is_read() -> None:
    assert {"config.yaml", "results.json", "taken.json", "validate.json", "ledger", "report.html"} <= NAMES
    assert all(Path(name).name == name for name in NAMES)
