"""A recipe: what to fuse, how, and where to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fusionlab.commands import parser
from fusionlab.commands.fuse.parts import check_parts
from fusionlab.commands.written import as_written
from fusionlab.errors import InputError
from fusionlab.files import path_of
from fusionlab.memory import parse_size

WITHOUT = {
    "save": "auto",
    "input_dtype": None,
    "tokenizer": None,
    "chat_template": None,
    "rank": None,
}
"""Fields of a recipe that only whole models or adapters can follow, by what leaves them out."""


@dataclass(frozen=True)
class Recipe:
    """Fuse checkpoints or adapters on disk, of any size, into one model.

    Args:
        base: embedded name, path or hub id of the model that fusion adds to; or a list of {model: PATH, layers: [FIRST,
            END]}, whose blocks are stacked in this order and numbered anew.
        finetuned: path or hub id by task: full checkpoints or PEFT adapters, mixed freely; or such lists.
        output: the folder to write; it appears whole or not at all.
        rule: a rule's name, or {class_path: ..., init_args: {...}}; --rule.ARGUMENT VALUE sets one of its arguments.
        model: for rules that look at data: the module that runs the models, by name or {class_path: ..., init_args:
            {...}}, on the recipe's base; --model.ARGUMENT VALUE sets one of its arguments.
        data: for rules that look at data: the data module, in the same way; its tasks are those of ``finetuned``.
            task_arithmetic without a coefficient is chosen on its validation splits too.
        dtype: dtype of the floating-point output, such as bfloat16; the base's own per tensor by default.
        input_dtype: round the inputs to this dtype before anything is computed, as mergekit's dtype does.
        mismatched_tensors: for tensors that differ in name, shape or integer values: error, or take the base's.
        tokenizer: whose vocabulary full models of several get, by token: base, union or a path; by default all must
            have the base's.
        chat_template: of the output: auto (that of most of the models), a Jinja template or its file; the base's by
            default.
        save: weights, adapter (linear rules on adapters only), or auto: an adapter where that is possible exactly.
        rank: of every module of a fused adapter: larger ones are cut by singular values (the error is printed), smaller
            ones padded with zeros.
        memory_budget: bytes beyond the libraries, such as 1GB.
        threads: worker threads; as many as there are cores by default.
        max_shard_size: bytes in one weight file, such as 5GB.
        variant: read the weights of this variant, such as fp16 for model.fp16.safetensors, of base and full models.
        cosines: also measure the cosine similarity of every pair of task vectors.
        hash: know the inputs by a hash over all of their content, read first, in fusion.json and for norms kept
            beside them; by default by size, times, header and the ends of every tensor.
        allow_other_base: fuse adapters that were made for another base all the same; fusion.json says so.
        dry_run: check everything from the headers, print the plan and stop.
    """

    base: str | list[dict[str, Any]]
    finetuned: dict[str, str | list[dict[str, Any]]]
    output: str
    rule: str | dict[str, Any] = "metagpt"
    model: str | dict[str, Any] | None = None
    data: str | dict[str, Any] | None = None
    dtype: str | None = None
    input_dtype: str | None = None
    mismatched_tensors: Literal["error", "base"] = "error"
    tokenizer: str | None = None
    chat_template: str | None = None
    save: Literal["auto", "weights", "adapter"] = "auto"
    rank: int | None = None
    memory_budget: int | str = "1GB"
    threads: int | None = None
    max_shard_size: int | str = "5GB"
    variant: str | None = None
    cosines: bool = True
    hash: bool = False
    allow_other_base: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        as_written(self)
        if not self.finetuned:
            raise InputError("finetuned: expected a path by task, got none.")
        for task, path in self.finetuned.items():
            if not task or not isinstance(path, (str, list)):
                raise InputError(f"finetuned: expected a path by task, got {task!r}: {path!r}.")
        for what, parts in (
            {"base": self.base} | {f"finetuned.{task}": of for task, of in self.finetuned.items()}
        ).items():
            if not isinstance(parts, str):
                check_parts(what, parts)
                if self.model is not None:
                    raise InputError(f"{what}: a rule that looks at data needs whole models, got ranges of blocks.")
        for what in ("rank", "threads"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise InputError(f"{what}: expected a whole number from 1, got {value}.")
        if self.variant is not None and not re.fullmatch(r"[\w-]+", self.variant):
            raise InputError(f"variant: expected a word such as fp16, got {self.variant!r}.")
        for what in ("memory_budget", "max_shard_size"):
            parse_size(getattr(self, what), what)


def read_recipe(path: str) -> dict[str, Any]:
    """The recipe in a YAML file, by key; a mergekit configuration is translated.

    Raises:
        InputError: no such file, no YAML mapping, or a key that is not known.
    """
    content = parser.read_file(path)
    if "merge_method" in content:
        from fusionlab.commands.fuse.mergekit import translate

        content = translate(content, path_of(path))
    return parser.read_recipe(Recipe, path, content)


def check_left_out(recipe: Recipe, fields: Mapping[str, Any], why: str) -> None:
    """Raise if a recipe gives a field that what is written cannot follow.

    Args:
        recipe: what is asked for.
        fields: by name what leaves them out.
        why: they cannot be followed.

    Raises:
        InputError: naming the field.
    """
    for field, without in fields.items():
        if getattr(recipe, field) != without:
            raise InputError(f"{field}: {why}; leave {field} out here.")
