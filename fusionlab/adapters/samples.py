"""Which tokens of the rows that a network reads are a sample's own input, for what acts by the sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional as F


class SampleTokens:
    """A text backbone says here what it is about to read; what is found of the samples is kept while it reads on.

    So later tokens, such as those of an answer, act under what was found of the sample's own.
    """

    def __init__(self) -> None:
        self._masks: Mapping[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}
        """What is known of the samples, by whoever keeps it."""

    @contextmanager
    def reading(self, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the rows of one batch are read.

        Args:
            masks: bool ``(batch, tokens)``, True on the samples' own tokens, by the beginnings of the names of the
                parts that read them; columns behind a mask's last are none of the sample's own.
        """
        before = self._masks, self.found
        self._masks, self.found = masks, {}
        try:
            yield
        finally:
            self._masks, self.found = before

    def mask(self, name: str, num_columns: int) -> Tensor | None:
        """The mask of what the part ``name`` reads, ``(batch, num_columns)``; None where nothing was said of it."""
        for beginning, mask in self._masks.items():
            if name.startswith(beginning):
                return F.pad(mask.bool(), (0, num_columns - mask.shape[1]))
        return None
