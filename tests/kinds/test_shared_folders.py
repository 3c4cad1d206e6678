"""A folder that several processes make, and that the last of them removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusionlab.errors import InputError
from fusionlab.files import whole
from fusionlab.runs.leases import Leases


def test_a_lease_is_taken_while_another_process_removes_the_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "leases", Path.write_text
    first, second = Leases(folder), Leases(folder)
    assert first.take("a") is None

    def removed_before(path: Path, *given: str, **options: str) -> int:
        monkeypatch.undo()
        first.close()  # between the folder's making and the file's
        return write(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", removed_before)
    assert second.take("b") is None
    assert [path.name for path in folder.glob("*.json")] == ["b.json"]
    second.close()
    assert not folder.exists()


def test_a_folder_that_is_always_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *given, **options: None)
    with pytest.raises(InputError, match=r"gone/a\.json' cannot be written: no such file"):
        whole.create_text(tmp_path / "gone" / "a.json", "x")
