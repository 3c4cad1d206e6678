"""Why fusion works or fails: how task vectors lie to one another, and the plane that two of them span."""

from fusionlab.diagnostics.files import Diagnostics, write_diagnostics
from fusionlab.diagnostics.geometry import cosines, gram_matrix, norm_shares, norms
from fusionlab.diagnostics.plane import Plane, grid_of, measure_plane

__all__ = [
    "Diagnostics",
    "Plane",
    "cosines",
    "gram_matrix",
    "grid_of",
    "measure_plane",
    "norm_shares",
    "norms",
    "write_diagnostics",
]
