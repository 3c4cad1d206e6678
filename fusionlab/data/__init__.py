"""Data modules: one loader over all tasks in training, exact batches of each task in evaluation."""

from fusionlab.data.chat import ChatTasks
from fusionlab.data.images import ImageTasks
from fusionlab.data.text import TextTasks

__all__ = ["ChatTasks", "ImageTasks", "TextTasks"]
