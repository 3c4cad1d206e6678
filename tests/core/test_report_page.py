"""The report's page: what stands on which axis, what a point says, what is apart, and that nothing is loaded."""

import math
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from report_folders import row, rows_of_run, written, written_sweep

from fusionlab.reporting.charts import DARK, LIGHT, Axis, DotChart, Line, LineChart, Point
from fusionlab.reporting.markup import as_html
from fusionlab.reporting.page import Note, Section, Table, as_markdown
from fusionlab.reporting.png import png
from fusionlab.reporting.scores import groups, means
from fusionlab.reporting.sections import sections_of
from fusionlab.reporting.svg import line_panels
from fusionlab.reporting.sweep_tasks import missing_points

ASSETS = Path(__file__).parents[2] / "fusionlab" / "assets" / "report"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return written_sweep(tmp_path / "sweep")


def parts(sections: Sequence[Section], kind: type) -> list[Any]:
    return [part for section in sections for part in section.parts if isinstance(part, kind)]


def test_errors_and_accuracies_share_no_axis_and_no_mean() -> None:
    found = groups(rows_of_run())
    assert [(group.title, group.axis.label) for group in found] == [
        ("Accuracy", "accuracy (higher is better)"), ("Perplexity", "perplexity (lower is better)"),
    ]  # fmt: skip
    assert {each["task"] for each in found[0].rows} == {"a", "b"}
    mean = means(found[0])["pretrained"]
    assert (mean.value, mean.count) == (0.5, 2)
    assert mean.error == pytest.approx(0.03 / 2**0.5)


def test_values_of_other_sizes_have_an_axis_of_their_own() -> None:
    rows = [row(model="pretrained", task="a", value=0.5), row(model="pretrained", task="b", metric="bleu", value=31.0)]
    assert [group.title for group in groups(rows)] == ["Accuracy", "Bleu"]


def test_counts_of_tasks_have_whole_ticks() -> None:
    points = [Point(size, 0.1 * size, f"point {size}") for size in (2, 3)]
    chart = LineChart(
        "x", "caption", {"LoRA": [Line("average", points)]}, Axis("fused tasks", whole=True), Axis("score")
    )
    numbers = re.findall(r'text-anchor="middle">([^<]+)</text>', line_panels(chart)["LoRA"])
    assert numbers == ["2", "3", "fused tasks"]
    assert png(chart).startswith(b"\x89PNG")


def test_every_point_says_its_numbers_with_their_counts(sweep: Path) -> None:
    page = as_html("title", sections_of(sweep))
    said = re.findall(r'role="img" aria-label="([^"]+)"><title>([^<]+)</title>', page)
    assert said
    assert len(said) == page.count('class="point')
    assert all(label == title for label, title in said)
    needed = "task arithmetic, 2 fused tasks: 0.520; ± 0.040 over 3 subsets; ± 0.010 over 2 seeds"
    assert needed in [label for label, _ in said]
    assert "average, a: 0.650; ± 0.071 over 2 seeds" in [label for label, _ in said]
    assert page.count('tabindex="0" role="img"') == page.count(
        '<svg class="chart"'
    )  # one stop a chart, arrows go on from it
    assert 'class="band' in page
    assert 'class="whisker' in page


def test_protocols_are_apart_and_named_in_words(sweep: Path) -> None:
    sections = sections_of(sweep)
    titles = [section.title for section in sections[1:5]]
    assert [title.partition(":")[0] for title in titles] == ["Over the fused tasks", "Over all tasks"] * 2
    assert [isinstance(section.parts[0], Note) for section in sections[1:5]] == [False, False, True, True]
    assert "flatter" in sections[3].parts[0].title
    text = as_markdown("title", sections)
    assert not re.search(r"own_sub|abs_all|task_arithmetic|l_lora(?!-seed)", re.sub(r"!\[[^\n]*", "", text))
    assert "3 subsets, 2 seeds" in text


def test_what_is_missing_is_said(sweep: Path) -> None:
    notes = {note.title: note.lines for note in parts(sections_of(sweep), Note)}
    assert notes["Missing points"][0] == "L-LoRA, task arithmetic (strict): no point for 3 fused tasks."
    assert "single-task score of c is zero or negative" in notes["Scores without shares"][0]


def test_points_that_there_was_no_time_for_are_counted() -> None:
    place = {"protocol": "strict", "method": "lora", "seed": 1, "rule": "ties"}
    missing = [place | {"num_tasks": size, "num_subsets": number} for size, number in ((2, 3), (3, 1), (2, 2))]
    [note] = missing_points({"summary": [], "missing": missing, "tasks": ["a", "b"], "single_task": {}}, [])
    assert isinstance(note, Note)
    assert note.lines[:2] == [
        "5 points of 2 fused tasks: not computed yet.",
        "1 point of 3 fused tasks: not computed yet.",
    ]


def test_models_that_are_told_the_task_are_apart(tmp_path: Path) -> None:
    first, told, *_ = sections_of(written(tmp_path / "run", rows_of_run()))
    assert told.title == "Models that are told each input's task"
    first_models, told_models = ({line[0] for line in parts([each], Table)[0].body} for each in (first, told))
    assert (first_models, told_models) == ({"pretrained", "MetaGPT"}, {"switch"})
    assert [set(chart.panels) for chart in parts([first], DotChart)] == [{"Accuracy", "Perplexity"}]


def test_a_model_without_a_score_has_no_mean(tmp_path: Path) -> None:
    rows = [each for each in rows_of_run() if (each["rule"], each["task"]) != ("metagpt", "b") and each["task"] != "c"]
    (section, *_) = sections_of(written(tmp_path / "run", rows))
    assert parts([section], Note)[0].lines[0] == "MetaGPT has no score on b."
    (line,) = (line for line in parts([section], Table)[0].body if line[0] == "MetaGPT")
    assert line[2:] == ["–", "–"]


def test_learning_curves_of_the_csv_logger(tmp_path: Path) -> None:
    run = written(tmp_path / "run", rows_of_run())
    assert not any(section.title == "Learning curves" for section in sections_of(run))
    log = run / "lightning_logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    steps = [f"0,{step},{2 - step / 100},{1 / (step + 1)}" for step in range(0, 130)]
    log.write_text("\n".join(["epoch,step,train/a/loss,train/b/loss", *steps]))
    (section,) = (section for section in sections_of(run) if section.title == "Learning curves")
    (chart,) = parts([section], LineChart)
    assert {line.label: len(line.points) for line in chart.panels["training"]} == {"a": 44, "b": 44}
    assert chart.panels["training"][0].points[0] == Point(2, pytest.approx(1.99), "a, loss 1.99 at step 2")
    assert "each point is the mean of up to 3 logged steps" in chart.caption


def test_the_page_takes_nothing_from_elsewhere(sweep: Path) -> None:
    section = Section("<b>", ["a & b"], [Table("t", ["name", "value"], [["<i>", "0.5"]]), Note("n", ["<script>"])])
    page = as_html("<title>", [section, *sections_of(sweep)])
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#|data:)[\w/]", page.replace("img-src data:", ""))
    assert "<i>" not in page
    assert page.count("<script>") == 1


SEEN = {  # linear RGB as it is seen with all cones, and without one kind: Machado, Oliveira and Fernandes, 2009
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linear(colour: str) -> list[float]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(colour: str) -> float:
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def oklab(colour: str, seen: Sequence[Sequence[float]]) -> list[float]:
    red, green, blue = (max(0.0, sum(a * b for a, b in zip(line, linear(colour), strict=True))) for line in seen)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_page(dark: bool) -> None:
    blocks = re.findall(r":root\{([^}]*)\}", (ASSETS / "page.css").read_text())
    named = dict(re.findall(r"--([\w-]+):(#\w+)", blocks[dark]))
    named = {
        name: value if len(value) == 7 else "#" + "".join(c * 2 for c in value[1:]) for name, value in named.items()
    }
    assert min(contrast(colour, named["card"]) for colour in (DARK if dark else LIGHT)) >= 3
    texts = [contrast(named[text], named[page]) for text in ("text", "soft", "link") for page in ("page", "card")]
    assert min([*texts, contrast(named["warn"], named["warn-page"])]) >= 4.5


@pytest.mark.parametrize("colours", [LIGHT, DARK])
@pytest.mark.parametrize("seen", SEEN)
def test_colours_are_told_apart(colours: Sequence[str], seen: str) -> None:
    places = [oklab(colour, SEEN[seen]) for colour in colours]
    nearest = min(math.dist(one, other) for one, other in combinations(places, 2))
    assert nearest >= 0.08  # in OKLab, where 0.02 is about as much as an eye tells
