"""jsonargparse's messages in one line, for every command: what was expected, what came, and the nearest known name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fusionlab.commands.given import COMMANDS_OF, does_nothing
from fusionlab.errors import InputError, did_you_mean

QUOTED = r"'([^']+)'"


def readable(message: str, flags: Iterable[str], command: str) -> str:
    """One line out of a parser's message.

    Args:
        message: of jsonargparse.
        flags: the names of the command's flags, without dashes.
        command: its name.
    """
    unknown = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)|does not accept option '([\w.]+)'", message)
    if unknown:
        return _unknown(unknown[1] or unknown[2], list(flags), command)
    if file := re.search(r"File does not exist: '?(.+?)'?$", message.strip(), re.MULTILINE):
        return f"--config: {file[1]!r} does not exist; give a YAML file"
    if required := re.search(r"arguments are required: (.+)|[Kk]ey \"?([\w.]+)\"? is required", message):
        names = required[1] or _key(message, required[2])
        return f"missing: {names}. Give it as a flag, or as a key of a file with --config."
    if option := re.search(r"given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message):
        from fusionlab.search.workbench import arguments_of, class_of  # the class is there already, and all it needs

        path, name = option.groups()
        known = arguments_of(class_of(path, "fusionlab"))
        return f"{_key(message)}: unknown key {name!r} of {path.rpartition('.')[2]}; {did_you_mean(name, known)}"
    return _wrong_value(message) or " ".join(message.split())


def refused_class(message: str) -> str | None:
    """One line of a class that could not be made, such as a logger whose package is missing; None for another error."""
    found = re.search(r"Problem with given class_path '([\w.]+)':\s*(.+?)(?:\n  - Expected|$)", message, re.DOTALL)
    return None if found is None else f"{found[1]}: {' '.join(found[2].split())}"


def input_error_in(error: BaseException | None) -> InputError | None:
    """The InputError that jsonargparse wrapped while it built an object, if there is one; any other is a fault."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _unknown(name: str, flags: list[str], command: str) -> str:
    if command not in COMMANDS_OF.get(name, (command,)):
        return does_nothing(name, command)
    section, _, rest = name.partition(".")
    classes = [f"{flag}.{rest}" for flag in ("model", "data") if flag in flags and rest and section not in flags]
    return f"unknown key {name!r}; {did_you_mean(name, [*flags, *classes])}"


def _wrong_value(message: str) -> str | None:
    """One line of a value of another type, or of a class that is none or of another kind; None for another error."""
    value = re.search(r"Got value: (.+)", message) or re.search(r"Given value: (.+)", message)
    key, kinds = _key(message), _kinds(message)
    if not key or value is None:
        return None
    if key in ("model", "data"):
        return _wrong_class(message, key, value[1].strip())
    return f"{key}: {_expected(kinds, value[1].strip())}" if kinds else None


def _wrong_class(message: str, key: str, value: str) -> str | None:
    if kind := re.search(r"Import path does not correspond to a subclass of (\w+)", message):
        return f"{key}: {value} is no {kind[1]}"
    if "Expected a dot import path string" in message:
        from fusionlab import data, modules

        known = did_you_mean(value, (modules if key == "model" else data).__all__)
        return f"{key}: no class {value!r}; {known} A class of your own is given by its path, such as my_package.Mine"
    refused = refused_class(message)
    return None if refused is None else f"{key}: {refused}"


def _key(message: str, last: str | None = None) -> str:
    """The key that a message is about, with those that it lies in."""
    keys = re.findall(r'arser key "([\w.]+)"', message)
    return ".".join(dict.fromkeys([*keys, *([last] if last else [])]))


def _kinds(message: str) -> list[str]:
    """The types that were expected, as jsonargparse writes them."""
    return list(dict.fromkeys(re.findall(r"Expected an? (<class '.+?'>|typing\.\w+\[.+?\](?=\.|\s|$))", message)))


def _expected(kinds: list[str], value: str) -> str:
    choices = [choice for kind in kinds if kind.startswith("typing.Literal[") for choice in re.findall(QUOTED, kind)]
    if choices:
        return f"no such choice {value!r}; {did_you_mean(value, choices)}"
    if kinds[0].removeprefix("<class '").startswith(("list", "typing.List")) and re.fullmatch(r"'?[\w./-]+'?", value):
        return f"expected a list, got {value!r}; a list is written '[{value.strip(chr(39))}]'"
    names = [re.sub(r"<class '(.+?)'>", r"\1", kind).removeprefix("typing.") for kind in kinds]
    return f"expected {' or '.join(name for name in names if name != 'NoneType')}, got {value!r}"
