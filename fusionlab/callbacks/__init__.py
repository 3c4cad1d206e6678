"""Callbacks: fusion at the end of epochs and of the run, and the progress display."""

from fusionlab.callbacks.fusion import FusionCallback
from fusionlab.callbacks.progress import FusionProgressBar
from fusionlab.callbacks.run_folder import RunFolderCallback

__all__ = ["FusionCallback", "FusionProgressBar", "RunFolderCallback"]
