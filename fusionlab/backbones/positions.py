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
    most = _positions(model)
    if most is not None and tokens > most:
        raise InputError(
            f"{what} has {tokens} tokens, and a {type(model).__name__} with {most} positions reads no more; lower "
            f"data.max_length or model.max_new_tokens, or give a model of more positions"
        )


def _positions(model: Any) -> int | None:
    """Rows of the table of positions that may be asked for; None where positions are computed."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tokens = model.get_input_embeddings()
    tables = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens]
    tables += [len(table) for name, table in model.named_buffers() if name.endswith("embed_positions")]
    return most if any(most <= rows <= most + 2 for rows in tables) else None  # some keep two rows for padding
