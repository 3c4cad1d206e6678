"""Tokenizers: reading one, and what tells one from another: a hash over all that decides tokens and texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fusionlab.backbones.quiet import UNREADABLE
from fusionlab.errors import InputError


class Frame(NamedTuple):
    """What a chat template writes around the content of an answer, as generated answers are read.

    Args:
        opening: what it writes between the header and the content, such as an empty block of thinking.
        end_text: the text that ends an answer where no special token does before it; empty where one does.
    """

    opening: str = ""
    end_text: str = ""

    def answer(self, text: str) -> str:
        """A generated text up to what ends it, which is looked for in its content.

        Example:
            >>> Frame("<think></think>", "###").answer("<think></think> yes ### and so on")
            '<think></think> yes '
        """
        content = self.content(text)
        end = content.find(self.end_text) if self.end_text else -1
        return text if end < 0 else text[: len(text) - len(content) + end]

    def content(self, text: str) -> str:
        """A text without what opens an answer, and without the white space before it.

        Example:
            >>> Frame("<think></think>").content("<think></think> 3.8")
            '3.8'
        """
        return text.lstrip().removeprefix(self.opening).lstrip()


def read_tokenizer(where: Mapping[str, Any], what: str) -> Any:
    """A tokenizer in transformers' format; code that comes with it is not run.

    Args:
        where: arguments of ``from_pretrained``.
        what: how the message calls its place.

    Raises:
        InputError: none there, or none that can be read.
    """
    from transformers import AutoTokenizer

    hint = f"{what} has no tokenizer that can be read; put its tokenizer.json beside it"
    try:
        tokenizer = AutoTokenizer.from_pretrained(**{**where, "trust_remote_code": False})
    except UNREADABLE as error:
        raise InputError(f"{hint} ({' '.join(str(error).split())})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise InputError(hint)
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over what decides a tokenizer's output: its rules, its added and special tokens, how it decodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added = {str(place): repr(token) for place, token in tokenizer.added_tokens_decoder.items()}
    said = {
        "class": type(tokenizer).__name__,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "added": added,
        "spaces": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        "rules": backend.to_str() if backend is not None else _slow_rules(tokenizer),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _slow_rules(tokenizer: Any) -> list[Any]:
    """The vocabulary and files of a tokenizer without a backend: equal words may be cut by other merges or scores."""
    named = [value for key, value in tokenizer.init_kwargs.items() if key in tokenizer.vocab_files_names]
    files = [Path(file) for file in named if file and Path(file).is_file()]
    return [tokenizer.get_vocab(), [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]]


def generating(max_new_tokens: int, tokenizer: Any) -> dict[str, Any]:
    """What decides generated answers beside the network: their length at most, and the tokenizer that reads them."""
    return {"max_new_tokens": max_new_tokens, "tokenizer": tokenizer_fingerprint(tokenizer)}
