"""The parts of a report: from a run folder, from a sweep, and the published curves to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError
from fusionlab.evaluation.rows import LM_EVAL, read_rows
from fusionlab.layout import FUSED, FUSION, PLOTS, RESULTS, SCORES, SWEEP
from fusionlab.reporting.charts import Chart, Line, bar_chart, heat_maps, line_chart
from fusionlab.reporting.page import Picture, Section, Table
from fusionlab.reporting.published import METHOD_OF_MODE, RULE_OF_METHOD, PublishedSummary
from fusionlab.reporting.results import bars, harness_table, limits, line_name, table

PROTOCOLS = {
    "strict": "strict: coefficients chosen on validation, reported on test",
    "published": "published protocol: coefficients chosen on the reported test scores, which flatters",
}
CRITERIA = {
    "own_sub": "share of the method's own single-task score, merged tasks",
    "own_all": "share of the method's own single-task score, all tasks",
    "full_sub": "share of full fine-tuning's score, merged tasks",
    "abs_sub": "score, merged tasks",
    "abs_all": "score, all tasks",
}
Published = Sequence[PublishedSummary]


def sections_of(folder: Path, published: Published = ()) -> list[Section]:
    """The sections of a run or sweep.

    Raises:
        InputError: the folder is neither.
    """
    if (folder / SWEEP).is_file():
        return _of_sweep(folder, published)
    if (folder / RESULTS).is_file():
        return [_of_run(folder)]
    raise InputError(f"{str(folder)!r} has neither {RESULTS} nor {SWEEP}; give the folder of a finished run or sweep")


def _of_run(folder: Path) -> Section:
    rows = read_rows(folder / RESULTS)
    if not rows:
        raise InputError(f"the {RESULTS} in {str(folder)!r} has no rows; finish the run first")
    section = Section(f"Run {folder.name}", [f"Method {rows[0]['method']}, seed {rows[0]['seed']}."])
    if found := limits(rows):
        section.text.append(f"Scores of a part of the samples: {'; '.join(found)}.")
    header, body = table(rows)
    splits = ", ".join(dict.fromkeys(row["split"] for row in rows if LM_EVAL not in row))
    section.parts.append(Table(f"Scores on {splits}", header, body))
    groups, name = bars(header, body), _file_name(folder)
    section.parts.append(bar_chart(f"{name}-scores", f"{folder.name}: scores on {splits} by task", groups, "score"))
    harness = harness_table(rows)
    if harness[1]:
        section.parts.append(Table("Scored by lm-eval", *harness))
    cosines = _cosines_of_run(folder)
    if cosines:
        caption = f"{folder.name}: cosine similarity of the task vectors"
        section.parts.append(heat_maps(f"{name}-cosines", caption, {folder.name: cosines}))
    for path in sorted((folder / PLOTS).glob("*.png")):
        if path.name != SCORES:  # drawn above
            caption = f"{folder.name}: {path.stem.replace('_', ' ')}"
            section.parts.append(Picture(f"{name}-{path.stem}", caption, path.read_bytes()))
    return section


def _cosines_of_run(folder: Path) -> dict[str, dict[str, float]]:
    for path in sorted((folder / FUSED).glob(f"*/{FUSION}")):
        cosines = json.loads(path.read_text()).get("cosines") or {}
        names = list(dict.fromkeys([*cosines, *(other for row in cosines.values() for other in row)]))
        if len(names) > 1:
            return {
                a: {b: 1.0 if a == b else cosines.get(a, {}).get(b, cosines.get(b, {}).get(a, 0.0)) for b in names}
                for a in names
            }
    return {}


def _of_sweep(folder: Path, published: Published) -> list[Section]:
    sweep, name = json.loads((folder / SWEEP).read_text()), _file_name(folder)
    rows = read_rows(folder / RESULTS)
    sections = []
    for protocol in dict.fromkeys(line["protocol"] for line in sweep["summary"]):
        lines = [line for line in sweep["summary"] if line["protocol"] == protocol]
        section = Section(f"Sweep {folder.name}: {PROTOCOLS[protocol]}", [_what(sweep, lines)])
        for criterion, caption in CRITERIA.items():
            having = [line for line in lines if criterion in line["mean"]]
            if having:
                section.parts.append(_summary_table(having, criterion, f"{caption} ({protocol})"))
                section.parts.append(_curves(f"{name}-{protocol}-{criterion}", having, criterion, protocol, published))
        if published:
            section.text.append(
                "Dashed: the published averages of arXiv 2310.04742 for the same method and rule, another backbone and "
                "other tasks, coefficients chosen on the reported scores."
            )
        bars = _bars(sweep, rows, protocol)
        if bars:
            caption = f"all {len(sweep['tasks'])} tasks fused, score on test by task ({protocol}); mean over seeds"
            section.parts.append(bar_chart(f"{name}-{protocol}-tasks", caption, bars, "score"))
        sections.append(section)
    sections.append(_background(sweep, name, folder))
    return sections


def _what(sweep: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    seeds = max(line["num_seeds"] for line in lines)
    return (
        f"Backbone {sweep['backbone']}; tasks {', '.join(sweep['tasks'])}; {seeds} seed{'s' * (seeds > 1)}. Means over "
        f"task subsets and seeds; ± is the standard deviation over subsets, where there are several."
    )


def _summary_table(lines: Sequence[Mapping[str, Any]], criterion: str, caption: str) -> Table:
    sizes = sorted({line["num_tasks"] for line in lines})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for line in lines:
        shown = f"{line['mean'][criterion]:.3f}"
        if line["num_subsets"] > 1:
            shown += f" ± {line['std_over_subsets'][criterion]:.3f}"
        if line["num_seeds"] > 1:
            shown += f" (seeds ± {line['std_over_seeds'][criterion]:.3f})"
        cells.setdefault((line["method"], line["rule"]), {})[line["num_tasks"]] = shown
    body = [[f"{m}, {r}", *(found.get(size, "-") for size in sizes)] for (m, r), found in cells.items()]
    return Table(caption, ["method, rule", *(f"{size} tasks" for size in sizes)], body)


def _curves(
    name: str, lines: Sequence[Mapping[str, Any]], criterion: str, protocol: str, published: Published
) -> Chart:
    panels: dict[str, list[Line]] = {}
    for method in dict.fromkeys(line["method"] for line in lines):
        for rule in dict.fromkeys(line["rule"] for line in lines if line["method"] == method):
            found = sorted(
                (line["num_tasks"], line["mean"][criterion], line["std_over_subsets"][criterion])
                for line in lines
                if (line["method"], line["rule"]) == (method, rule)
            )
            drawn = Line(rule, [(size, mean) for size, mean, _ in found], [spread for *_, spread in found])
            panels.setdefault(method, []).append(drawn)
        panels[method] += _published_lines(published, method, criterion)
    caption = f"{CRITERIA[criterion]}, over the number of fused tasks ({PROTOCOLS[protocol]})"
    return line_chart(name, caption, panels, "fused tasks", criterion)


def _published_lines(published: Published, method: str, criterion: str) -> list[Line]:
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for item in published:
        wanted = item.selection in ("none", "per_subset_best:own_all")
        if wanted and METHOD_OF_MODE[item.mode] == method and criterion in item.summary.mean:
            key = (item.model, RULE_OF_METHOD[item.method])
            found.setdefault(key, []).append((item.num_tasks, item.summary.mean[criterion]))
    return [Line(f"published {rule} ({model})", sorted(points), style="--") for (model, rule), points in found.items()]


def _bars(sweep: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], protocol: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        is_all = row["fused_tasks"] is not None and set(row["fused_tasks"]) == set(sweep["tasks"])
        if is_all and row["protocol"] == protocol and row["denominator"] == "own":
            label = f"{row['method']}, {line_name(dict(row)).removeprefix('fused: ')}"
            found.setdefault(label, {}).setdefault(row["task"], []).append(row["value"])
    return {
        label: {task: sum(values) / len(values) for task, values in by_task.items()} for label, by_task in found.items()
    }


def _background(sweep: Mapping[str, Any], name: str, folder: Path) -> Section:
    """Coefficients, cosines and costs: what does not depend on the protocol."""
    section = Section(f"Sweep {folder.name}: coefficients, similarity, costs")
    for split in dict.fromkeys(curve["split"] for curve in sweep["coefficient_curves"]):
        panels: dict[str, list[Line]] = {}
        for curve in sweep["coefficient_curves"]:
            if curve["split"] == split:
                line = Line(f"{curve['num_tasks']} tasks", [(x, y) for x, y in curve["points"]])
                panels.setdefault(f"{curve['method']}, {curve['rule']}", []).append(line)
        caption = f"score of the merged tasks on {split} over the scaling coefficient"
        section.parts.append(line_chart(f"{name}-coefficients-{split}", caption, panels, "coefficient", "score"))
    caption = "cosine similarity of the task vectors"
    section.parts.append(heat_maps(f"{name}-cosines", caption, sweep["cosines"]))
    section.parts.append(_cost_chart(sweep, name))
    section.parts.append(_cost_table(sweep))
    if sweep["fits"]:
        body = [
            [f"{fit['method']}, seed {fit['seed']}", f"{fit['seconds']:.1f}", f"{fit['peak_bytes'] / 1e6:,.0f}"]
            for fit in sweep["fits"]
        ]
        section.parts.append(Table("Fine-tuning", ["run", "seconds", "peak MB"], body))
    if sweep["searches"]:
        fields = ("num_samples", "num_labels", "passes", "seconds")
        body = [
            [f"{each['method']}, {each['rule']}", str(each["num_tasks"]), *(f"{each[field]:.1f}" for field in fields)]
            for each in sweep["searches"]
        ]
        header = ["search", "tasks", "samples seen", "labels seen", "passes over them", "seconds"]
        section.parts.append(Table("What searches looked at and what they cost, mean over subsets", header, body))
    return section


def _cost_chart(sweep: Mapping[str, Any], name: str) -> Chart:
    panels: dict[str, list[Line]] = {}
    for method in dict.fromkeys(cost["method"] for cost in sweep["costs"]):
        of = [cost for cost in sweep["costs"] if cost["method"] == method]
        panels[method] = [
            Line(rule, [(cost["num_tasks"], cost["seconds"] / cost["points"]) for cost in of if cost["rule"] == rule])
            for rule in dict.fromkeys(cost["rule"] for cost in of)
        ]
    caption = "seconds per point over the number of fused tasks, search, fusing and scoring together"
    return line_chart(f"{name}-costs", caption, panels, "fused tasks", "seconds")


def _cost_table(sweep: Mapping[str, Any]) -> Table:
    body = [
        [f"{cost['method']}, {cost['rule']}", str(cost["num_tasks"]), str(cost["points"]), f"{cost['seconds']:.1f}",
         f"{cost['fuse_seconds']:.2f}", f"{cost['passes']:.1f}", f"{cost['peak_bytes'] / 1e6:,.0f}"]
        for cost in sweep["costs"]
    ]  # fmt: skip
    header = ["method, rule", "tasks", "points", "seconds", "of them fusing", "passes over all tasks' data", "peak MB"]
    return Table("Costs of all points", header, body)


def _file_name(folder: Path) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in folder.resolve().name)
