"""Tensors in files and in memory: what a parameter is, lazy readers, and writers of exported weights."""

from fusionlab.tensors.readers import Checkpoint, open_checkpoint
from fusionlab.tensors.writers import WeightsWriter, save_state

__all__ = ["Checkpoint", "WeightsWriter", "open_checkpoint", "save_state"]
