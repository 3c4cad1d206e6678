"""A report as Markdown with plots beside it, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusionlab.files import write_text, written_whole
from fusionlab.layout import PAGE, PLOTS, REPORT
from fusionlab.reporting.charts import Chart
from fusionlab.reporting.results import markdown_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: right }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5em 0 } figcaption { color: #555; font-size: .9em } svg, img { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Table:
    """Header and lines, with a caption that says what the numbers are."""

    caption: str
    header: list[str]
    body: list[list[str]]


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


@dataclass
class Section:
    """A part of the report."""

    title: str
    text: list[str] = field(default_factory=list)
    parts: list[Table | Chart | Picture] = field(default_factory=list)


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write report.md, its plots, and report.html."""
    for section in sections:
        for part in section.parts:
            if not isinstance(part, Table):
                with written_whole(folder / PLOTS / f"{part.name}.png") as beside:
                    beside.write_bytes(part.png)
    write_text(folder / REPORT, as_markdown(title, sections))
    write_text(folder / PAGE, as_html(title, sections))


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        for part in section.parts:
            if isinstance(part, Table):
                lines += [f"{part.caption}:", "", markdown_table(part.header, part.body), ""]
            else:
                lines += [f"![{part.caption}]({PLOTS}/{part.name}.png)", "", f"*{part.caption}*", ""]
    return "\n".join(lines)


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The report as one page: no script, nothing loaded from elsewhere."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        body += [_html(part) for part in section.parts]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _html(part: Table | Chart | Picture) -> str:
    caption = html.escape(part.caption)
    if isinstance(part, Chart):
        return f"<figure>{part.svg}<figcaption>{caption}</figcaption></figure>"
    if isinstance(part, Picture):
        content = base64.b64encode(part.png).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in part.header)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in part.body]
    return f"<p>{caption}:</p><table>{''.join(rows)}</table>"
