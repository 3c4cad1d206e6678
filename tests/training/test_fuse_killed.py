"""``kill -9`` at random moments of a fusion, and memory that does not grow with the model; in other processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from fusionlab.commands.fuse import offline  # imported before the forks, which then take no time to start
from fusionlab.commands.fuse.recipe import Recipe

folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
output = folder / "out"
recipe = Recipe(str(folder / "base"), {"a": str(folder / "a"), "b": str(folder / "b")}, str(output))

def fuse():
    for name in "ab":
        (folder / name / "fusion_stats.json").unlink(missing_ok=True)
    offline.fuse_folder(offline.prepare(recipe))

def start():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fuse()
            code = 0
        finally:
            os._exit(code)
    return child

def leftovers():
    return [path.name for path in folder.iterdir() if path.name.startswith(".out")]

def discard():
    for path in output.iterdir():
        path.unlink()
    output.rmdir()

began = time.perf_counter()
assert os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]) == 0
seconds = time.perf_counter() - began
weights = (output / "model.safetensors").read_bytes()
names = sorted(path.name for path in output.iterdir())
discard()

draws = random.Random(seed)
interrupted = 0
for _ in range(kills):
    child = start()
    time.sleep(draws.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    interrupted += bool(leftovers())
    if output.exists():
        assert sorted(path.name for path in output.iterdir()) == names
        assert (output / "model.safetensors").read_bytes() == weights
        discard()
    assert os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]) == 0, "the rerun failed"
    assert not leftovers(), leftovers()
    assert (output / "model.safetensors").read_bytes() == weights
    discard()
print("interrupted while writing:", interrupted)
"""

MEMORY = """
import re, sys
from pathlib import Path
from fusionlab.commands.fuse import offline
from fusionlab.commands.fuse.recipe import Recipe

def peak():  # of this program; what getrusage tells begins with the starter's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

folder = Path(sys.argv[1])
for size in ("code", "small", "large"):
    inputs = {task: str(folder / f"{size}-{task}") for task in "ab"}
    base, output = str(folder / f"{size}-base"), str(folder / f"{size}-out")
    recipe = Recipe(base, inputs, output, rule=sys.argv[2], memory_budget="40MB", threads=2)
    before = peak()
    offline.fuse_folder(offline.prepare(recipe))
    print(peak() - before)
"""


def save(folder: Path, tensors: int, seed: int, width: int = 2_000) -> None:
    """Tensors in bfloat16, of 8 MB each by default."""
    folder.mkdir()
    values = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    state = {f"layers.{k}.w": values.roll(k) for k in range(tensors)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(folder: Path, kills: int) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save(folder / name, 4, seed)
    assert "interrupted while writing" in run(KILLER, str(folder), str(kills), "5")


@pytest.mark.slow
def test_killed_three_times_leaves_all_or_nothing(tmp_path: Path) -> None:
    kill(tmp_path, 3)


@pytest.mark.slow
def test_killed_twenty_times_leaves_all_or_nothing(tmp_path: Path) -> None:
    kill(tmp_path, 20)


@pytest.mark.parametrize(
    ("rule", "tensors", "more"), [("metagpt", 10, 15), pytest.param("emr", 30, 30, marks=pytest.mark.slow)]
)
def test_memory_stays_within_the_budget_whatever_the_size(rule: str, tensors: int, more: int, tmp_path: Path) -> None:
    """Many times the model, 24 MB of inputs a tensor: the small one within the budget of 40 MB, the large one near it.

    A first fusion, of almost nothing, loads code. EMR's masks are new tensors in each block, of which the allocator
    keeps some; while sums of blocks were kept as tensors too, memory grew with the model.
    """
    for size, count, width in (("code", 1, 200), ("small", 1, 2_000), ("large", tensors, 2_000)):
        for seed, name in enumerate(("base", "a", "b")):
            save(tmp_path / f"{size}-{name}", count, seed, width)
    _, small, large = map(float, run(MEMORY, str(tmp_path), rule).split())
    assert small < 40
    assert large < more
