"""One vocabulary for models with several: rows of embeddings by token, and the tokenizer that is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from fusionlab.commands.fuse.chat import TEMPLATE, template_of
from fusionlab.commands.fuse.opened import Opened
from fusionlab.errors import InputError, name_list
from fusionlab.files import is_there, path_of
from fusionlab.foreign import Schema, read_json
from fusionlab.rules.settings import stack_and_index
from fusionlab.tensors.hub import resolve
from fusionlab.tensors.rows import RowWeights, Run

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")  # fmt: skip
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_SHORTEST = 20  # characters of a template
_MARKS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Aligned:
    """Models with the rows of one vocabulary.

    Args:
        base: the base.
        inputs: by task.
        tokenizer: whose vocabulary it is; None where the base's own files are kept.
        note: what the user should know of it.
    """

    base: Opened
    inputs: Mapping[str, Opened]
    tokenizer: PreTrainedTokenizerFast | None
    note: str


def aligned(source: str, base: Opened, inputs: Mapping[str, Opened]) -> Aligned:
    """The models with a row for every token of one tokenizer, in its order.

    A model without a token takes the row of the base, where that has it, else the mean of the rows of those that have
    it, and zeros where none has: a token that only some know gives no task vector of noise. A base that is itself one
    of the models, as for an average, counts as one of them.

    Args:
        source: ``base``, ``union`` (the base's with the tokens that only others know at its end) or the path of a
            tokenizer.
        base: the base.
        inputs: full models by task.

    Raises:
        InputError: an adapter, no ``tokenizer.json``, tokens without a row, ids with gaps, other special tokens than
            the base's, or an embedding that only some of the models have.
    """
    models = {"the base": base} | {repr(task): opened for task, opened in inputs.items()}
    for what, opened in models.items():
        if opened.adapter is not None or opened.is_masked:
            kind = "masks" if opened.is_masked else "an adapter"
            raise InputError(f"tokenizer: {what} is {kind}, which has no vocabulary of its own; leave tokenizer out.")
    own = {what: _tokenizer(what, opened.path) for what, opened in models.items()}
    wanted = own["the base"]
    if source == "union":
        wanted = _union(list(own.values()), base.path)
    elif source != "base":
        wanted = _tokenizer(f"tokenizer {source!r}", resolve(source, None))
    ids = _checked_ids(wanted, base)
    tokens = sorted(ids, key=ids.__getitem__)
    sizes = {what: _size(what, opened) for what, opened in models.items()}
    names = _vocabulary_names(models, sizes)
    rows = {
        what: {token: row for token, row in tokenizer.get_vocab().items() if row < sizes[what]}
        for what, tokenizer in own.items()
    }
    remade = {what: _remade(what, models, rows, names, tokens) for what in models}
    some = [token for token in tokens if not all(token in known for known in rows.values())]
    note = f"the vocabulary of {source}: {len(tokens)} tokens, of which not every model knows {len(some)}"
    found = {task: remade[repr(task)] for task in inputs}
    return Aligned(
        remade["the base"], found, None if source == "base" else wanted, note + (f": {name_list(some)}" if some else "")
    )


def _checked_ids(wanted: PreTrainedTokenizerFast, base: Opened) -> dict[str, int]:
    """The ids of the tokens, without gaps, of which the special ones are those of the base's configuration."""
    for key in _SPECIAL:
        ours, theirs = base.config.get(key), getattr(wanted, key, None)
        if isinstance(ours, int) and theirs is not None and theirs != ours:
            raise InputError(f"tokenizer: {key} is {ours} in the base's config.json and {theirs} there; not supported.")
    ids = wanted.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))):
        raise InputError(
            f"tokenizer: expected {len(ids)} tokens with ids from 0 without gaps, got up to {max(ids.values())}."
        )
    return ids


def _remade(
    what: str, models: Mapping[str, Opened], rows: Mapping[str, Mapping[str, int]], names: list[str], tokens: list[str]
) -> Opened:
    """One model with a row for every token."""
    opened = models[what]
    distinct = list({each.name: other for other, each in models.items()}.values())  # the base may be one of the models
    first = [what] if len(distinct) < len(models) else [what, "the base"]
    runs: list[Run] = []
    for token in tokens:
        having = [other for other in first if token in rows[other]][:1]
        having = having or [other for other in distinct if token in rows[other]]
        sources = tuple((models[other].weights, rows[other][token]) for other in having)
        if runs and len(sources) == len(runs[-1].sources) == 1 and runs[-1].is_continued_by(*sources[0]):
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(Run(1, sources))
    config = {**opened.config, "vocab_size": len(tokens)}
    return replace(opened, weights=RowWeights(opened.weights, names, runs), config=config, is_remade=True)


def _tokenizer(what: str, path: Path) -> PreTrainedTokenizerFast:
    folder = path if path.is_dir() else path.parent
    if not is_there(folder / "tokenizer.json"):
        raise InputError(f"tokenizer: {what} in {str(folder)!r} has no tokenizer.json; save it with a fast tokenizer.")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"tokenizer: {what} in {str(folder)!r} cannot be read: {' '.join(str(error).split())}"
        ) from error


def _union(tokenizers: list[PreTrainedTokenizerFast], path: Path) -> PreTrainedTokenizerFast:
    """The first one with the tokens of the others at its end, by tokenizer and id, added ones last."""
    wanted = _tokenizer("the base", path)
    for added in (False, True):
        for tokenizer in tokenizers[1:]:
            special = {each.content: each for each in tokenizer.added_tokens_decoder.values()}
            ids = tokenizer.get_vocab()
            for token in sorted(ids, key=ids.__getitem__):
                if (token in special) == added and token not in wanted.get_vocab():
                    wanted.add_tokens(special.get(token, token))
    return wanted


def _size(what: str, opened: Opened) -> int:
    size = opened.config.get("vocab_size")
    if not isinstance(size, int):
        raise InputError(f"tokenizer: config.json of {what} has no vocab_size, so that its rows are not known.")
    return size


def _vocabulary_names(models: Mapping[str, Opened], sizes: Mapping[str, int]) -> list[str]:
    """Matrices outside of the blocks with a row a token."""
    found = {
        what: [
            name
            for name, info in opened.weights.tensors.items()
            if len(info.shape) == 2 and info.shape[0] == sizes[what] and stack_and_index(name) is None
        ]
        for what, opened in models.items()
    }
    every = sorted({name for names in found.values() for name in names})
    for name in every:
        lacking = [what for what, names in found.items() if name not in names]
        if lacking:
            raise InputError(f"tokenizer: {name} has no row a token in {name_list(lacking)}, and has in others.")
    if not every:
        raise InputError("tokenizer: no tensor has a row a token.")
    return every


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast | None, template: str | None) -> None:
    """Put a tokenizer and a chat template in the place of what came from the base."""
    if tokenizer is not None:
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / TEMPLATE).write_text(template)
        settings = folder / "tokenizer_config.json"
        if settings.is_file():
            content = read_json(settings, Schema)
            content.pop("chat_template", None)
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def chat_template(given: str, models: Mapping[str, Opened]) -> str:
    """The template that ``given`` stands for: its text, a file, or ``auto``, the one that most of the models have.

    Raises:
        InputError: neither, no model has one, or it is no Jinja.
    """
    if given == "auto":
        found = Counter(text for opened in models.values() if (text := template_of(opened.path)) is not None)
        if not found:
            raise InputError("chat_template: auto, but none of the models has one; give a template or a file.")
        return found.most_common(1)[0][0]
    if "{" in given and len(given) >= _SHORTEST:
        return _checked(given)
    path = path_of(given)
    if not path.is_file():
        raise InputError(f"chat_template: expected auto, a Jinja template or the file of one, got {given!r}.")
    return _checked(path.read_text())


def _checked(template: str) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:  # as transformers, whose own tag marks answers
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", template))
    except TemplateSyntaxError as error:
        raise InputError(f"chat_template: it is no Jinja template: line {error.lineno}: {error.message}") from error
    return template
