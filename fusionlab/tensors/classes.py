"""Model classes as their source says them: read with ``ast``, neither imported nor run.

Importing a model's class costs a fusion 240 MB and 2 s, and code that came with a checkpoint is not run at all. A file
is cut into its classes, and only those that are asked for are parsed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError
from fusionlab.files import accessed

_TOP_LEVEL = re.compile(r"^(?=class |def |@)", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
_ROOTS = {"PreTrainedModel", "PreTrainedConfig", "PretrainedConfig"}  # where inheritance leaves the model's own code
COMPUTED = object()  # an attribute that is more than a literal: only the class itself can tell


@cache
def library() -> Path | None:
    """The folder of transformers' models, found without an import; None where it is not installed."""
    spec = find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "models"


@cache
def library_file(class_name: str, model_type: str = "") -> Path | None:
    """The modeling file of transformers that defines ``class_name``; first where ``model_type`` says, then anywhere."""
    root, wanted = library(), f"\nclass {class_name}(".encode()
    if root is None or not class_name.isidentifier():
        return None
    near = sorted((root / model_type.replace("-", "_")).glob("modeling_*.py")) if model_type.isidentifier() else []
    files = (path for path in (*near, *sorted(root.glob("*/modeling_*.py"))) if wanted in path.read_bytes())
    return next(files, None)


@cache
def _file(path: Path) -> SourceFile:
    return SourceFile(path)


class SourceFile:
    """One Python file, cut into its top-level classes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        head, *parts = _TOP_LEVEL.split(_text(path))
        self._texts = {match[1]: part for part in parts if (match := _CLASS.match(part))}
        self._head = head
        self._found: dict[str, ModelClass] = {}

    def find(self, class_name: str) -> ModelClass | None:
        """The class of this name: defined here, or imported from another modeling file."""
        if class_name in self._texts and class_name not in self._found:
            node = _parsed(self.path, self._texts[class_name]).body[0]
            assert isinstance(node, ast.ClassDef)
            self._found[class_name] = ModelClass(self.path, node)
        if class_name in self._found:
            return self._found[class_name]
        module = self._imported.get(class_name)
        if class_name in _ROOTS or module is None:
            return None
        if isinstance(module, Path):
            return _file(module).find(class_name) if module.is_file() and module != self.path else None
        found = library_file(class_name) if module.partition(".")[0] == "transformers" else None
        return None if found is None else _file(found).find(class_name)

    def makers(self, attribute: str) -> set[str]:
        """What is called to make ``self.ATTRIBUTE``, anywhere in this file or in the modeling files that it imports."""
        pattern = re.compile(rf"self\.{re.escape(attribute)}\s*=\s*(?:\w+\.)*(\w+)\(")
        files = [_file(path) for path in self._imported.values() if isinstance(path, Path) and path.is_file()]
        near = (file for file in (self, *files) if file.path.stem.startswith("modeling_") or file is self)
        return {name for file in near for text in file._texts.values() for name in pattern.findall(text)}

    @cached_property
    def _imported(self) -> dict[str, Path | str]:
        """Class name -> the file that a relative import names, or the module of an absolute one."""
        found: dict[str, Path | str] = {}
        for node in ast.walk(_parsed(self.path, self._head)):
            if isinstance(node, ast.ImportFrom) and node.module:
                where: Path | str = node.module
                if node.level:
                    where = self.path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
                found |= {alias.asname or alias.name: where for alias in node.names}
        return found


@dataclass(frozen=True)
class Child:
    """A part that a class gives itself in its constructor: ``self.NAME = CLASS(CONFIG, ...)``.

    Args:
        name: the attribute.
        class_name: what is called; of ``AutoModel.from_config`` and the like the class before the dot.
        config: the keys that lead from the class's own configuration to the part's; None where it cannot be told.
    """

    name: str
    class_name: str
    config: tuple[str, ...] | None


@dataclass(frozen=True)
class ModelClass:
    """A class in a source file.

    Args:
        path: the file.
        node: its syntax tree.
    """

    path: Path
    node: ast.ClassDef

    @cached_property
    def lineage(self) -> tuple[ModelClass, ...]:
        """The class and those it inherits from, nearest first, as far as they are the model's own code."""
        found = [self]
        for base in self.node.bases:
            name = ast.unparse(base).rpartition(".")[2]
            inherited = _file(self.path).find(name) if name != self.node.name else None
            found += [each for each in (inherited.lineage if inherited else ()) if each not in found]
        return tuple(found)

    def literal(self, attribute: str, default: Any = None) -> Any:
        """The value of a class attribute, of the nearest class that has it; :data:`COMPUTED` where it is no literal."""
        for each in self.lineage:
            for statement in reversed(each.node.body):  # the last one holds
                if isinstance(statement, ast.FunctionDef) and statement.name == attribute:
                    return COMPUTED
                if attribute in _targets(statement) and statement.value is not None:  # type: ignore[attr-defined]
                    return _evaluated(statement.value)  # type: ignore[attr-defined]
        return default

    def mentions(self, attribute: str) -> bool:
        """Whether a method of the class, or of one it inherits from, uses ``.attribute``."""
        return any(
            isinstance(node, ast.Attribute) and node.attr == attribute
            for each in self.lineage
            for node in ast.walk(each.node)
        )

    def children(self) -> tuple[Child, ...]:
        """What the constructors give the class as parts, nearest class first; a part may have alternatives."""
        constructors = (method for each in self.lineage for method in each.methods("__init__"))
        return tuple(dict.fromkeys(child for constructor in constructors for child in _children(constructor)))

    def argument(self, name: str) -> Any:
        """The default of the constructor's argument of that name, or the class attribute; None where neither is."""
        for each in self.lineage:
            for constructor in each.methods("__init__"):
                given = constructor.args
                defaults = dict(zip(reversed(given.args), reversed(given.defaults), strict=False))
                defaults |= {
                    arg: value for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value
                }
                for argument, value in defaults.items():
                    if argument.arg == name:
                        return _evaluated(value)
        return self.literal(name)

    def methods(self, name: str) -> Iterator[ast.FunctionDef]:
        """This class's own methods of that name."""
        return (item for item in self.node.body if isinstance(item, ast.FunctionDef) and item.name == name)

    def returned(self, name: str) -> str | None:
        """The attribute that the nearest method of that name returns, as in ``return self.model.embed``."""
        method = next((method for each in self.lineage for method in each.methods(name)), None)
        for node in ast.walk(method) if method is not None else ():
            if isinstance(node, ast.Return) and node.value is not None:
                text = ast.unparse(node.value)
                return text.removeprefix("self.") if re.fullmatch(r"self(\.\w+)+", text) else None
        return None

    def mentions_name(self, name: str) -> bool:
        """Whether the file of this class, or of one that it inherits from, has the word ``name``."""
        return any(re.search(rf"\b{name}\b", _text(each.path)) for each in self.lineage)

    def makers(self, attribute: str) -> set[str]:
        """What is called to make ``self.ATTRIBUTE`` in the files of this class and of those that it inherits from."""
        return {name for path in {each.path for each in self.lineage} for name in _file(path).makers(attribute)}

    def of(self, class_name: str) -> ModelClass | None:
        """Another class as this one's file knows it."""
        return _file(self.path).find(class_name)


def _text(path: Path) -> str:
    with accessed(path):
        data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r}, the code of a checkpoint, is not text in UTF-8: {error}.") from error


def _parsed(path: Path, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:  # a zero byte is a ValueError
        raise InputError(f"{str(path)!r}, the code of a checkpoint, is not valid Python: {error}.") from error


def find_class(path: Path, class_name: str) -> ModelClass | None:
    """The class of this name in the file, or imported there from other modeling files; None where there is none."""
    return _file(path).find(class_name)


def auto_class(auto_name: str, model_type: str) -> ModelClass | None:
    """What transformers' ``AutoModel...`` makes of a model type: the class's source."""
    root = library()
    if root is None:
        return None
    source = (root / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    declared = re.search(rf"^class {auto_name}\(.*?_model_mapping = (\w+)", source, re.MULTILINE | re.DOTALL)
    table = declared and re.search(rf"^{declared[1]}_NAMES = OrderedDict\((.*?)^\)", source, re.MULTILINE | re.DOTALL)
    entry = table and re.search(rf'\("{re.escape(model_type)}", "(\w+)"\)', table[1])
    path = library_file(entry[1], model_type) if entry else None
    return None if path is None or not entry else find_class(path, entry[1])


def _targets(statement: ast.stmt) -> list[str]:
    """The names that a statement gives a value to."""
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    is_one = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    return [statement.target.id] if is_one else []  # type: ignore[attr-defined]


def _evaluated(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED


def _children(constructor: ast.FunctionDef) -> Iterator[Child]:
    local: dict[str, list[ast.expr]] = {}
    for node in ast.walk(constructor):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            local.setdefault(node.targets[0].id, []).append(node.value)
    for node in ast.walk(constructor):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            values = local.get(node.value.id, []) if isinstance(node.value, ast.Name) else [node.value]
            for call in (value for value in values if isinstance(value, ast.Call)):
                called = ast.unparse(call.func).removesuffix(".from_config").removesuffix("._from_config")
                given = [*call.args, *(item.value for item in call.keywords if item.arg == "config")]
                keys = _config_keys(given[0], local) if given else ()
                yield Child(node.targets[0].attr, called.rpartition(".")[2], keys)


def _config_keys(node: ast.expr, local: Mapping[str, list[ast.expr]], depth: int = 0) -> tuple[str, ...] | None:
    """``config.text_config`` -> ("text_config",), through local variables and copies."""
    if isinstance(node, ast.Attribute):
        if node.attr == "config":
            return ()
        inner = _config_keys(node.value, local, depth)
        return None if inner is None else (*inner, node.attr)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "deepcopy":
        return _config_keys(node.args[0], local, depth)
    if isinstance(node, ast.Name):
        if node.id == "config":
            return ()
        if node.id in local and depth < 4:
            return _config_keys(local[node.id][0], local, depth + 1)
    return None
