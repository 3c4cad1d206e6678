"""Checkpoints on disk: lazy readers and atomic writers. The only room that writes exported weights."""

from fusionlab.checkpoints.readers import Checkpoint, open_checkpoint
from fusionlab.checkpoints.writers import WeightsWriter, save_state, write_folder

__all__ = ["Checkpoint", "WeightsWriter", "open_checkpoint", "save_state", "write_folder"]
