"""A sweep killed at random moments ends with the ledger of an uninterrupted one; so do two processes that share it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

# One process imports everything once and forks what is killed, so that a kill costs no second start.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path

import fusionlab.commands.fit, fusionlab.commands.sweep.execute, fusionlab.commands.sweep.results, fusionlab.data.text
from fusionlab.__main__ import main

kills, seed, recipe, whole, root = int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:])
random.seed(seed)

def start(output):
    pid = os.fork()
    if pid == 0:
        log = os.open(str(output) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(main(["sweep", "--config", str(recipe), "--output", str(output)]))
    return pid

def count(output):
    return len(list((output / "ledger" / "points").rglob("[!.]*.json")))

assert os.waitpid(start(whole), 0)[1] == 0, Path(str(whole) + ".log").read_text()
total, hits, rounds = count(whole), 0, 0
while hits < kills:
    # a sweep has time for a few kills: more of them take more sweeps
    killed, rounds = root / f"killed-{rounds}", rounds + 1
    assert rounds <= kills, f"{hits} kills in {rounds - 1} sweeps"
    in_this_round = min(5, kills - hits)
    for number in range(in_this_round):
        # the first kill comes while fine-tuning, the others while points are recorded
        goal = count(killed) + (0 if number == 0 else random.randint(1, max(1, total // (in_this_round + 1))))
        pid = start(killed)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            begun = (killed / "runs" / "lora-seed42" / "config.yaml").exists()
            if begun and count(killed) >= goal:
                time.sleep(random.uniform(0, 0.1))
                os.kill(pid, signal.SIGKILL)
                hits += os.waitpid(pid, 0)[1] == signal.SIGKILL
                break
            time.sleep(0.002)
    both = [start(killed), start(killed)]
    for pid in both:
        assert os.waitpid(pid, 0)[1] == 0, Path(str(killed) + ".log").read_text()
print("hits", hits)
"""
RECIPE = {
    "fit": {
        "model": {"class_path": "ClipModule", "init_args": {"learning_rate": 0.01}},
        "data": {
            "class_path": "ImageTasks",
            "init_args": {"tasks": ["digits", "signs", "textures"], "max_samples": 24, "eval_batch_size": 24},
        },
        "trainer": {"max_steps": 3, "enable_progress_bar": False},
    },
    "methods": ["lora"],
    "rules": ["average", "task_arithmetic", "metagpt"],
    "output": "given by the script",
}


def ledger_of(output: Path) -> dict[str, dict]:
    paths = (output / "ledger" / "points").rglob("[!.]*.json")
    records = [json.loads(path.read_text()) for path in paths]
    return {
        r["key"]: {name: value for name, value in r.items() if name != "cost"} for r in records if r["kind"] != "fit"
    }


def summary_of(output: Path) -> Any:
    return json.loads((output / "sweep.json").read_text())["summary"]


def check(kills: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "script.py").write_text(SCRIPT)
    argv = [sys.executable, str(tmp_path / "script.py"), str(kills), "1", str(tmp_path / "recipe.yaml")]
    argv += [str(tmp_path / "whole"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert f"hits {kills}" in done.stdout
    whole, summary = ledger_of(tmp_path / "whole"), summary_of(tmp_path / "whole")
    assert len(whole) >= 4 * (1 + 3 + 1)  # more where the edge of the grid wins
    for killed in tmp_path.glob("killed-*[0-9]"):
        assert ledger_of(killed) == whole
        assert summary_of(killed) == summary
        assert not list((killed / "ledger").rglob(".*"))


@pytest.mark.slow
def test_killed_three_times(tmp_path: Path) -> None:
    check(3, tmp_path)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    check(20, tmp_path)
