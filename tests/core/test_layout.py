"""Imports flow down only, and what must start fast imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import structure

# From the ground up: a room imports rooms that stand before it, and no other.
ROOMS = (
    "errors", "files", "layout", "memory", "samplers", "progress",
    "foreign", "blocks", "rules", "tensors", "cards", "engine",
    "linearize", "adapters", "contracts", "keys", "backbones", "runs", "fusion",
    "data", "evaluation", "search", "distributed",
    "modules", "harness", "reporting", "callbacks",
    "commands", "__main__",
)  # fmt: skip
# libraries that a room may import beside the standard library, up to and with this room
LIBRARIES = {
    "rules": {"torch", "yaml", "numba", "numpy", "pydantic"},
    "engine": {"torch", "numpy", "safetensors", "huggingface_hub", "transformers"},
    # of torchmetrics the type only
    "fusion": {"torch", "yaml", "numpy", "transformers", "open_clip", "timm", "peft", "safetensors"} | {"torchmetrics"},
}
# files that are longer than can be read at once, and why
LONG_FILES = {
    "fusionlab.modules.base": "the hooks of one LightningModule, each a few lines over files of their own",
    "fusionlab.adapters.injection": "what the adapters of a model share stays in one place",
}
MODULES = structure.modules_of(structure.PACKAGE)


@pytest.mark.parametrize("module", MODULES)
def test_imports_flow_down(module: str) -> None:
    room = structure.room_of(module)
    assert room in ROOMS, f"fusionlab/{room} has no place; add it to ROOMS where it belongs"
    for name in structure.imports_of(MODULES[module], MODULES):
        if name.startswith("fusionlab."):
            other = structure.room_of(name)
            assert other == room or ROOMS.index(other) < ROOMS.index(room), f"{module}: {name} lies above"


@pytest.mark.parametrize("module", MODULES)
def test_libraries(module: str) -> None:
    place = ROOMS.index(structure.room_of(module))
    allowed = next((names for last, names in LIBRARIES.items() if place <= ROOMS.index(last)), None)
    packages = {name.split(".")[0] for name in structure.imports_of(MODULES[module], MODULES)}
    packages -= {*sys.stdlib_module_names, "fusionlab"}
    assert allowed is None or packages <= allowed, f"{module}: must not import {packages - allowed}"


def lines_of_code(function: ast.AST) -> int:
    """Lines of a function beside its docstring."""
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    told = function.body[0] if ast.get_docstring(function) is not None else None
    doc = 0 if told is None else (told.end_lineno or 0) - told.lineno + 1
    return (function.end_lineno or 0) - function.lineno + 1 - doc


@pytest.mark.parametrize("module", MODULES)
def test_files_can_be_read_at_once(module: str) -> None:
    text = MODULES[module].read_text()
    lines = len(text.splitlines())
    assert (lines > 300) == (module in LONG_FILES), f"{module} has {lines} lines"
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {function.name: lines for function in functions if (lines := lines_of_code(function)) >= 50}
    assert not long, f"{module}: functions of 50 lines and more beside their docstrings"


def test_no_circles() -> None:
    assert not structure.circles(structure.rooms(structure.PACKAGE))
    assert not structure.circles(structure.files(structure.PACKAGE))


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert structure.circles(graph) == [["b", "c"]]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fusionlab.__main__ import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fuse" in done.stdout


def test_nothing_else_lies_at_the_top() -> None:
    """What a run leaves in the working directory is easily committed, a model of hundreds of megabytes too."""
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no checkout, or no git")
    files = [root / name for name in found.stdout.splitlines()]
    assert {path.relative_to(root).parts[0] for path in files} <= {
        ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE",
        "Makefile", "README.md", "benchmarks", "configs", "docs", "fusionlab", "pyproject.toml", "tests",
    }  # fmt: skip
    large = [path.name for path in files if path.is_file() and path.stat().st_size > 1e6]
    assert set(large) <= {"model.safetensors"}
