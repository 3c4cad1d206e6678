"""Imports flow down only, and what must start fast imports nothing heavy."""

import subprocess
import sys

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
