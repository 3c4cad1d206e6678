"""How many tokens a language model can read at once where its positions are looked up in a table."""

from __future__ import annotations

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


def _are_looked_up(model: Any, most: int) -> bool:
    """Whether the model has a table of so many positions; others compute them."""
    tokens = model.get_input_embeddings()
    tables = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens]
    tables += [len(table) for name, table in model.named_buffers() if name.endswith("embed_positions")]
    return any(most <= rows <= most + 2 for rows in tables)  # some keep two rows for padding
