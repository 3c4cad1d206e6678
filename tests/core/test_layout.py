"""Imports flow down only, and what must start fast imports nothing heavy."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fusionlab"
# From the ground up: a room imports rooms that stand before it, and no other.
ROOMS = (
    "errors", "files", "keys", "memory", "samplers",
    "foreign", "blocks", "rules", "tensors", "engine",
    "linearize", "adapters", "backbones", "runs", "fusion",
    "data", "evaluation", "search", "distributed",
    "modules", "harness", "reporting", "callbacks",
    "commands", "__main__",
)  # fmt: skip
# libraries that a room may import beside the standard library, up to and with this room
LIBRARIES = {
    "rules": {"torch", "yaml", "numba", "numpy", "pydantic"},
    "engine": {"torch", "numpy", "safetensors", "huggingface_hub", "transformers"},
    "fusion": {"torch", "yaml", "numpy", "transformers", "open_clip", "timm", "peft", "safetensors"},
}
ASIDE = {"__init__", "assets"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) not in ASIDE]
MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """What a file imports, in functions too: modules, and of other packages dotted names."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the room"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else str(node.module))
    return names


def rooms_in(names: set[str]) -> dict[str, str]:
    """Room by imported name."""
    return {name: name.split(".")[1] for name in names if name.startswith("fusionlab.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_down(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"fusionlab/{room} has no place; add it to ROOMS where it belongs"
    for name, other in rooms_in(imports_of(path)).items():
        assert other == room or ROOMS.index(other) < ROOMS.index(room), f"{path}: {name} lies above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries(path: Path) -> None:
    place = ROOMS.index(room_of(path))
    allowed = next((names for last, names in LIBRARIES.items() if place <= ROOMS.index(last)), None)
    packages = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"fusionlab"}
    assert allowed is None or packages <= allowed, f"{path}: must not import {packages - allowed}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """A room's ``__init__`` aside, which lists its files: those that read a configuration look into the list."""
    graph = {name: {other for other in imports_of(path) & MODULES.keys() if not name.startswith(f"{other}.")}
             for name, path in MODULES.items()}  # fmt: skip
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fusionlab.__main__ import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fuse" in done.stdout
