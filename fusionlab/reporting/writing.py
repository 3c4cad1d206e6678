"""A report's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusionlab.files import write_text, written_whole
from fusionlab.layout import PAGE, PLOTS, REPORT
from fusionlab.reporting.charts import DotChart, LineChart
from fusionlab.reporting.markup import as_html
from fusionlab.reporting.page import Picture, Section, as_markdown
from fusionlab.reporting.png import png


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write report.md, its plots, and report.html."""
    for section in sections:
        for part in section.parts:
            if isinstance(part, LineChart | DotChart | Picture):
                with written_whole(folder / PLOTS / f"{part.name}.png") as beside:
                    beside.write_bytes(part.png if isinstance(part, Picture) else png(part))
    write_text(folder / REPORT, as_markdown(title, sections))
    write_text(folder / PAGE, as_html(title, sections))
