"""Imports flow down only, and what must start fast imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fusionlab"
TIERS = {
    0: {
        "errors",
        "files",
        "state",
        "linearize",
        "rules",
        "samplers",
        "tasks",
        "optimization",
        "runs",
        "known_tasks",
        "leases",
        "memory",
        "sharding",
        "foreign",
        "keys",
    },
    1: {
        "backbones",
        "adapters",
        "checkpoints",
        "streaming",
        "metrics",
        "fusion",
        "loading",
        "planning",
        "weights",
        "tensors",
    },
    2: {
        "callbacks",
        "diagnostics",
        "modules",
        "data",
        "evaluation",
        "harness",
        "search",
        "sweeping",
        "reporting",
        "predicting",
        "fusing",
        "commands",
        "protocols",
        "published",
        "candidates",
        "commandline",
        "ranks",
    },
    3: {"__main__"},
}
# libraries a tier may import beside the standard library
LIBRARIES = {
    0: {"torch", "yaml", "numba", "numpy", "pydantic"},
    1: {"torch", "yaml", "transformers", "open_clip", "timm", "peft", "datasets", "torchmetrics", "safetensors",
        "numpy", "rich", "huggingface_hub", "psutil", "scipy"},
}  # fmt: skip
# rooms of tier 2 that others of tier 2 may import: the shared ones
SHARED = {
    "diagnostics",
    "evaluation",
    "harness",
    "reporting",
    "search",
    "predicting",
    "protocols",
    "published",
    "candidates",
    "commandline",
    "ranks",
}
# what a room of tier 2 may import of another beside those
EXCEPTIONS = {"sweeping": ("fusionlab.commands.fit",)}
ASIDE = {"__init__", "assets"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tier_of(room: str) -> int:
    tiers = [tier for tier, rooms in TIERS.items() if room in rooms]
    assert tiers, f"fusionlab/{room} has no tier; add it to TIERS where it belongs"
    return tiers[0]


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) not in ASIDE]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_down(path: Path) -> None:
    room = room_of(path)
    tier = tier_of(room)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "fusionlab" and len(parts) > 1 and parts[1] in set().union(*TIERS.values()) - {room}:
            other = tier_of(parts[1])
            assert other <= tier, f"{path}: {name} lies above"
            if tier == other == 2 and room != "commands" and path.name != "__init__.py":
                assert parts[1] in SHARED or name.startswith(EXCEPTIONS.get(room, ())), f"{path}: {name}"
        elif tier in LIBRARIES and parts[0] != "fusionlab" and parts[0] not in sys.stdlib_module_names:
            assert parts[0] in LIBRARIES[tier], f"{path}: tier {tier} must not import {parts[0]}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fusionlab.__main__ import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fuse" in done.stdout
