"""Runs the code of a page of the documentation, block by block, in one folder.

A ``bash`` block is run, a ``python`` block is executed; a block whose first line is ``# file: NAME`` is written to that
file instead. ``text`` is what was printed once, ``console`` a recorded command: neither is run.

``python tests/helpers/tutorials.py PAGE...`` runs pages in full, each in an empty folder, and tells how long each took.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# file: (\S+)\n")
_CUTS = ((re.compile(r"(max_steps[ =:]+)\d+"), r"\g<1>2"), (re.compile(r"(max_samples[ =:]+)\d+"), r"\g<1>40"))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    for match in _FENCE.finditer(page.read_text()):
        yield match[1], match[2]


def commands(script: str) -> list[list[str]]:
    """The arguments of each command of a ``bash`` block; lines that end in a backslash go on.

    Example:
        >>> commands("python -m fusionlab fit \\\\\\n  --model.rank 4\\n# nothing\\ncat a")
        [['python', '-m', 'fusionlab', 'fit', '--model.rank', '4'], ['cat', 'a']]
    """
    lines = script.replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := shlex.split(line, comments=True))]


def run_page(page: Path, folder: Path, *, cut: bool) -> None:
    """Run all of a page's blocks in ``folder``.

    Args:
        page: the Markdown file.
        folder: where its commands run and its files are written.
        cut: two steps of training, few samples, and commands in this process; else as it stands.

    Raises:
        RuntimeError: a command that does not end with 0.
    """
    names: dict[str, Any] = {"__name__": "tutorial"}
    with chdir(folder):
        for language, content in blocks(page):
            for pattern, short in _CUTS if cut else ():
                content = pattern.sub(short, content)
            if file := _FILE.match(content):
                Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(file[1]).write_text(content)
            elif language == "python":
                exec(compile(content, str(page), "exec"), names)
            elif language == "bash":
                for command in commands(content):
                    _run(command, here=cut)


def _run(command: list[str], *, here: bool) -> None:
    if here and command[:3] == ["python", "-m", "fusionlab"]:
        from fusionlab.__main__ import main

        code = main(command[3:])
    elif here and command[0] == "python":
        runpy.run_path(command[1], run_name="__main__")
        code = 0
    else:
        program = sys.executable if command[0] == "python" else command[0]
        code = subprocess.run([program, *command[1:]], check=False).returncode
    if code != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {code}")


def main(pages: list[str]) -> int:
    """Run pages in full; returns 0."""
    for page in map(Path, pages):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PYTHONPATH"] = os.pathsep.join([str(DOCS.parent), folder])
            sys.path.insert(0, folder)
            run_page(page.resolve(), Path(folder), cut=False)
            sys.path.remove(folder)
        print(f"{page}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
