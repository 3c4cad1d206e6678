"""Whether a file is the one it was: by size, times, header and the ends of every tensor; or by all of its content."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusionlab.tensors.headers import Header, read_header

END_BYTES = 4096
_PIECE = 1 << 22


def file_records(
    files: Iterable[Path], headers: Mapping[Path, Header] | None = None, *, content: bool = False
) -> list[dict[str, Any]]:
    """Name, size, modification and change time, header, and the first and last 4 KiB of every tensor of each file.

    The change time is the system's own: a file that was exchanged for another of equal size and modification time
    has another one. Files that hold no tensors, and pickles of the old format, are hashed whole.

    Args:
        files: of any kind.
        headers: of safetensors files that were opened before.
        content: also hash all of the content, which reads it.
    """
    return [_record(file, (headers or {}).get(file)) | (_whole(file) if content else {}) for file in files]


def fingerprint(records: Iterable[Mapping[str, Any]]) -> str:
    """One hash over file records: of the content alone where they have it, whatever the files' times are."""
    kept = [
        {key: record[key] for key in (("file", "sha256") if "sha256" in record else sorted(record))}
        for record in records
    ]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def times(found: os.stat_result) -> dict[str, int]:
    """When a file was modified, and when that or anything else of it was changed."""
    return {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}


def content_hash(file: Path) -> str:
    """SHA-256 over the whole content."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _record(file: Path, header: Header | None) -> dict[str, Any]:
    found = file.stat()
    record: dict[str, Any] = {"file": file.name, "size": found.st_size, **times(found)}
    if file.suffix == ".safetensors":
        header = header or read_header(file)
        places = [(placed.offset, placed.info.nbytes) for placed in header.tensors.values()]
        return record | {"header_sha256": header.digest, "ends_sha256": _ends_hash(file, places)}
    if zipfile.is_zipfile(file):
        return record | {"ends_sha256": _ends_hash(file, list(_members(file)))}
    return record | {"ends_sha256": content_hash(file)}


def _whole(file: Path) -> dict[str, str]:
    return {"sha256": content_hash(file)}


def _members(file: Path) -> Iterator[tuple[int, int]]:
    """Begin and size of each member of a zip file as it lies there: of a pickle by torch, its tensors."""
    with zipfile.ZipFile(file) as archive, open(file, "rb") as opened:
        for member in archive.infolist():
            opened.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
            yield member.header_offset + 30 + name + extra, member.compress_size


def _ends_hash(file: Path, places: Iterable[tuple[int, int]]) -> str:
    """SHA-256 over the first and last bytes at each place ``(begin, size)``, and its size."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        for begin, size in places:
            digest.update(f"{size}\0".encode())
            for start in (0, max(END_BYTES, size - END_BYTES)):
                opened.seek(begin + start)
                digest.update(opened.read(min(END_BYTES, max(0, size - start))))
    return digest.hexdigest()
