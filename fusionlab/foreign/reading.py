"""JSON and YAML that others wrote, read into mappings whose fields have the types of a schema.

What a field of the right type means, and whether it fits, is said where it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, mistaken
from fusionlab.foreign.schemas import Schema

_VALUE_SHOWN = 60
_MISSING = "missing"
_FLOAT = "tag:yaml.org,2002:float"
_NOT_READ = ("tag:yaml.org,2002:timestamp", _FLOAT)
# numbers as `fit` reads them, 1e-3 among them, which YAML 1.1 takes for a text
_NUMBER = re.compile(
    r"""^(?:
    [-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


def read_json(path: Path, schema: type[Schema] = Schema) -> dict[str, Any]:
    """The mapping in a JSON file, in which the fields that ``schema`` names have its types.

    Raises:
        InputError: it cannot be read, is not JSON or not a mapping, says one key twice and differently, or a field is
            of another type; the message names the file, the field, what was expected and what came.
    """
    return checked(path, _parsed(path), schema)


def read_json_list(path: Path, schema: type[Schema]) -> list[dict[str, Any]]:
    """The mappings in a JSON file that is a list of them; as :func:`read_json`, but of another tool's file nothing."""
    content = _parsed(path)
    return [checked(path, each, schema) for each in content] if isinstance(content, list) else []


def read_names(path: Path) -> list[str]:
    """The texts in a JSON file that is a list of them.

    Raises:
        InputError: it cannot be read, is not JSON, or is something else.
    """
    content = _parsed(path)
    if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
        raise InputError(f"{str(path)!r} holds {_short(content)}, expected a list of names.")
    return content


def _parsed(path: Path) -> Any:
    with accessed(path):
        data = path.read_bytes()
    try:
        return json.loads(data, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {mistaken(path, data) or error}.") from error


def read_yaml(path: Path, schema: type[Schema] = Schema) -> dict[str, Any]:
    """As :func:`read_json`, of a YAML file."""
    with accessed(path):
        data = path.read_bytes()
    return checked(path, parse_yaml(data, repr(str(path))), schema)


def parse_yaml(text: str | bytes, what: str) -> Any:
    """The value that a YAML text stands for; a date stays the text that it is written as, and 1e-3 is a number.

    Raises:
        InputError: it is not YAML, or gives a key twice in one mapping; the message begins with ``what``.
    """
    try:
        check_keys(text, what)
        return yaml.load(text, _Loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def yaml_of(content: Mapping[str, Any]) -> str:
    """A mapping as YAML, in its own order, of which :func:`parse_yaml` and ``fit`` read the very values."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False)


def check_keys(text: str | bytes, what: str) -> None:
    """Raise if a mapping anywhere in a YAML text gives a key twice, of which the first would be dropped without a word.

    Raises:
        InputError: naming the key and its lines; the message begins with ``what``.
        yaml.YAMLError: it is no YAML.
    """
    loader = _Loader(text)
    try:
        nodes, seen = [loader.get_single_node()], set()
        while nodes:
            node = nodes.pop()
            if id(node) in seen or not isinstance(node, yaml.CollectionNode):
                continue
            seen.add(id(node))
            lines: dict[str, int] = {}
            for child in node.value:
                if not isinstance(node, yaml.MappingNode):
                    nodes.append(child)
                    continue
                key, value = child
                nodes += [key, value]
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                name = str(loader.construct_object(key, deep=True))
                if name in lines:
                    where = f"in lines {lines[name]} and {key.start_mark.line + 1}"
                    raise InputError(f"{what}: the key {name!r} is given twice, {where}, and one would count; keep one")
                lines[name] = key.start_mark.line + 1
    finally:
        loader.dispose()


def as_json(content: Any, what: str) -> str:
    """``content`` as JSON.

    Raises:
        InputError: it has values that JSON has not; the message begins with ``what``.
    """
    try:
        return json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} holds what is neither text, number, list nor mapping: {error}.") from error


_RESOLVERS = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_READ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    """YAML's plain values; a path such as 2026-01-31 is no date."""

    yaml_implicit_resolvers: ClassVar = {letter: list(resolvers) for letter, resolvers in _RESOLVERS.items()}


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that would be read as something else."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789."))


def checked(path: Path, content: Any, schema: type[Schema]) -> dict[str, Any]:
    """``content`` itself, where it is a mapping that fits ``schema``; see :func:`read_json`."""
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{str(path)!r} holds {held}, expected a mapping.")
    try:
        schema.model_validate(content)
    except ValidationError as error:
        problems = list(_problems(content, error))
        raise InputError(f"{str(path)!r}: {name_list(problems, 3)}.") from error
    return content


def _unambiguous(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key, value in pairs:
        if len(found) < len(pairs) and found[key] != value:
            raise ValueError(f"the key {key!r} comes twice, as {value!r} and as {found[key]!r}")
    return found


def _problems(content: Mapping[str, Any], error: ValidationError) -> Iterator[str]:
    """One text a field: what it was expected to be, by all that it might have been, and what it is."""
    expected: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for each in error.errors(include_url=False):
        where, value = _located(content, each["loc"])
        values[where] = value
        text = each["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if each["type"] == _MISSING:
            where, text = ".".join(filter(None, (where, str(each["loc"][-1])))), _MISSING
        expected.setdefault(where, []).append(text)
    for where, texts in expected.items():
        kinds = " or ".join(dict.fromkeys(text for text in texts if text != _MISSING))
        yield f"{where}: expected {kinds}, got {_short(values[where])}" if kinds else f"{where} is missing"


def _located(content: Any, loc: Sequence[int | str]) -> tuple[str, Any]:
    """The field that a location names, and its value; what only says which of several types was tried is left out."""
    path = []
    for part in loc:
        if part == "[key]":
            return ".".join(path), path[-1]
        is_key = isinstance(content, Mapping) and part in content
        is_index = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if not (is_key or is_index):
            break
        content = content[part]
        path.append(str(part))
    return ".".join(path), content


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]}..."
