"""Do the tests guard the code? Places are drawn by a seed over all rooms and broken one by one.

    python tests/helpers/guarded_lines.py OUTPUT.json [--number 40] [--seed 0] [--tests 25] [--at_once 2]

Works in copies of the checkout. First every drawn place notes which tests reach it, in one run of the suite; then it is
broken (a condition negated, a ``raise`` or a call left out, an operator or a number changed) and some of those tests,
of as many files as there are, are run until one fails. A place that none of them sees broken, or that no test reaches,
survives.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structure

ROOT = Path(__file__).parents[2]
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*"}
COMPARED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
NOT_OURS = (".git", ".venv", "runs", "sweeps")
PATH = re.compile(r"['\"]|path|folder|root|[A-Z]{3}")
PROBE = """import os
def reached(place):
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    if test:
        with open(os.environ["GUARDED_LINES"], "a") as file:
            file.write(f"{place}\\t{test}\\n")
    return True
"""


@dataclass(frozen=True)
class Place:
    """A piece of a file, a statement or an expression: its bytes, and by what they are replaced."""

    file: str
    line: int
    start: int
    end: int
    is_statement: bool
    broken: str

    def told(self, text: bytes) -> str:
        was = " ".join(text[self.start : self.end].decode().split())
        return f"{self.file}:{self.line}: {was[:70]!r} -> {self.broken[:70]!r}"

    def noting(self, text: bytes, number: int) -> bytes:
        """The text with this place noting, as ``number``, that it was reached."""
        before, was, after = text[: self.start], text[self.start : self.end], text[self.end :]
        call = f"__import__('guarded_probe').reached({number})".encode()
        return before + (call + b"; " + was if self.is_statement else b"(" + call + b" and (" + was + b"))") + after

    def breaking(self, text: bytes) -> bytes:
        return text[: self.start] + self.broken.encode() + text[self.end :]


class _Places:
    """Every piece of a file that can be broken, but where numba compiles it, and but for parts of paths."""

    def __init__(self, path: Path) -> None:
        self.file, self.text = str(path.relative_to(ROOT)), path.read_bytes()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def __iter__(self) -> Iterator[Place]:
        for function in ast.walk(ast.parse(self.text)) if b"import numba" not in self.text else ():
            if isinstance(function, ast.FunctionDef):
                for statement in function.body:
                    yield from self._of(statement)

    def _of(self, node: ast.AST) -> Iterator[Place]:
        if isinstance(node, ast.JoinedStr | ast.FunctionDef | ast.pattern):  # in texts places are not told exactly
            return
        if isinstance(node, ast.If):
            yield self._place(node.test, f"(not ({self._source(node.test)}))")
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield self._place(node, "pass")
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = self._source(node.left), self._source(node.right)
            if not PATH.search(left + right):
                yield self._place(node, f"(({left}) {OPERATORS[type(node.op)]} ({right}))")
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            left, right = self._source(node.left), self._source(node.comparators[0])
            yield self._place(node, f"(({left}) {COMPARED[type(node.ops[0])]} ({right}))")
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield self._place(node, f"({self._source(node)} + 1)")
        for child in ast.iter_child_nodes(node):
            yield from self._of(child)

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        end = self.starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return self.starts[node.lineno - 1] + node.col_offset, end

    def _source(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self.text[start:end].decode()

    def _place(self, node: ast.expr | ast.stmt, broken: str) -> Place:
        return Place(self.file, node.lineno, *self._span(node), isinstance(node, ast.stmt), broken)


def drawn(number: int, seed: int) -> list[Place]:
    """Places by turns from every room, so that small ones have their share, and ten lines apart."""
    draw = random.Random(seed)
    modules = structure.modules_of(structure.PACKAGE)
    by_room: dict[str, list[Place]] = {}
    for module, path in modules.items():
        by_room.setdefault(structure.room_of(module), []).extend(_Places(path))
    rooms = sorted(room for room, places in by_room.items() if places)
    for room in rooms:
        draw.shuffle(by_room[room])
    draw.shuffle(rooms)
    found: list[Place] = []
    while len(found) < number:
        for room in rooms:
            place = by_room[room].pop() if by_room[room] else None
            apart = place and not any(place.file == o.file and abs(place.line - o.line) < 10 for o in found)
            if place and apart and len(found) < number:
                found.append(place)
    return found


def run(checkout: Path, environment: dict[str, str], *arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    more = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, cwd=checkout, env=os.environ | more, capture_output=True, check=False).returncode


def reaching(checkout: Path, places: list[Place], work: Path) -> dict[int, list[str]]:
    """By place the tests that reach it, in the order in which they ran."""
    originals = {place.file: (checkout / place.file).read_bytes() for place in places}
    for number, place in sorted(enumerate(places), key=lambda each: -each[1].start):
        path = checkout / place.file
        path.write_bytes(place.noting(path.read_bytes(), number))
    (checkout / "guarded_probe.py").write_text(PROBE)
    notes = work / "reached.tsv"
    notes.touch()
    run(checkout, {"GUARDED_LINES": str(notes)}, "-n", "2", "--dist", "loadfile")
    for file, text in originals.items():
        (checkout / file).write_bytes(text)
    found: dict[int, dict[str, None]] = {number: {} for number in range(len(places))}
    for line in notes.read_text().splitlines():
        number, _, test = line.partition("\t")
        found[int(number)][test] = None
    return {number: list(tests) for number, tests in found.items()}


def spread(tests: list[str]) -> list[str]:
    """The same tests, one of each file in turn: those of one file often ask the same question."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    longest = max(map(len, by_file.values()), default=0)
    return [of_file[turn] for turn in range(longest) for of_file in by_file.values() if turn < len(of_file)]


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What is not of the checkout."""
    return {name for name in names if name == "__pycache__" or (folder == str(ROOT) and name in NOT_OURS)}


def copied(folder: Path) -> Path:
    """A copy of the checkout in a new folder, with the inputs that tests read beside it."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=_left_out)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return checkout


def is_seen(checkout: Path, place: Place, tests: list[str]) -> bool:
    """Whether one of the tests fails while the place is broken; the copy is whole again afterwards."""
    path = checkout / place.file
    text = path.read_bytes()
    path.write_bytes(place.breaking(text))
    try:
        return bool(tests) and run(checkout, {}, "-x", *tests) == 1
    finally:
        path.write_bytes(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=25, help="of the tests that reach a place, run so many at most")
    parser.add_argument("--at_once", type=int, default=2, help="break so many places at once, each in its own copy")
    args = parser.parse_args()
    places, record = drawn(args.number, args.seed), []
    told = [place.told((ROOT / place.file).read_bytes()) for place in places]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        free: queue.Queue[Path] = queue.Queue()
        for number in range(args.at_once):
            free.put(copied(Path(folder) / str(number)))
        first = free.queue[0]
        tests = reaching(first, places, Path(folder))

        def broken(number: int) -> bool:
            checkout = free.get()
            try:
                return is_seen(checkout, places[number], spread(tests[number])[: args.tests])
            finally:
                free.put(checkout)

        for number, is_red in enumerate(pool.map(broken, range(len(places)))):
            record.append({"place": told[number], "tests": len(tests[number]), "red": is_red})
            print("red     " if is_red else "SURVIVES", told[number], f"({len(tests[number])} tests)", flush=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{sum(each['red'] for each in record)} of {len(record)} red")


if __name__ == "__main__":
    main()
