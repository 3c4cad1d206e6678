"""Callbacks: fusion at the end of epochs and of the run, the run folder, checkpoints, signals, progress."""

from fusionlab.callbacks.dry_run import DryRun, DryRunEnds, NothingToTrain, around
from fusionlab.callbacks.fusion import FusionCallback
from fusionlab.callbacks.harness import HarnessScores
from fusionlab.callbacks.last_checkpoint import LastCheckpoint, WholeCheckpointIO
from fusionlab.callbacks.predictions import PredictionWriter
from fusionlab.callbacks.progress import FusionProgressBar
from fusionlab.callbacks.run_folder import RunFolderCallback, TrainOnly
from fusionlab.callbacks.stopping import StopOnSignal

__all__ = [
    "DryRun",
    "DryRunEnds",
    "FusionCallback",
    "FusionProgressBar",
    "HarnessScores",
    "LastCheckpoint",
    "NothingToTrain",
    "PredictionWriter",
    "RunFolderCallback",
    "StopOnSignal",
    "TrainOnly",
    "WholeCheckpointIO",
    "around",
]
