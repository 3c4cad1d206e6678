"""Writes the pages that are made from the package itself into ``docs/made``: what a class, a flag or a row says.

Called by ``conf.py`` before each build. Pages are Markdown for MyST; docstrings are in Google's form.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule

import fusionlab
from fusionlab.commands.fit import TRAINER_DEFAULTS, FusionCLI
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.commands.parser import build_parser
from fusionlab.commands.push import PushRecipe
from fusionlab.commands.report import ReportRecipe
from fusionlab.commands.rules import HEADER, rows
from fusionlab.commands.sweep.recipe import METHODS, SweepRecipe
from fusionlab.rules.config import known_rules, known_task_known_rules
from fusionlab.search.base import known_searches

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
_SECTIONS = ("Args", "Returns", "Raises", "Example", "Source", "Yields")
# what the tables of results call rules -> their names in a configuration
_MEASURED_AS = {
    "average": "average", "task arithmetic": "task_arithmetic", "MetaGPT": "metagpt", "TIES": "ties",
    "MetaGPT, multiplier": "metagpt_multiplier", "LoraHub": "lorahub", "LoraHub, 10 evaluations": "lorahub",
}  # fmt: skip
_TABLES = {
    "sweep_six_images_2cpu_202611": "six image sets on a small CLIP, one of them cropped as today's code does not",
    "sweep_embedded_t5_2cpu_202611": "seven embedded text tasks on tiny-t5",
}


class _ParsersError(Exception):
    """Ends Lightning's command line once its parsers are there."""


def write(folder: Path) -> list[Path]:
    """Write all pages into ``folder``, which is made anew; returns their paths."""
    shutil.rmtree(folder, ignore_errors=True)
    every = known_rules() | known_task_known_rules() | known_searches()
    pages = {
        **{f"rules/{name}": rule_page(name, found) for name, found in every.items()},
        **{f"finetuning/{method}": finetuning_page(method) for method in METHODS},
        **{f"commands/{command}": command_page(command, parser) for command, parser in parsers().items()},
        "api": api_page(),
        "rows": rows_page(),
    }
    for part in ("rules", "finetuning", "commands"):
        names = [name.partition("/")[2] for name in pages if name.startswith(f"{part}/")]
        pages[part] = _index(part, names)
    written = []
    for name, text in pages.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path)
    return written


def rule_page(name: str, described: type) -> str:
    """The page of a rule or a search: formula, cost, arguments, source, and what was measured."""
    row = next(dict(zip(HEADER, cells, strict=True)) for cells in rows() if cells[0] == name)
    cost = [f"- λ: {row['λ']}", f"- looks at: {row['looks at']}", f"- of adapters makes: {row['of adapters makes']}"]
    cost += ["- needs to know the task of an input"] if row["needs the task"] == "yes" else []
    cost += [
        "- cost: it scores models instead of reading files"
        if row["reads"] == "-"
        else f"- cost: reads every input {_times(row['reads'])}"
    ]
    figures = "".join(_figures(name))
    return (
        "\n\n".join(
            part
            for part in (
                f"# {name}",
                _docstring(described),
                "## What it takes\n\n" + "\n".join(cost),
                f"## When it helps here\n\n{figures}" if figures else "",
                f"## In a configuration\n\n```yaml\n{_config(name, described)}```",
            )
            if part
        )
        + "\n"
    )


def finetuning_page(method: str) -> str:
    """The page of a fine-tuning method."""
    known = yaml.safe_load((DOCS / "finetuning.yaml").read_text())[method]
    figures = "".join(_figures_of_method(method))
    lines = [f"# {method}", known["what"], f"**Trains:** {known['trains']}", f"**Cost:** {known['cost']}"]
    lines += [f"**Source:** {known['source']}"]
    lines += [f"## When it helps here\n\n{figures}" + "\n".join(f"- {line}" for line in known.get("shown", []))]
    return "\n\n".join(lines) + f"\n\nOn the command line: `--model.method {method}`.\n"


def api_page() -> str:
    """Every public name: signature and docstring."""
    parts = ["# Python reference", "The names that `import fusionlab` gives."]
    for name in fusionlab.__all__:
        found = getattr(fusionlab, name)
        if inspect.ismodule(found):
            listed = ", ".join(f"[`{rule}`](rules/{rule}.md)" for rule in known_rules())
            parts.append(f"## {name}\n\n{_text(inspect.getdoc(found) or '')}\n\n{listed}")
            continue
        parts.append(f"## {name}\n\n```text\n{_signature(name, found)}\n```\n\n{_docstring(found)}")
        for method, member in _public_members(found):
            parts.append(f"### {name}.{method}\n\n{_docstring(member)}")
    return "\n\n".join(parts) + "\n"


def rows_page() -> str:
    """Every field of a row of ``results.json``."""
    known = yaml.safe_load((DOCS / "rows.yaml").read_text())
    text = ["# Fields of a row", known["about"], "| field | what it says |", "| --- | --- |"]
    table = [f"| `{field}` | {said} |" for field, said in known["fields"].items()]
    more = ["| further field | what it says |", "| --- | --- |"]
    more += [f"| `{field}` | {said} |" for field, said in known["further"].items()]
    return "\n".join([*text[:1], "", text[1], "", *text[2:], *table, "", *more, ""])


def parsers() -> dict[str, Any]:
    """The parser of every command that has options."""
    found: dict[str, Any] = {}

    class Reader(FusionCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.update(self._subcommand_parsers)
            raise _ParsersError

    with suppress(_ParsersError):
        Reader(
            LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_callback=None, seed_everything_default=42, trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False, load_from_checkpoint_support=False, args=["fit"],
        )  # fmt: skip
    recipes = {"fuse": Recipe, "sweep": SweepRecipe, "push": PushRecipe, "report": ReportRecipe}
    return found | {command: build_parser(recipe, command, {}) for command, recipe in recipes.items()}


def command_page(command: str, parser: Any) -> str:
    """Every flag of a command, with its default and its help."""
    lines = [f"# {command}", "", _text(_about(command)), "", "| flag | default | what it does |", "| --- | --- | --- |"]
    for flag, default, said in flags(parser):
        lines.append(f"| `--{flag}` | {default} | {said} |")
    if command in ("fit", "validate", "test", "predict"):
        lines += ["", "`--model.ARGUMENT` and `--data.ARGUMENT` are the arguments of the class that `--model` and "]
        lines += ["`--data` name: [Python reference](../api.md). What acts differently from Lightning's own "]
        lines += ["documentation: [options of Lightning](../../options.md)."]
    return "\n".join([*lines, ""])


def flags(parser: Any) -> Iterator[tuple[str, str, str]]:
    """(name, default, help) of each flag of a parser."""
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if not names or names[0].endswith(".help") or names[0] == "--help":
            continue
        default = "" if action.default in (None, "==SUPPRESS==") else f"`{_plain(action.default)}`"
        text = action.help if isinstance(action.help, str) and action.help != "==SUPPRESS==" else ""
        yield names[0].removeprefix("--"), default, _cell(text)


def _about(command: str) -> str:
    from fusionlab.__main__ import COMMANDS

    return f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}."


def _index(part: str, names: Iterable[str]) -> str:
    titles = {
        "rules": "Rules and searches",
        "finetuning": "Fine-tuning methods",
        "commands": "Commands and their flags",
    }
    listed = "\n".join(f"{part}/{name}" for name in names)
    return f"# {titles[part]}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"


def _times(number: str) -> str:
    return {"1": "once", "2": "twice"}.get(number, f"{number} times")


def _config(name: str, described: type) -> str:
    """A configuration with all arguments at their defaults; what has none is given an example."""
    given: dict[str, Any] = {}
    for key, parameter in inspect.signature(described).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            given[key] = "average" if key == "rule" else 0.5
        elif isinstance(parameter.default, str | int | float | bool):
            given[key] = parameter.default
    config = {"class_path": name, "init_args": given} if given else name
    return yaml.safe_dump({"rule": config}, sort_keys=False)


def _figures(name: str) -> Iterator[str]:
    """What the measured tables say of a rule, with where they are from."""
    for folder, what in _TABLES.items():
        found = [cells for cells in measured(folder) if _MEASURED_AS.get(cells[1]) == name]
        if found:
            yield _figure_table(folder, what, ["fine-tuned by"], [[cells[0], *cells[2:]] for cells in found])
    known: Mapping[str, list[str]] = yaml.safe_load((DOCS / "shown.yaml").read_text())
    if name in known:
        yield "\n".join(f"- {line}" for line in known[name])


def _figures_of_method(method: str) -> Iterator[str]:
    for folder, what in _TABLES.items():
        found = [cells[1:] for cells in measured(folder) if cells[0] == method]
        if found:
            yield _figure_table(folder, what, ["rule"], found)


def _figure_table(folder: str, what: str, first: list[str], body: list[list[str]]) -> str:
    counts = list(dict.fromkeys(measured_columns(folder)))
    lines = ["| " + " | ".join(cells) + " |" for cells in ([*first, *counts], ["---"] * (1 + len(counts)), *body)]
    return (
        f"Share of full fine-tuning's score on the merged tasks, {what} (± over three seeds; "
        f"`benchmarks/results/{folder}/`, which says what of this is shown and what is not):\n\n"
        + "\n".join(lines)
        + "\n\n"
    )


def measured(folder: str) -> list[list[str]]:
    """[method, rule, share by number of tasks ...] of each line of the first table of results."""
    found, method = [], ""
    for line in _first_table(folder)[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        method = cells[0] or method
        found.append([method, *cells[2:]])
    return found


def measured_columns(folder: str) -> list[str]:
    """What the columns after the rule are called."""
    return [cell.strip() for cell in _first_table(folder)[0].strip().strip("|").split("|")][3:]


def _first_table(folder: str) -> list[str]:
    lines = (RESULTS / folder / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| method"))
    return lines[start : start + next(n for n, line in enumerate([*lines[start:], ""]) if not line.startswith("|"))]


def _signature(name: str, found: Any) -> str:
    try:
        given = inspect.signature(found)
    except ValueError:
        return name
    shown = (re.sub(r""": (['"])(.*?)\1(?= =|$)""", r": \2", str(each)) for each in given.parameters.values())
    listed = "".join(f"    {each},\n" for each in shown)
    return f"{name}(\n{listed})" if listed else f"{name}()"


def _public_members(found: Any) -> Iterator[tuple[str, Any]]:
    if not inspect.isclass(found) or issubclass(found, Exception):
        return
    for name, member in vars(found).items():
        documented = inspect.isfunction(member) or isinstance(member, property | classmethod)
        if not name.startswith("_") and documented and inspect.getdoc(member):
            yield name, member


def _docstring(described: Any) -> str:
    """A docstring in Google's form as Markdown."""
    return "\n\n".join(_sections(inspect.getdoc(described) or ""))


def _sections(text: str) -> Iterator[str]:
    parts = re.split(rf"^({'|'.join(_SECTIONS)}):[ ]*", text, flags=re.MULTILINE)
    yield _text(parts[0].strip())
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title == "Example":
            yield f"**{title}**\n\n```pycon\n{inspect.cleandoc(body)}\n```"
        elif title in ("Args", "Raises"):
            entries = re.split(r"^(?=\S)", inspect.cleandoc(body), flags=re.MULTILINE)
            yield f"**{title}**\n\n" + "\n".join(_entry(each) for each in entries if each.strip())
        else:
            yield f"**{title}:** {_text(' '.join(body.split()))}"


def _entry(text: str) -> str:
    name, _, said = " ".join(text.split()).partition(": ")
    return f"- `{name}`: {_text(said)}"


def _text(text: str) -> str:
    """A docstring's words as Markdown: double backquotes, roles and characters that would be markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<>\[\]*_|])", r"\\\1", part) for part in parts)


def _cell(text: str) -> str:
    return _text(" ".join(text.split())).replace("%%", "%")


def _plain(value: Any) -> str:
    text = str(value.value if hasattr(value, "value") else value)
    return text.replace("|", "\\|").replace("`", "'")


if __name__ == "__main__":
    sys.stdout.write("\n".join(map(str, write(DOCS / "made"))) + "\n")
