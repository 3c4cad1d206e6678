"""What is given twice, on one command line or in one file, is refused: only one of the two would count."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fusionlab.__main__ import main
from fusionlab.commands.fit import FusionCLI
from fusionlab.commands.fuse.command import parse as parse_fuse
from fusionlab.commands.parser import parse
from fusionlab.commands.sweep.command import SWITCHES
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.errors import InputError
from fusionlab.foreign import check_keys

FUSE = ["fuse", "--base", "tiny-clip", "--output", "out"]
FLAGS = {
    "tasks": (
        ["fit", "--data.tasks", "[digits]", "--data.tasks", "[signs]"],
        r"--data\.tasks is given 2 times: \[digits",
    ),
    "tasks, one with init_args": (
        ["fit", "--data.tasks=[digits]", "--model.rank", "4", "--data.init_args.tasks=[signs]"],
        r"--data\.tasks is given 2 times",
    ),
    "tasks of test": (
        ["test", "--data.tasks", "[{name: a, path: b}]", "--data.tasks", "[signs]"],
        "is given 2 times",
    ),
    "rules": (
        ["fit", "--fusion.rules", "[ties]", "--fusion.rules", "{m: metagpt}"],
        r"--fusion\.rules is given 2 times",
    ),
    "one rule": (["fit", "--fusion.rules.m=ties", "--fusion.rules.m=metagpt"], r"--fusion\.rules\.m is given 2 times"),
    "a key in a flag": (["fit", "--fusion.rules", "{m: metagpt, m: ties}"], r"the key 'm' is given twice"),
    "a key of a task": (["fit", "--data.tasks", "[{name: a, path: b, path: c}]"], r"the key 'path' is given twice"),
    "finetuned": ([*FUSE, "--finetuned", "{a: x}", "--finetuned", "{b: y}"], r"--finetuned is given 2 times"),
    "one task of fuse": ([*FUSE, "--finetuned.a", "x", "--finetuned.a", "y"], r"--finetuned\.a is given 2 times: x, y"),
    "a task in both forms": (
        [*FUSE, "--finetuned", "{a: x}", "--finetuned.a=y"],
        r"--finetuned \{a: x\} and --finetuned\.a:",
    ),
    "the whole after one": ([*FUSE, "--finetuned.a=y", "--finetuned={b: x}"], r"only one of them would count"),
    "a key of finetuned": ([*FUSE, "--finetuned", "{a: x, a: y}"], r"the key 'a' is given twice"),
    "rules of sweep": (
        ["sweep", "--output", "o", "--rules", "[ties]", "--rules", "[average]"],
        r"--rules is given 2 times",
    ),
    "runs of sweep": (["sweep", "--output", "o", "--runs=[a]", "--runs=[b]"], r"--runs is given 2 times"),
}
FILES = {
    "a task of a recipe": (
        "fuse",
        "base: b\noutput: o\nfinetuned:\n  math: a\n  code: b\n  math: c\n",
        "'math'.* lines 4 and 6",
    ),
    "a top key of a recipe": ("fuse", "base: b\nfinetuned: {a: x}\noutput: o\nfinetuned: {b: y}\n", "'finetuned'"),
    "a recipe in json": (
        "fuse",
        '{"base": "b", "output": "o", "finetuned": {"a": "x", "a": "y"}}',
        "'a' is given twice",
    ),
    "a rule's argument": (
        "fuse",
        "base: b\nrule:\n  class_path: ties\n  init_args: {density: .1, density: .2}\n",
        "density",
    ),
    "mergekit's models": ("fuse", "merge_method: linear\nmodels: []\nmodels: []\n", "'models' is given twice"),
    "tasks of fit": (
        "fit",
        "data:\n  init_args:\n    tasks: [digits]\n    tasks: [signs]\n",
        "'tasks'.* lines 3 and 4",
    ),
    "a task's key": ("fit", "data:\n  init_args:\n    tasks:\n    - name: a\n      path: b\n      path: c\n", "'path'"),
    "a rule of fit": ("fit", "fusion:\n  rules:\n    m: metagpt\n    n: ties\n    m: average\n", "'m' is given twice"),
    "data of fit": ("fit", "data: {init_args: {tasks: [digits]}}\nseed_everything: 1\ndata: ImageTasks\n", "'data'"),
    "a rule of sweep": ("sweep", "output: o\nrules:\n  m: metagpt\n  m: ties\n", "'m' is given twice"),
    "a method of sweep": ("sweep", "output: o\nby_method: {full: {a: 1}, lora: {}, full: {b: 2}}\n", "'full'"),
    "quoted and not": ("fuse", "base: b\nfinetuned: {1: x, '1': y}\n", "'1' is given twice"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = FLAGS[case]
    refused(argv, message, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command, text, message = FILES[case]
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/given.yaml").write_text(text)
    (tmp_path / "work").mkdir()
    refused([command, "--config", "../inputs/given.yaml"], message, tmp_path / "work", monkeypatch, capsys)


def test_the_fit_file_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/fit.yaml").write_text(
        "data:\n  init_args: {tasks: [digits, signs]}\n  init_args: {batch_size: 3}\n"
    )
    (tmp_path / "work").mkdir()
    argv = ["sweep", "--output", "out", "--fit", "../inputs/fit.yaml", "--dry_run"]
    refused(argv, r"fit\.yaml.*'init_args' is given twice", tmp_path / "work", monkeypatch, capsys)


def refused(
    argv: list[str], message: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    code = main(argv)
    stderr = capsys.readouterr().err
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert re.search(message, stderr), stderr
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("first", ["file", "flag"])
def test_a_flag_over_a_key_of_a_file_is_allowed_wherever_it_stands(tmp_path: Path, first: str) -> None:
    (tmp_path / "fuse.yaml").write_text("base: b\noutput: o\nfinetuned: {a: x}\nrule: ties\n")
    file, flag = ["--config", str(tmp_path / "fuse.yaml")], ["--finetuned", "{b: y}", "--rule=average"]
    recipe = parse_fuse(file + flag if first == "file" else flag + file)
    assert (recipe.finetuned, recipe.rule, recipe.base) == ({"b": "y"}, "average", "b")
    (tmp_path / "sweep.yaml").write_text("output: o\nrules: [ties]\n")
    file, flag = [f"--config={tmp_path / 'sweep.yaml'}"], ["--rules", "[average]"]
    assert parse(SweepRecipe, file + flag if first == "file" else flag + file, "sweep", SWITCHES).rules == ["average"]


@pytest.mark.parametrize("first", ["file", "flag"])
def test_a_flag_of_fit_over_a_key_of_a_file(tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fit.yaml").write_text("data: {init_args: {tasks: [digits]}}\nmodel: {init_args: {rank: 2}}\n")
    file, flag = ["--config", str(tmp_path / "fit.yaml")], ["--data.tasks", "[signs, glyphs]"]
    seen = {}

    def stop(cli: FusionCLI) -> None:
        seen.update(tasks=cli.config["fit"].data.init_args.tasks, rank=cli.config["fit"].model.init_args.rank)
        raise InputError("enough")

    monkeypatch.setattr(FusionCLI, "before_instantiate_classes", stop)
    assert main(["fit", *(file + flag if first == "file" else flag + file)]) == 2
    assert seen == {"tasks": ["signs", "glyphs"], "rank": 2}


def test_what_is_not_given_twice_passes(tmp_path: Path) -> None:
    argv = ["--base=b", "--output=o", "--finetuned", "{a: x}", "--finetuned.b", "y", "--rule.density=.1", "--threads=1"]
    recipe = parse_fuse([*argv, "--threads", "2"])  # of a number the last one counts, as everywhere
    assert (recipe.finetuned, recipe.threads) == ({"a": "x", "b": "y"}, 2)
    assert parse_fuse(["--base=b", "--output=o", "--finetuned.a.b=x", "--finetuned.a-b=y"]).finetuned == {
        "a.b": "x",
        "a-b": "y",
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {p: 1, q: 2}\nb: {<<: *x, p: 3}\n",  # its own key over a merged one
        "a: &x {p: 1}\nb: *x\nc: *x\n",
        "- {a: 1}\n- {a: 1}\n",
        "a: {b: 1}\nb: {b: 1}\n",
        json.dumps({"tasks": [{"name": "a"}, {"name": "b"}]}),
        "",
        "just text",
    ],
)
def test_repeated_names_in_other_mappings_are_none(text: str) -> None:
    check_keys(text, "it")


@pytest.mark.parametrize(
    "text", ["a: 1\n? a\n: 2\n", "a: &x {p: 1, p: 2}\nb: *x", "- - {k: 1, k: 2}", "{1: a, 0x1: b}"]
)
def test_repeated_keys_in_any_form(text: str) -> None:
    with pytest.raises(InputError, match="is given twice"):
        check_keys(text, "it")
