"""Transformers without its notices, and what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError)
"""What transformers raises for a model whose files are missing, cut short, or of other kinds or shapes than said."""

_CUT = ("deserializing header", "incomplete", "invalid load key", "failed finding central directory", "EOF")
_NO_WEIGHTS = ("no file named", "not contain any weights")


def reason_of(error: Exception) -> str:
    """Why a model could not be loaded, in one line, and what to do where that is plain."""
    told = " ".join(str(error).split())
    if any(each in told for each in _CUT):
        return f"{told}; a weight file is cut short or none: download the model again"
    if any(each in told for each in _NO_WEIGHTS):
        return f"{told.rstrip('.')}; give a folder with its weight files, or download the model again"
    return told


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
