"""The cluster scripts: the commands that they start make one run, from an array of jobs to the tested model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from fusionlab.__main__ import main
from fusionlab.data.loader import StepLoader
from fusionlab.errors import InputError

CLUSTER = Path(__file__).parents[2] / "configs" / "cluster"
CONFIG = """
data: {init_args: {max_samples: 24, batch_size: 8}}
model: {init_args: {rank: 2}}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false}
fusion: {rules: [metagpt]}
"""
# runs each job at once, every task of an array, and keeps the order that dependencies ask for
SBATCH = """#!/bin/bash
echo "sbatch $@" >> "$LOG"
for option; do
    case $option in
        --array=0-*) last=${option#--array=0-}; shift;;
        --*) shift;;
    esac
done
for index in $(seq 0 "${last:-0}"); do SLURM_ARRAY_TASK_ID=$index bash "$@"; done
wc -l < "$LOG"
"""
RECORD = """#!/bin/bash
printf '%q ' "$@" >> "$LOG"
echo >> "$LOG"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-ins for sbatch, srun and torchrun were told."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "srun": RECORD, "torchrun": RECORD}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path / "log"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", CLUSTER / name, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_slurm_trains_fuses_and_tests(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = script("slurm.sh", tmp_path / "config.yaml", run, "digits", "{name: signs}")
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    submitted = [line for line in lines if line.startswith("sbatch ")]
    assert [Path(line.split(str(CLUSTER))[1].split()[0]).name for line in submitted] == [
        "train.sbatch", "fuse.sbatch", "test.sbatch",
    ]  # fmt: skip
    assert "--array=0-1" in submitted[0]
    assert "--dependency=afterok:3" in submitted[1]
    assert "--dependency=afterok:5" in submitted[2]
    commands = [shlex.split(line) for line in lines if line.startswith("python ")]
    assert [command[:4] for command in commands] == [
        ["python", "-m", "fusionlab", name] for name in ("fit",) * 3 + ("test",)
    ]
    (tmp_path / "bin" / "srun").unlink()  # where there is one, Lightning wants to be started by it
    for command in commands:
        assert main(command[3:]) == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    fused = [row for row in rows if row["rule"] == "metagpt"]
    tested = json.loads((run / "test-metagpt.json").read_text())["rows"]
    assert [(row["task"], row["value"]) for row in tested] == [(row["task"], row["value"]) for row in fused]
    assert [row["task"] for row in tested] == ["digits", "signs"]


def test_torchrun_passes_the_command_on(log: Path, tmp_path: Path) -> None:
    done = script("torchrun.sh", 1, "node0", tmp_path / "config.yaml", tmp_path / "run", "--model.rank", 8)
    assert done.returncode == 0, done.stderr
    command = shlex.split(log.read_text())
    assert command[:6] == ["--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "4"]
    argv = command[command.index("fusionlab") + 1 :]
    assert argv[-8:] == [
        "--trainer.num_nodes", "2", "--trainer.devices", "4", "--trainer.strategy", "ddp", "--model.rank", "8",
    ]  # fmt: skip
    assert script("torchrun.sh", 1).returncode == 2


def test_offline_points_to_the_folder() -> None:
    text = f"set -e; . {CLUSTER}/offline.sh /shared; echo $HF_HOME $FUSIONLAB_CACHE $HF_HUB_OFFLINE"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/shared/hub", "/shared/cache", "1"]


def test_fewer_samples_than_processes_are_named() -> None:
    splits = {"long": range(9), "short": range(2)}
    assert len(StepLoader(splits, 2, seed=0, world_size=2, length_multiple=2)) == 4  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"fewer training samples than the 3 processes: short \(2\)"):
        StepLoader(splits, 2, seed=0, world_size=3)  # type: ignore[arg-type]
