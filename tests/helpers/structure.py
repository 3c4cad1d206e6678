"""The structure of the package, from its imports: rooms, what each one imports, and circles.

    python tests/helpers/structure.py [PACKAGE]    # a table of rooms, from the ground up

A room is a folder or a file of the package. Imports inside functions count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fusionlab"
ASIDE = {"__init__", "assets"}


def room_of(module: str) -> str:
    """The room of a module: ``fusionlab.rules.ties`` lies in ``rules``."""
    return module.split(".")[1]


def modules_of(package: Path) -> dict[str, Path]:
    """Files by dotted name, without the package's own ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if "." in module and room_of(module) not in ASIDE:
            found[module] = path
    return found


def imports_of(path: Path, modules: Iterable[str]) -> set[str]:
    """What a file imports: modules of the package, and of others dotted names."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the room"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in modules else str(node.module) for name in inner}
    return names


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach one another, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            place = stack.index(node)
            circle = stack[place:]
            del stack[place:]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def rooms(package: Path) -> dict[str, set[str]]:
    """By room the other rooms that it imports."""
    modules = modules_of(package)
    found: dict[str, set[str]] = {room_of(module): set() for module in modules}
    for module, path in modules.items():
        names = [name for name in imports_of(path, modules) if name.startswith(f"{package.name}.")]
        found[room_of(module)] |= {room_of(name) for name in names} - {room_of(module)}
    return found


def files(package: Path) -> dict[str, set[str]]:
    """By module the modules that it imports; a room's ``__init__``, which lists its files, is not asked by them."""
    modules = modules_of(package)
    return {
        name: {other for other in imports_of(path, modules) & modules.keys() if not name.startswith(f"{other}.")}
        for name, path in modules.items()
    }


def main(package: Path) -> None:
    """Print the rooms, the deepest first."""
    arrows = rooms(package)
    depth: dict[str, int] = {}

    def depth_of(room: str, above: tuple[str, ...] = ()) -> int:
        if room not in depth:
            below = [depth_of(other, (*above, room)) for other in arrows[room] if other not in above]
            depth[room] = 1 + max(below, default=-1)
        return depth[room]

    sizes: dict[str, list[int]] = {room: [] for room in arrows}
    for module, path in modules_of(package).items():
        sizes[room_of(module)].append(len(path.read_text().splitlines()))
    for room in sorted(arrows, key=lambda room: (depth_of(room), room)):
        print(f"{depth[room]:2}  {room:14}{len(sizes[room]):3} files{sum(sizes[room]):6} lines  "
              f"-> {' '.join(sorted(arrows[room])) or '-'}")  # fmt: skip
    print(f"{sum(map(len, sizes.values()))} files, {sum(map(sum, sizes.values()))} lines, "
          f"{sum(map(len, arrows.values()))} arrows between {len(arrows)} rooms")  # fmt: skip
    for what, graph in (("rooms", arrows), ("files", files(package))):
        print(f"circles of {what}: {circles(graph) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
