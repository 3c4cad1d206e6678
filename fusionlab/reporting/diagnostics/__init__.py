"""Why fusion works or fails: how task vectors lie to one another, as numbers and pictures in the run folder."""

from fusionlab.reporting.diagnostics.files import Diagnostics, write_diagnostics
from fusionlab.reporting.diagnostics.geometry import cosines, gram_matrix, norm_shares, norms

__all__ = ["Diagnostics", "cosines", "gram_matrix", "norm_shares", "norms", "write_diagnostics"]
