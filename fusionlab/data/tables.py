"""Tables of text, csv, tsv and json, read as they are: cells are text, columns of whole numbers are numbers."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fusionlab.errors import InputError, name_list

TEXT_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 16
Row = Sequence[Any]


class _Number(str):
    """A number in a json file, as it is written there."""


def read_tables(files: Sequence[Path]) -> Any:
    """The rows of text tables as one ``datasets.Dataset``, where each cell is the text that its file has.

    Numbers are text too, as they are written, since only the task knows what they mean; null (json) is None, and lists
    and objects (json) stay what they are. csv is read by RFC 4180; tsv has no quoting; json is a list of objects, one
    object a line, or one object of equally long lists. A blank line is no row.

    Raises:
        InputError: not utf-8, no rows, a quotation mark that is not closed, rows that are longer or shorter than the
            header, names that repeat, or files of other columns; the message has the lines.
    """
    import datasets

    tables = [_table(file) for file in files]
    names = tables[0].column_names
    for file, table in zip(files, tables, strict=True):
        if set(table.column_names) != set(names):
            other = sorted(set(table.column_names) ^ set(names))
            raise InputError(f"{file.name} has other columns than {files[0].name}: only one has {name_list(other)}")
    return datasets.Dataset(pa.concat_tables([table.select(names) for table in tables], promote_options="permissive"))


def _table(file: Path) -> pa.Table:
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        names, rows = _separated(file, quoted=suffix == ".csv")
        schema = pa.schema([(name, pa.string()) for name in names])
        table = pa.Table.from_batches(list(_batches(names, rows)), schema)
    else:
        table = _objects(file)
    if not len(table):
        raise InputError("it holds no rows")
    return table


def decoded(content: bytes, what: str) -> str:
    """The text of utf-8 bytes, with or without a byte order mark.

    Raises:
        InputError: they are not utf-8; the message has the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{what} is not utf-8: line {line} holds the byte {content[error.start]:#04x}; convert it to utf-8"
        ) from error


def lines_of(source: str, what: str) -> list[str]:
    """The lines of a file, or of the standard input for ``-``.

    A line ends with a line feed, before which a carriage return counts as part of the end; all else is text.

    Args:
        source: the file, or ``-``.
        what: the option that names it, for messages.

    Raises:
        InputError: it is not utf-8.
    """
    if source == "-":
        content = getattr(sys.stdin, "buffer", sys.stdin).read()
    else:
        content = Path(source).expanduser().read_bytes()
    if isinstance(content, bytes):
        content = decoded(content, f"{what}: {'the standard input' if source == '-' else source}")
    return [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]


def _lines(file: Path, newline: str) -> Iterator[str]:
    """The lines with their ends; with ``newline=""`` a lone carriage return ends one too."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            for number, line in enumerate(stream, 1):
                if "\0" in line:
                    raise InputError(f"line {number} holds a zero byte; convert the file to utf-8")
                yield line
    except UnicodeDecodeError as error:
        decoded(file.read_bytes(), "it")
        raise AssertionError from error


def _batches(names: Sequence[str], rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    chunk: list[Row] = []

    def batch() -> pa.RecordBatch:
        columns = zip(*chunk, strict=True) if chunk else [[] for _ in names]
        return pa.RecordBatch.from_arrays([pa.array(column, pa.string()) for column in columns], list(names))

    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield batch()
            chunk.clear()
    if chunk:
        yield batch()


def _separated(file: Path, *, quoted: bool) -> tuple[list[str], Iterator[Row]]:
    """Names and rows of a table whose cells are separated by commas, or by tabs without quoting."""
    records = _records(file, quoted=quoted)
    _, header = next(records, (0, None))
    if header is None:
        raise InputError("it is empty")
    names = [name or f"Unnamed: {index}" for index, name in enumerate(header)]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise InputError(f"its header repeats {name_list(repeated)}; give each column a name of its own")
    return names, _of_width(records, len(names))


def _of_width(records: Iterator[tuple[int, list[str]]], width: int) -> Iterator[Row]:
    bad = []
    for line, record in records:
        if len(record) == width:
            yield record
        else:
            bad.append(f"{line} ({len(record)})")
    if bad:
        raise InputError(f"{len(bad)} rows have not the header's {width} cells: lines {name_list(bad)}")


def _records(file: Path, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each record that is no blank line."""
    options: dict[str, Any] = {"strict": True} if quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(_lines(file, "" if quoted else "\n"), **options)
    limit = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        what = f"the record that begins in line {line} is no csv: {error}"
        if "unexpected end" in str(error) or "expected after" in str(error):
            what = (
                f"a quotation mark that opens in line {line} is not closed where its cell ends (found by line "
                f"{reader.line_num}); a mark inside a quoted cell is written twice"
            )
        elif "new-line" in str(error):
            what = f"the row in line {reader.line_num} holds a carriage return, and tsv has no quoting; take it out"
        raise InputError(what) from error
    finally:
        csv.field_size_limit(limit)


def _objects(file: Path) -> pa.Table:
    """The table of a file of json objects."""
    objects = _parsed(file)
    names = list(dict.fromkeys(name for each in objects for name in each))
    columns = {}
    for name in names:
        cells = [each.get(name) for each in objects]
        is_nested = any(isinstance(cell, list | dict) for cell in cells)
        try:
            columns[name] = pa.array(map(_plain, cells)) if is_nested else pa.array(map(_text, cells), pa.string())
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"the values of {name!r} are of several kinds: {error}") from error
    return pa.table(columns)


def _parsed(file: Path) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder(
        parse_int=_Number, parse_float=_Number, parse_constant=_constant, object_pairs_hook=_object
    )
    lines = list(_lines(file, "\n"))
    try:
        found = [(number, decoder.decode(line.strip())) for number, line in enumerate(lines, 1) if line.strip()]
    except json.JSONDecodeError:
        found = _whole(decoder, "".join(lines))
    if not found:
        raise InputError("it is empty")
    if len(found) == 1 and isinstance(found[0][1], list):
        found = list(enumerate(found[0][1], 1))
    elif len(found) == 1 and file.suffix.lower() == ".json" and (columns := _columns(found[0][1])) is not None:
        found = columns
    wrong = [str(number) for number, value in found if not isinstance(value, dict)]
    if wrong:
        raise InputError(f"expected json objects, one a row; entries {name_list(wrong)} are none")
    return [value for _, value in found]


def _whole(decoder: json.JSONDecoder, text: str) -> list[tuple[int, Any]]:
    """The values of a file whose values take more than a line each."""
    found: list[tuple[int, Any]] = []
    position = _after_space(text, 0)
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"it is no json: {error.msg} in line {error.lineno}") from error
        found.append((len(found) + 1, value))
        position = _after_space(text, position)
    return found


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _constant(name: str) -> _Number | None:
    """NaN is how json is made to say that there is no value."""
    return None if name == "NaN" else _Number(name)


def _columns(value: Any) -> list[tuple[int, Any]] | None:
    """The rows of an object of equally long lists of cells; None if it is another."""
    lists = list(value.values()) if isinstance(value, dict) else []
    if not lists or not all(isinstance(each, list) for each in lists) or len(set(map(len, lists))) > 1:
        return None
    if any(isinstance(cell, list | dict) for cells in lists for cell in cells):
        return None
    return [(row, dict(zip(value, cells, strict=True))) for row, cells in enumerate(zip(*lists, strict=True), 1)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = [name for name in value if names.count(name) > 1]
        raise InputError(f"an object gives {name_list(repeated)} twice")
    return value


def _text(cell: Any) -> str | None:
    """A cell that is no list or object as its file has it."""
    return ("false", "true")[cell] if isinstance(cell, bool) else cell


def _plain(cell: Any) -> Any:
    """A list or object with its numbers as numbers."""
    if isinstance(cell, _Number):
        return json.loads(cell)
    if isinstance(cell, dict):
        return {key: _plain(value) for key, value in cell.items()}
    return [_plain(value) for value in cell] if isinstance(cell, list) else cell
