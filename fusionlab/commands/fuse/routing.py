"""Models whose MLPs are weighed anew for every sample, in ``fuse``: what is refused, and what is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionlab.commands.fuse.recipe import WITHOUT, Recipe, check_left_out

if TYPE_CHECKING:
    from fusionlab.contracts import Backbone
    from fusionlab.fusion.fused import FusedModel


@dataclass(frozen=True)
class Made:
    """A model that was made in memory, since it was run on data there.

    Args:
        model: with experts and routers.
        backbone: the base.
    """

    model: FusedModel
    backbone: Backbone


def write_made(made: Made, folder: Path) -> tuple[FusedModel, dict[str, Any]]:
    """Write the model into an existing folder; and what ``fusion.json`` tells of it."""
    from fusionlab.fusion.folders import write_routed

    return made.model, write_routed(folder, made.model, made.backbone)


def check_routed(recipe: Recipe) -> None:
    """Raise if the recipe asks for what experts over the base as it is cannot be.

    Raises:
        InputError: naming the field.
    """
    why = "wemoe writes experts and routers over the base as it is, not weights that others read"
    check_left_out(recipe, {**WITHOUT, "dtype": None}, why)
