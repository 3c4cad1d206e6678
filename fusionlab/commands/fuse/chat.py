"""How models of a recipe are talked to: chat templates, and the tokens that end an answer, where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionlab.commands.fuse.opened import Opened
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.errors import name_list
from fusionlab.files import accessed, is_there
from fusionlab.foreign import Schema, read_json

TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", TEMPLATE)
_SETTINGS, _GENERATION, _CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclass(frozen=True)
class _Talk:
    """What a model's files say of how it is talked to.

    Args:
        has_tokenizer: whether there is one beside its weights.
        templates: chat templates by name.
        end_ids: the tokens that end a generated answer; None where nothing is said or generated.
        end_token: the token that ends texts.
    """

    has_tokenizer: bool
    templates: dict[str, str]
    end_ids: list[int] | None
    end_token: str | None


def chat_notes(recipe: Recipe, base: Opened, inputs: Mapping[str, Opened], *, as_adapter: bool) -> list[str]:
    """What the output, which has the base's files, does not have of how its inputs are talked to.

    Args:
        recipe: which may say the output's template and tokenizer.
        base: the base.
        inputs: by task.
        as_adapter: whether the output is an adapter, which has its base's.
    """
    own, found = _read(base), {task: _read(opened) for task, opened in inputs.items()}
    others = [repr(task) for task, each in found.items() if each.has_tokenizer and each.templates != own.templates]
    notes = []
    if others and recipe.chat_template is None:
        kept = "which is kept" if own.templates else "which has none, and neither has the output"
        more = ", and save: weights" if as_adapter else ""
        notes.append(
            f"the chat template of {name_list(others)} is not that of the base, {kept}; give chat_template: auto, a "
            f"template or the file of one{more}"
        )
    is_own = recipe.tokenizer in (None, "base", "union")
    for task, each in found.items():
        notes += _end_notes(task, each.end_ids, own.end_ids, f"eos_token_id into its {_GENERATION}")
        if is_own:
            put = f"eos_token into its {_SETTINGS}, or for whole models give tokenizer: PATH"
            notes += _end_notes(task, each.end_token, own.end_token, put)
    return notes


def template_of(path: Path) -> str | None:
    """The default chat template that lies beside weights; None where there is none."""
    folder = path if path.is_dir() else path.parent
    if is_there(folder / TEMPLATE):
        return _text(folder / TEMPLATE)
    value = _said(folder / _SETTINGS, "chat_template")
    if isinstance(value, list):
        value = next((each.get("template") for each in value if each.get("name") == "default"), None)
    return value.strip() if isinstance(value, str) and value.strip() else None


def _templates(folder: Path) -> dict[str, str]:
    """All chat templates of a folder by name."""
    value = _said(folder / _SETTINGS, "chat_template")
    listed = {str(each.get("name")): str(each.get("template")) for each in value} if isinstance(value, list) else {}
    files = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    found = listed | {file.stem: _text(file) for file in files}
    default = template_of(folder)
    return found if default is None else found | {"default": default}


def _end_notes(task: str, theirs: Any, own: Any, put: str) -> list[str]:
    """The same of what ends an answer, where an input says another one than the base."""
    if theirs is None or theirs == own:
        return []
    base = "which says none" if own is None else f"which end by {own}"
    return [
        f"answers of {task!r} end by {theirs}, unlike those of the base, {base}; the output is as the base: put {put}"
    ]


def _end_ids(folder: Path) -> list[int] | None:
    """The tokens that end a generated answer, as transformers takes them; None where nothing is said or generated."""
    names = _said(folder / _CONFIG, "architectures")
    generates = isinstance(names, list) and any(str(name).endswith(_GENERATING) for name in names)
    for name in (_GENERATION, _CONFIG) if generates else (_GENERATION,):
        value = _said(folder / name, "eos_token_id")
        if value is not None:
            return sorted(value) if isinstance(value, list) else [value]
    return None


def _end_token(folder: Path) -> str | None:
    value = _said(folder / _SETTINGS, "eos_token")
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _text(path: Path) -> str:
    with accessed(path):
        return path.read_text(errors="replace").strip()


def _said(path: Path, key: str) -> Any:
    return read_json(path, Schema).get(key) if is_there(path) else None


def _read(opened: Opened) -> _Talk:
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    has_tokenizer = any(is_there(folder / name) for name in _TOKENIZER)
    return _Talk(has_tokenizer, _templates(folder), _end_ids(folder), _end_token(folder))
