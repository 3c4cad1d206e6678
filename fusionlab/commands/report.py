"""``python -m fusionlab report RUN...``: runs and sweeps as Markdown and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusionlab.commands.parser import parse, with_flag
from fusionlab.errors import InputError
from fusionlab.files import accessed, path_of
from fusionlab.layout import (
    ADAPTERS,
    CHECKPOINTS,
    CONFIG,
    FINETUNED,
    FITS,
    INPUTS,
    LEASES,
    LEDGER,
    OF_A_RUN,
    PAGE,
    REPORT,
    RESULTS,
    RUNS,
)

# what tells a run's folder from one that merely holds a configuration
_OF_A_RUN = (RESULTS, CHECKPOINTS, ADAPTERS, FINETUNED, LEASES)


@dataclass(frozen=True)
class ReportRecipe:
    """Draw runs and sweeps as Markdown with plots, and as one HTML page that needs nothing else; compare two or more.

    Args:
        runs: folders of finished runs and sweeps; also given without the flag. Of two or more each is compared with the
            first, score by score, with paired standard errors.
        output: the folder to write report.md, report.html and plots to.
        published: folder of the released result files of arXiv 2310.04742, drawn beside a sweep's curves.
        title: the page's title.
    """

    runs: list[str] = field(default_factory=list)
    output: str = "report"
    published: str | None = None
    title: str = "fusionlab report"


def main(argv: list[str]) -> int:
    """Write the report; returns 0.

    Raises:
        InputError: no run, a folder that is none or is given twice, an output that is one of them or within one, or
            cannot be written, or no published files.
    """
    recipe = parse(ReportRecipe, with_flag(argv, "runs", several=True), "report", {})
    if not recipe.runs:
        raise InputError("report needs at least one run: python -m fusionlab report RUN...")
    from fusionlab.reporting.comparison import comparisons
    from fusionlab.reporting.page import names_of
    from fusionlab.reporting.published import published_summaries
    from fusionlab.reporting.sections import sections_of
    from fusionlab.reporting.writing import write_report

    output = path_of(recipe.output)
    _check_output(output, [path_of(run) for run in recipe.runs])
    published = published_summaries(Path(recipe.published).expanduser()) if recipe.published is not None else []
    folders = [path_of(run) for run in recipe.runs]
    names = names_of(folders)
    found = [
        section for folder, name in zip(folders, names, strict=True) for section in sections_of(folder, published, name)
    ]
    sections = [*comparisons(folders, names), *found]
    with accessed(output, "written"):
        write_report(output, recipe.title, sections)
    print(f"report: {output / PAGE}, {output / REPORT}")
    return 0


def _check_output(output: Path, runs: Sequence[Path]) -> None:
    """Raise for a folder that is a run's, or lies among what a run or a sweep keeps."""
    place, given = output.resolve(), [run.resolve() for run in runs]
    if place in given:
        raise InputError(f"--output {output}: that is one of the runs; give a folder of its own")
    for above in (place, *place.parents):
        is_sweep = (above / LEDGER / INPUTS).exists()
        is_run = (above / CONFIG).is_file() and any((above / name).exists() for name in _OF_A_RUN)
        inside = place.relative_to(above).parts[:1]
        kept = {RUNS, FITS, LEDGER} if is_sweep else {*OF_A_RUN, LEASES} if above in given or is_run else set()
        if {*inside} & kept or (kept and not inside and not is_sweep):
            kind = "sweep" if is_sweep else "run"
            raise InputError(f"--output {output}: that lies within the {kind} {str(above)!r}; give a folder beside it")
