"""Every row is used and read as the file has it, or it is an error that counts and names."""

from __future__ import annotations

import csv
import json
import logging
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from task_files import images, png, table, texts

from fusionlab.data.rendering import TextSource
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError

INTEGER, LARGE_BINARY = datasets.Value("int64"), datasets.Value("large_binary")

# cells

CELLS = [
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "",
    "007",
    "1990",
    "1e3",
    "1.10",
    " padded ",
    "True",
    "-0",
    "ä日本",
    "#N/A",
]
CELLS += [
    "2020-01-01",
    "2020-01-01T00:00:00Z",
    "99999999999999999999",
    "\u2028x",
    "x\x0by",
    "'",
    "\\n",
    "1_000",
    "0x1F",
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_text_is_what_the_file_has(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"set/all.{suffix}"
    file.parent.mkdir()
    rows = [{"text": cell, "more": f"{number}.", "label": number % 2} for number, cell in enumerate(CELLS)]
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif suffix == "json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    read = texts(file, template="{more}|{text}|{label}", input_columns=["text", "more"])
    assert list(read.inputs) == [f"{row['more']}|{row['text']}|{row['label']}" for row in rows]
    assert read.targets.tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize("cell", ["1990", "1990.0", "-1.50", "1e400", "true", "false", "12345678901234567890"])
def test_a_json_number_is_written_as_it_stands(tmp_path: Path, cell: str) -> None:
    (tmp_path / "set").mkdir()
    lines = f'{{"text": {cell}, "label": 0}}\n{{"text": null, "more": "x", "label": 1}}\n{{"text": 7, "label": 1}}\n'
    (tmp_path / "set/all.jsonl").write_text(lines)
    read = texts(tmp_path / "set/all.jsonl", template="{text}/{more}", input_columns=["text", "more"])
    assert list(read.inputs) == [f"{cell}/", "/x", "7/"]


@pytest.mark.parametrize("column", [["1990", "", "7"], ["007", "08", "1"], ["1", "2", "3"], ["NA", "1", "2"]])
def test_a_column_does_not_change_for_what_another_row_has(tmp_path: Path, column: list[str]) -> None:
    (tmp_path / "set").mkdir()
    lines = "".join(f"{cell},x,{row % 2}\n" for row, cell in enumerate(column))
    (tmp_path / "set/all.csv").write_text("year,text,label\n" + lines)
    assert list(texts(tmp_path / "set/all.csv", template="{year}:{text}").inputs) == [f"{cell}:x" for cell in column]


RFC_4180 = {
    "commas and lines in quotes": ('"a, b",0\n"two\nlines",1\n', ["a, b", "two\nlines"]),
    "doubled marks": ('"say ""yes""",0\n"""",1\n', ['say "yes"', '"']),
    "a mark inside an unquoted cell": ('5" disk,0\nx"y,1\n', ['5" disk', 'x"y']),
    "carriage returns": ('a,0\r\n"b\r\nc",1\r\n', ["a", "b\r\nc"]),
    "no line end at the end": ("a,0\nb,1", ["a", "b"]),
    "blank lines": ("a,0\n\n\nb,1\n\n", ["a", "b"]),
    "spaces belong to the cell": (" a ,0\n\tb,1\n", [" a ", "\tb"]),
    "quoted and empty": ('"x",0\n"",1\n', ["x", ""]),
}


@pytest.mark.parametrize("case", RFC_4180)
def test_csv_is_read_by_rfc_4180(tmp_path: Path, case: str) -> None:
    lines, expected = RFC_4180[case]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.csv").write_bytes(b"text,label\n" + lines.encode())
    read = texts(tmp_path / "set/all.csv", template="{text}", input_columns=["text", "label"])
    assert (list(read.inputs), read.targets.tolist()) == (expected, [0, 1])


@pytest.mark.parametrize("lines", ['"a,0\n"b,1\n', 'a" b,0\n"c,1\n', '\'x\',0\n"""",1\n', 'x "y",0\n"z" w,1\n'])
def test_tsv_has_no_quoting(tmp_path: Path, lines: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.tsv").write_text("text\tlabel\n" + lines.replace(",", "\t"))
    read = texts(tmp_path / "set/all.tsv", template="{text}")
    assert list(read.inputs) == [line.rpartition(",")[0] for line in lines.splitlines()]


def test_a_long_cell_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.csv").write_text(f"text,label\n{'x' * 300_000},0\ny,1\n")
    assert len(texts(tmp_path / "set/all.csv", template="{text}").inputs[0]) == 300_000


BROKEN = {
    "open to the end": ("csv", 'text,label\na,0\n"b,1\nc,0\n', r"mark that opens in line 3 is not closed"),
    "open to the next mark": ("csv", 'text,label\n"a,0\nb,1\n"c",0\n', r"opens in line 2 is not closed .*by line 4"),
    "text after a closed cell": ("csv", 'text,label\nx,1\n"a" b,0\n', r"opens in line 3 is not closed where"),
    "rows too short": (
        "csv",
        "text,label\na,0\nb\nc\n",
        r"2 rows have not the header's 2 .*: lines 3 \(1\), 4 \(1\)",
    ),
    "rows too long": ("csv", "text,label\na,b,0\nc,1\n", r"1 rows have not the header's 2 cells: lines 2 \(3\)"),
    "a tab in a cell": ("tsv", "text\tlabel\na\tb\t0\n", r"1 rows have not the header's 2 cells: lines 2"),
    "names that repeat": ("csv", "text,text,label\na,b,0\n", r"its header repeats text;"),
    "no rows": ("csv", "text,label\n", r"it holds no rows"),
    "nothing": ("csv", "", r"it is empty"),
    "nothing in json": ("json", " \n", r"it is empty"),
    "an open object": ("jsonl", '{"text": "a", "label": 0}\n{"text": "b"\n', r"it is no json: .* in line"),
    "a list of lists": ("json", '[["a", 0], ["b", 1]]', r"expected json objects, one a row; entries 1, 2 are none"),
    "a key twice": ("jsonl", '{"text": "a", "text": "b", "label": 0}\n', r"an object gives text twice"),
    "latin-1": ("csv", "text,label\na,0\nä,1\n", r"it is not utf-8: line 3 holds the byte 0xe4"),
    "latin-1 in json": ("jsonl", '{"text": "a", "label": 0}\n{"text": "ä", "label": 1}\n', r"not utf-8: line 2"),
    "utf-16": ("tsv", "text\tlabel\na\t0\n", r"not utf-8: line 1 holds the byte 0xff"),
    "utf-16 without a mark": ("csv", "text,label\na,0\n", r"line 1 holds a zero byte"),
    "lists in lists": ("jsonl", '{"text": "a", "label": 0, "x": ' + "[" * 20_000 + "]" * 20_000 + "}\n", "maximum rec"),
    "an integer of 80 bits": (
        "jsonl",
        '{"text": "a", "label": 0, "x": {"y": 1234567890123456789012345}}\n',
        "too large",
    ),
}
ENCODINGS = {
    "latin-1": "latin-1",
    "latin-1 in json": "latin-1",
    "utf-16": "utf-16",
    "utf-16 without a mark": "utf-16-le",
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    suffix, content, message = BROKEN[case]
    (tmp_path / "set").mkdir()
    (tmp_path / f"set/all.{suffix}").write_bytes(content.encode(ENCODINGS.get(case, "utf-8")))
    with pytest.raises(InputError, match=rf"task 'own': .*all\.{suffix}\) could not be read: .*{message}"):
        texts(tmp_path / f"set/all.{suffix}", template="{text}")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_a_mark_at_the_start_is_no_text(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "set").mkdir()
    content = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
    if suffix in ("csv", "tsv"):
        content = "text,label\na,0\nb,1\n".replace(",", "," if suffix == "csv" else "\t")
    (tmp_path / f"set/all.{suffix}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert list(texts(tmp_path / f"set/all.{suffix}", template="{text}").inputs) == ["a", "b"]


JSON_FORMS = {
    "a list": '[{"text": "a", "label": 0}, {"text": "b", "label": 1}]',
    "lines": '{"text": "a", "label": 0}\n\n{"label": 1, "text": "b"}\n',
    "columns": '{\n "text": ["a", "b"],\n "label": [0, 1]\n}',
    "objects of many lines": '{"text": "a",\n "label": 0}\n{"text": "b",\n "label": 1}',
    "a key that only one row has": '[{"text": "a", "label": 0}, {"text": "b", "label": 1, "note": "n"}]',
}


@pytest.mark.parametrize("case", JSON_FORMS)
def test_json_of_every_form(tmp_path: Path, case: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.json").write_text(JSON_FORMS[case])
    read = texts(tmp_path / "set/all.json", template="{text}")
    assert (list(read.inputs), read.targets.tolist()) == (["a", "b"], [0, 1])


# labels


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        (["0", "1", "0"], ["a", "b"], [0, 1, 0]),
        (["1", "2", "1"], ["a", "b"], [0, 1, 0]),
        (["10", "2", "30"], ["a", "b", "c"], [1, 0, 2]),
        (["-1", "1", "-1"], ["a", "b"], [0, 1, 0]),
        (["-1", "0", "1"], ["a", "b", "c"], [0, 1, 2]),
        (["001", "002", "010"], ["a", "b", "c"], [0, 1, 2]),
        (["0", "2", "2"], ["a", "b", "c"], [0, 2, 2]),
        (["1", "2", "1"], ["1", "2", "3"], [0, 1, 0]),  # names, not places
        (["3", "1", "2"], ["3", "2", "1"], [0, 2, 1]),
        (["b", "a", "b"], ["b", "a"], [0, 1, 0]),
        (["false", "true", "True"], ["a", "b"], [0, 1, 1]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_labels_are_names_or_integers_from_0_or_as_many_as_the_classes(
    tmp_path: Path, labels: list[str], class_names: list[str], expected: list[int], suffix: str
) -> None:
    file = tmp_path / f"set/all.{suffix}"
    file.parent.mkdir()
    if suffix == "csv":
        file.write_text("text,label\n" + "".join(f"x{row},{label}\n" for row, label in enumerate(labels)))
    elif suffix == "jsonl":
        bare = [label if re.fullmatch(r"-?[1-9]\d*|0|true|false", label) else json.dumps(label) for label in labels]
        file.write_text("".join(f'{{"text": "x{row}", "label": {label}}}\n' for row, label in enumerate(bare)))
    else:
        is_number = all(str(int(label)) == label for label in labels if label.lstrip("-").isdecimal())
        is_number &= all(label.lstrip("-").isdecimal() for label in labels)
        values, kind = (list(map(int, labels)), "int64") if is_number else (labels, "string")
        features = {"text": datasets.Value("string"), "label": datasets.Value(kind)}
        table(file, {"text": [f"x{row}" for row in range(3)], "label": values}, features)
    task = {"class_names": class_names, "label_words": [f"w{name}" for name in class_names]}
    assert texts(file, **task).targets.tolist() == expected


def test_integers_from_1_are_the_same_classes_in_every_split(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text("text,label\na,1\nb,2\nc,3\n")
    (tmp_path / "set/test.csv").write_text("text,label\na,3\nb,2\n")
    task = {"class_names": ["x", "y", "z"], "label_words": ["one", "two", "three"]}
    assert list(texts(tmp_path / "set", **task).answers) == ["three", "two"]


def test_integers_that_begin_at_1_and_leave_out_a_class_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.csv").write_text("text,label\na,1\nb,2\n")
    with caplog.at_level(logging.WARNING):
        texts(tmp_path / "set/all.csv", class_names=["x", "y", "z"], label_words=["one", "two", "three"])
    assert "integer labels are places from 0, and no row is labelled 0; the labels are 1, 2" in caplog.text


BAD_LABELS = {
    "empty": (["0", "", "1"], {}, r"1 of 3 rows of test have no label in 'label': rows 1, counted from 0"),
    "blank": (["0", " ", "\t"], {}, r"2 of 3 rows of test have no label in 'label': rows 1, 2, counted"),
    "more values than names": (["1", "2", "3"], {}, r"label 2 of test is out of range, the task has 2 classes"),
    "beyond the last": (["0", "1", "2"], {"class_names": ["a", "b"]}, r"label 2 of test is out of range"),
    "none": (["0", "1", "-1"], {"class_names": ["a", "b"]}, r"label -1, which stands for none, in 1 of 3 rows of test"),
    "no names": (["1", "2", "1"], {"label_words": None}, r"the labels of test are integers without names"),
    "fractions": (["1.0", "2.0", "1.0"], {}, r"label_words of task 'own' .* lacks 1\.0, 2\.0 of the data's 2 classes"),
    "other names": (["pos", "neg", "pos"], {}, r"label_words of task 'own' \(2 names\) lacks neg, pos of the data's"),
    "another case": (["Bad", "good", "Bad"], {}, r"lacks Bad of the data's 2 classes; did you mean 'bad'\?"),
    "too large": (["1", "12345678901234567890", "1"], {}, r"lacks 1, 12345678901234567890 of the data's"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_other_labels_are_refused(tmp_path: Path, case: str) -> None:
    labels, task, message = BAD_LABELS[case]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.csv").write_text("text,label\n" + "".join(f"x,{label}\n" for label in labels))
    with pytest.raises(InputError, match=message):
        texts(tmp_path / "set/all.csv", **task)


@pytest.mark.parametrize("row", ['{"text": "b"}', '{"text": "b", "label": null}', '{"text": "b", "label": NaN}'])
def test_a_label_that_json_lacks_is_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.jsonl").write_text('{"text": "a", "label": 0}\n' + row + "\n")
    with pytest.raises(InputError, match=r"1 of 2 rows of test have no label in 'label': rows 1"):
        texts(tmp_path / "set/all.jsonl")


@pytest.mark.parametrize(
    ("cells", "bad"),
    [(["1.5", "x", "2"], "1"), (["", "1", "2"], "0"), (["1", "NA", "1,5"], "1, 2"), (["nan", "inf", "3"], "0, 1"),
     (["1_0", "2", "0x1"], "0, 2")],
)  # fmt: skip
def test_scores_are_numbers_or_refused_by_their_rows(tmp_path: Path, cells: list[str], bad: str) -> None:
    (tmp_path / "set").mkdir()
    lines = "".join(f'x,"{cell}"\n' for cell in cells)
    (tmp_path / "set/all.csv").write_text("text,score\n" + lines)
    message = rf"{bad.count(',') + 1} of 3 rows of test have no number in 'score': rows {bad}, counted from 0"
    with pytest.raises(InputError, match=message):
        texts(tmp_path / "set/all.csv", target_column="score", label_words=None)


@pytest.mark.parametrize("cells", [["1", "2.5", "-3"], ["+1.0", " 2e1 ", ".5"], ["0", "007", "1."]])
def test_scores_as_text(tmp_path: Path, cells: list[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/all.csv").write_text("text,score\n" + "".join(f"x,{cell}\n" for cell in cells))
    read = texts(tmp_path / "set/all.csv", target_column="score", label_words=None)
    assert read.targets.tolist() == [float(cell) for cell in cells]


# columns

CLASSES = datasets.ClassLabel(names=["cat", "dog"])
KINDS = datasets.ClassLabel(names=["photo", "drawing", "none"])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"kind": KINDS, "label": CLASSES}, ("cat", "dog")),
        ({"label": CLASSES, "kind": KINDS}, ("cat", "dog")),
        ({"coarse_label": KINDS, "fine_label": CLASSES}, ("cat", "dog")),
        ({"kind": KINDS, "labels": CLASSES}, ("cat", "dog")),
        ({"kind": KINDS}, ("photo", "drawing", "none")),
        ({"kind": KINDS, "label": datasets.Value("string")}, ("a", "b")),
        ({"label": datasets.Value("float32"), "kind": KINDS}, ("photo", "drawing", "none")),
    ],
)
def test_the_label_is_the_column_called_so(tmp_path: Path, columns: dict[str, Any], expected: tuple[str, ...]) -> None:
    def values(feature: Any) -> list:
        return ["a", "b"] * 2 if getattr(feature, "dtype", "") == "string" else [0, 1, 1, 0]

    rows = {"image": [{"bytes": png(row), "path": None} for row in range(4)]}
    rows |= {name: values(feature) for name, feature in columns.items()}
    folder = table(tmp_path / "set/test.parquet", rows, {"image": datasets.Image(), **columns})
    assert images(folder, "test").tasks["own"].class_names == expected


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"image": datasets.Image(), "kind": KINDS, "animal": CLASSES}, "any of kind, animal may be"),
        ({"image": datasets.Image(), "class": CLASSES, "target": CLASSES}, "any of class, target may be"),
        (
            {"front": datasets.Image(), "back": datasets.Image(), "label": CLASSES},
            "any of front, back may be",
        ),
    ],
)
def test_columns_that_are_equally_good_are_asked_for(tmp_path: Path, columns: dict[str, Any], what: str) -> None:
    rows = {
        name: [{"bytes": png(row), "path": None} for row in range(4)]
        if isinstance(kind, datasets.Image)
        else [0, 1, 1, 0]
        for name, kind in columns.items()
    }
    folder = table(tmp_path / "set/test.parquet", rows, columns)
    with pytest.raises(
        InputError, match=rf"task 'own': {what} the (label|image); name it with (label|image)_column: \.\.\."
    ):
        images(folder, "test")


@pytest.mark.parametrize("cells", ['["a"], ["b", "c"]', '{"k": 1}, {"k": 2}', '["a"], "b"', "[1, 2], [3]"])
def test_lists_and_objects_are_no_text(tmp_path: Path, cells: str) -> None:
    values = json.loads(f"[{cells}]")
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"text": value, "label": row}) for row, value in enumerate(values)]
    (tmp_path / "set/all.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"column 'text' holds no text but|the values of 'text' are of several kinds"):
        texts(tmp_path / "set/all.jsonl")


def test_bytes_are_no_text_and_a_number_that_is_none_is_an_empty_cell(tmp_path: Path) -> None:
    rows = {"text": [b"a film", b"b"], "label": [0, 1]}
    folder = table(tmp_path / "set/test.parquet", rows, datasets.Features(text=LARGE_BINARY, label=INTEGER))
    with pytest.raises(InputError, match=r"column 'text' holds no text but Value\('large_binary'\)"):
        texts(folder)
    rows = {"text": ["a", "b"], "number": [1.5, float("nan")], "label": [0, 1]}
    columns = datasets.Features(text=datasets.Value("string"), number=datasets.Value("float64"), label=INTEGER)
    read = texts(table(tmp_path / "other/test.parquet", rows, columns), template="{text} {number}")
    assert list(read.inputs) == ["a 1.5", "b "]


def test_a_raw_row_is_read_as_a_row_of_the_table(tmp_path: Path) -> None:
    rows = {"text": ["a", "b", "c"], "score": [0.45, 1.15, 0.85]}
    columns = datasets.Features(text=datasets.Value("string"), score=datasets.Value("float64"))
    folder = table(tmp_path / "set/test.parquet", rows, columns)
    task = Task(name="own", path=str(folder), template="{text}", target_column="score", test="test")
    source = TextSource(task, None, tmp_path / "cache")
    read = source.texts("test")
    for row, (text, score) in enumerate(zip(rows["text"], rows["score"], strict=True)):
        raw = {"text": text, "score": score}
        assert (source.render(raw), source.answer(raw)) == (read.inputs[row], read.answers[row])
        assert source.answer(raw) == f"{score:.1f}"
    for number in (np.float32(1.5), np.int64(3), Decimal("1.5")):
        assert source.answer({"text": "a", "score": number}) == f"{float(number):.1f}"
    for bad in (None, "x", "", [1.0], float("nan"), 1e39):
        with pytest.raises(InputError, match=r"the row has no number in 'score', but"):
            source.answer({"text": "a", "score": bad})
    for bad in (["a"], {"k": 1}, b"a", np.array([1, 2])):
        with pytest.raises(InputError, match=r"column 'text' holds no text but"):
            source.render({"text": bad, "score": 1})
