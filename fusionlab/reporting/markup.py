"""A report as one HTML page: styles, drawings and a small script are in it, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files

from fusionlab.reporting import svg
from fusionlab.reporting.charts import DARK, LIGHT, DotChart, LineChart
from fusionlab.reporting.page import Cell, Note, Part, Picture, Section, Table

_NUMBER = re.compile(r"^[−+-]?[\d,]*\.?\d+%?$")

_HOW = (
    '<p class="how">Point at a mark to read its numbers, or go to a chart with the tabulator and from mark to mark '
    "with the arrow keys. A table is sorted by pressing the name of a column.</p>"
)


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The page.

    It asks for nothing over a network: its policy forbids all that is not in it.
    """
    names = _anchors(sections)
    places = ((f"t{number}", section, name) for number, (section, name) in enumerate(zip(sections, names, strict=True)))
    body = "\n".join(_section(section, name, place) for place, section, name in places)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_colours()}{_asset('page.css')}</style>",
    ]
    made = f"Made by fusionlab {html.escape(version('fusionlab'))}."
    top = f"<header><h1>{html.escape(title)}</h1>{_HOW}{_contents(sections, names)}</header>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>\n{top}\n<main>\n{body}\n</main>\n'
        f"<footer><p>{made}</p></footer>\n<script>{_asset('page.js')}</script>\n</body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("fusionlab") / "assets" / "report" / name).read_text(encoding="utf-8")


def _colours() -> str:
    """The colours of series as properties of the page, and the classes that take them."""
    light, dark = (
        "".join(f"--s{number}:{colour};" for number, colour in enumerate(colours)) for colours in (LIGHT, DARK)
    )
    classes = "".join(f".s{number}{{--c:var(--s{number})}}" for number in range(len(LIGHT)))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Names to link to, each once."""
    found: list[str] = []
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")[:60] or "part"
        taken = sum(each == name or each.startswith(f"{name}--") for each in found)
        found.append(f"{name}--{taken + 1}" if taken else name)
    return found


def _contents(sections: Sequence[Section], names: Sequence[str]) -> str:
    if len(sections) < 2:
        return ""
    lines = [
        f'<li class="l{section.level}"><a href="#{name}">{html.escape(section.title)}</a></li>'
        for section, name in zip(sections, names, strict=True)
    ]
    return f'<nav aria-label="Contents"><ul>{"".join(lines)}</ul></nav>'


def _section(section: Section, name: str, place: str) -> str:
    head = f"<h{section.level}>{html.escape(section.title)}</h{section.level}>"
    facts = "".join(f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>" for a, b in section.facts)
    facts = f'<dl class="facts">{facts}</dl>' if facts else ""
    text = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text)
    parts = "\n".join(_part(part, f"{place}-{number}") for number, part in enumerate(section.parts))
    return f'<section id="{name}" class="l{section.level}">{head}{facts}{text}\n{parts}</section>'


def _part(part: Part, place: str) -> str:
    if isinstance(part, Table):
        return _table(part, place)
    if isinstance(part, Note):
        return _note(part)
    if isinstance(part, Picture):
        content = base64.b64encode(part.png).decode()
        image = f'<img alt="{html.escape(part.caption)}" src="data:image/png;base64,{content}">'
        return f'<figure class="picture"><figcaption>{html.escape(part.caption)}</figcaption>{image}</figure>'
    return _figure(part)


def _note(note: Note) -> str:
    kind = "note warns" if note.warns else "note"
    lines = [html.escape(line) for line in note.lines]
    text = f"<p>{lines[0]}</p>" if len(lines) == 1 else f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"
    return f'<div class="{kind}"><p class="title">{html.escape(note.title)}</p>{text}</div>'


def _figure(chart: LineChart | DotChart) -> str:
    panels = svg.line_panels(chart) if isinstance(chart, LineChart) else svg.dot_panels(chart)
    labels = chart.labels()
    dashed = {line.label for lines in chart.panels.values() for line in lines if line.dashed} if (
        isinstance(chart, LineChart)
    ) else set()  # fmt: skip
    keys = [f"<li>{svg.key(number, label in dashed)}{html.escape(label)}</li>" for number, label in enumerate(labels)]
    legend = f'<ul class="legend">{"".join(keys)}</ul>' if len(labels) > 1 else ""
    up = f'<p class="up">{html.escape(chart.y.label)}</p>' if isinstance(chart, LineChart) else ""
    drawn = [
        f'<div class="panel"><p class="title">{html.escape(title)}</p>{up}{drawing}</div>'
        for title, drawing in panels.items()
    ]
    caption = f"<figcaption>{html.escape(chart.caption)}</figcaption>"
    return f'<figure class="drawn">{caption}{legend}<div class="panels">{"".join(drawn)}</div></figure>'


def _table(table: Table, place: str) -> str:
    notes = [*table.notes, *[""] * (len(table.header) - len(table.notes))]
    words = [_is_words(table, column) for column in range(len(table.header))]
    small = [f"<small>{html.escape(note)}</small>" if note else "" for note in notes]
    head = "".join(
        f'<th scope="col"{_class(is_words)}>{html.escape(name)}{note}</th>'
        for name, note, is_words in zip(table.header, small, words, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cells(line, words))}</tr>" for line in table.body)
    caption = html.escape(table.caption)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if table.folded:
        scroll = f'<div class="scroll" role="group" tabindex="0" aria-label="{caption}">{inner}</div>'
        return f"<details><summary>{caption}</summary>{scroll}</details>"
    return (
        f'<div class="table"><p class="caption" id="{place}">{caption}</p>'
        f'<div class="scroll" role="group" tabindex="0" aria-labelledby="{place}">{inner}</div></div>'
    )


def _is_words(table: Table, column: int) -> bool:
    """Whether a column's cells are texts, which stand at the left; numbers stand at the right."""
    texts = [cell.text if isinstance(cell, Cell) else cell for cell in (line[column] for line in table.body)]
    said = [text for text in texts if text != "–"]
    return column == 0 or column in table.left or not all(map(_NUMBER.match, said))


def _cells(line: Sequence[Cell | str], words: Sequence[bool]) -> Iterator[str]:
    for place, (given, is_words) in enumerate(zip(line, words, strict=True)):
        cell = given if isinstance(given, Cell) else Cell(given)
        text = html.escape(cell.text)
        if cell.more:
            text += f" <small>{html.escape(cell.more)}</small>"
        if place == 0:
            yield f'<th scope="row">{text}</th>'
            continue
        sort = "" if cell.sort is None else f' data-sort="{cell.sort:.12g}"'
        yield f"<td{_class(is_words)}{sort}{_tint(cell.shade)}>{text}</td>"


def _class(is_words: bool) -> str:
    return ' class="words"' if is_words else ""


def _tint(shade: float | None) -> str:
    """Blue for positive and orange for negative values, the stronger the further from 0."""
    if shade is None:
        return ""
    colour = "55,84,203" if shade > 0 else "209,106,19"
    return f' style="background-color:rgba({colour},{min(1.0, abs(shade)) * 0.32:.3f})"'
