"""The ledger that processes share: records once, leases, inputs that must not change."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusionlab.commands.sweep.ledger import Ledger
from fusionlab.errors import InputError
from fusionlab.keys import key_of
from fusionlab.runs import leases


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
        return process.pid


def test_a_record_is_written_once_and_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    key = key_of({"rule": "ties", "tasks": ["a", "b"]})
    assert ledger.get(key) is None
    assert ledger.put(key, {"value": 1})
    assert not ledger.put(key, {"value": 2})
    assert Ledger(tmp_path).get(key) == {"key": key, "value": 1}
    assert [record["value"] for record in ledger.records()] == [1]
    assert not list(tmp_path.rglob(".*"))


def test_a_lease_is_held_by_one(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    with first.lease("job") as held:
        assert held
        with second.lease("job") as other:
            assert not other
        with second.lease("another job") as other:
            assert other
        assert (tmp_path / "leases" / "job.json").is_file()  # whom it was refused to has not removed it
    with second.lease("job") as held:
        assert held


@pytest.mark.parametrize("case", ["process is dead", "no sign of life"])
def test_a_dead_lease_is_taken_over(tmp_path: Path, case: str) -> None:
    host, pid = (os.uname().nodename, dead_pid()) if case == "process is dead" else ("elsewhere", 1)
    path = tmp_path / "leases" / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": host, "pid": pid, "token": "x"}))
    if case == "no sign of life":
        with Ledger(tmp_path, lease_seconds=60).lease("job") as held:
            assert not held
        os.utime(path, (time.time() - 61, time.time() - 61))
    with Ledger(tmp_path, lease_seconds=60).lease("job") as held:
        assert held
    assert not list((tmp_path / "leases").iterdir())


@pytest.mark.parametrize("meanwhile", ["given back", "taken over"])
def test_a_dead_lease_that_changes_between_look_and_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    path = tmp_path / "leases" / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": dead_pid(), "token": "x"}))
    taken = json.dumps({"host": "elsewhere", "pid": 1, "token": "y"})
    look = leases.Leases._is_dead

    def looked(*given: object) -> bool:
        found = look(*given)
        if found:
            path.unlink() if meanwhile == "given back" else path.write_text(taken)
        return found

    monkeypatch.setattr(leases.Leases, "_is_dead", looked)
    with Ledger(tmp_path).lease("job") as held:
        assert held == (meanwhile == "given back")
        assert (path.read_text() == taken) == (meanwhile == "taken over")
    assert [file.name for file in path.parent.iterdir()] == ["job.json"] * (meanwhile == "taken over")


def test_a_lease_that_was_taken_over_is_not_given_back(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "job.json"
    with Ledger(tmp_path).lease("job"):
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert path.is_file()


def test_a_lease_of_an_earlier_process_of_this_number_is_dead(tmp_path: Path) -> None:
    with Ledger(tmp_path).lease("job"):
        path = tmp_path / "leases" / "job.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "token": "x"}))
        with Ledger(tmp_path).lease("job") as held:
            assert held


def test_a_holder_keeps_its_lease_alive(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, lease_seconds=0.2)
    with ledger.lease("job"):
        path = tmp_path / "leases" / "job.json"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


def test_other_inputs_are_refused_with_the_difference(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    inputs = {"task a": {"test": "v1", "validation": "u"}, "base": {"hash": "h"}}
    ledger.check_inputs(inputs, write=False)
    assert not list(tmp_path.iterdir())
    ledger.check_inputs(inputs)
    ledger.check_inputs({"task a": inputs["task a"], "task b": {"test": "w"}})  # further tasks may come
    with pytest.raises(InputError, match=r"task a test: 'v1' there, 'v2' now"):
        ledger.check_inputs({"task a": {"test": "v2", "validation": "u"}})
    with pytest.raises(InputError, match=r"task b test: 'w' there"):
        ledger.check_inputs({"task b": {"test": "x"}})


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    ledger, host = Ledger(tmp_path), os.uname().nodename
    ledger.put("ab", {})
    dead, own = (tmp_path / "points" / "ab" / f".x.json.tmp-{host}-{pid}-0" for pid in (dead_pid(), os.getpid()))
    dead.write_text("{")
    own.write_text("{")
    leases.remove_unfinished(tmp_path)
    assert not dead.exists()
    assert own.exists()
