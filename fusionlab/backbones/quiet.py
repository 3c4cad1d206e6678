"""Transformers without its notices, and what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)
"""What transformers raises for a model whose files are missing, cut short, or of other shapes than they say."""


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what transformers says of a checkpoint that it loads; what is missing is checked by the caller."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
