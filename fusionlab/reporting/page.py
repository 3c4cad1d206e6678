"""What a report is made of, and its two forms: Markdown with plots beside it, and one self-contained HTML page."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusionlab.errors import InputError
from fusionlab.layout import PLOTS
from fusionlab.reporting.charts import Chart


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what it says.
        more: what stands behind it in small print, such as a spread.
        sort: what it is sorted by, where that is not its text.
        shade: −1 to 1, how the cell is tinted; None for not at all.
    """

    text: str
    more: str = ""
    sort: float | None = None
    shade: float | None = None

    def plain(self) -> str:
        """As one text."""
        return f"{self.text} {self.more}".rstrip()


@dataclass(frozen=True)
class Table:
    """Header and lines, with a caption that says what the numbers are.

    Args:
        caption: in words, with units.
        header: the columns' names.
        body: the lines; the first cell of each is its name.
        notes: small print of a column's header, by its place: what its numbers are of.
        folded: whether a page shows it on demand, since a chart beside it shows the same numbers.
        left: the places of further columns that hold words.
    """

    caption: str
    header: Sequence[str]
    body: Sequence[Sequence[Cell | str]]
    notes: Sequence[str] = ()
    folded: bool = False
    left: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A plot that a run already has.

    Args:
        name: of its file.
        caption: what it shows.
        png: its content.
    """

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Note:
    """What a reader must not miss.

    Args:
        title: in a few words.
        lines: what there is to say; more than one are a list.
        warns: whether it is about what is missing, wrong or flatters.
    """

    title: str
    lines: Sequence[str]
    warns: bool = False


Part = Table | Chart | Picture | Note


@dataclass
class Section:
    """A part of the report.

    Args:
        title: its heading.
        text: paragraphs.
        parts: tables, drawings and notes, in order.
        facts: names and values at its head.
        level: 2 for a run or a sweep, 3 for what belongs to it.
    """

    title: str
    text: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    level: int = 2


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"{'#' * section.level} {section.title}", ""]
        if section.facts:
            lines += [*(f"- {name}: {value}" for name, value in section.facts), ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        for part in section.parts:
            lines += [*_markdown(part), ""]
    return "\n".join(lines)


def _markdown(part: Part) -> list[str]:
    if isinstance(part, Table):
        notes = [*part.notes, *[""] * (len(part.header) - len(part.notes))]
        header = [f"{name} ({note})" if note else name for name, note in zip(part.header, notes, strict=True)]
        body = [[cell.plain() if isinstance(cell, Cell) else cell for cell in line] for line in part.body]
        return [f"{part.caption}:", "", markdown_table(header, body)]
    if isinstance(part, Note):
        return [f"**{part.title}.**", "", *(f"- {line}" for line in part.lines)]
    return [f"![{part.caption}]({PLOTS}/{part.name}.png)", "", f"*{part.caption}*"]


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Header and lines as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *body]]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def names_of(folders: Sequence[Path]) -> list[str]:
    """What folders are called: by their names, or as they were given where two have one name.

    Raises:
        InputError: one is given twice.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise InputError(f"{str(twice[0])!r} is given twice; give each run once")
    names = [place.name for place in places]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]


def file_name(name: str) -> str:
    """A name as a file's; with a hash of it where letters had to be replaced, so that no two names have one file.

    Example:
        >>> file_name("run-1"), file_name("a/run 1")
        ('run-1', 'a-run-1-052cbd')
    """
    text = "".join(char if char.isalnum() or char in "-_." else "-" for char in name)
    return text if text == name else f"{text}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
