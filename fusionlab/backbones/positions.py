"""What a language model can read: ids that it has embeddings for, positions that are looked up in a table."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fusionlab.errors import InputError


def check_positions(model: Any, tokens: int, what: str) -> None:
    """Raise where the table of positions is shorter than what is to be read.

    Args:
        model: of transformers'.
        tokens: to be read at once.
        what: has so many tokens, for the message.

    Raises:
        InputError: with both numbers.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and tokens > most and _are_looked_up(model, most):
        raise InputError(
            f"{what} has {tokens} tokens, and a {type(model).__name__} with {most} positions reads no more; lower "
            f"data.max_length or model.max_new_tokens, or give a model of more positions"
        )


def check_ids(model: Any, largest: int, what: str) -> None:
    """Raise where tokens have ids that the model has no row of embeddings for.

    Args:
        model: of transformers'.
        largest: the largest id.
        what: has it, for the message.

    Raises:
        InputError: with both numbers.
    """
    rows = len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise InputError(
            f"{what} has the token {largest}, and the model embeds {rows} tokens; read the data by the model's own "
            f"tokenizer (data.tokenizer)"
        )


def check_logits(model: Any, name: str) -> None:
    """Raise where a model gives the logits of all columns only, most of which nobody reads.

    Args:
        model: of transformers'.
        name: what the user called it.

    Raises:
        InputError: it does.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"the language model {name!r} is a {type(model).__name__}, whose forward has no logits_to_keep: it cannot "
            f"be asked for the logits of some tokens; give a decoder such as a Llama, Qwen, Gemma or GPT-2"
        )


def _are_looked_up(model: Any, most: int) -> bool:
    """Whether the model has a table of so many positions; others compute them."""
    tokens = model.get_input_embeddings()
    tables = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens]
    tables += [len(table) for name, table in model.named_buffers() if name.endswith("embed_positions")]
    return any(most <= rows <= most + 2 for rows in tables)  # some keep two rows for padding
