"""Instruction data: rows as what is said, what is said as tokens, tokens as batches."""

from fusionlab.data.chat.encoding import Encoded, Encoder
from fusionlab.data.chat.tasks import ChatTask, ChatTasks

__all__ = ["ChatTask", "ChatTasks", "Encoded", "Encoder"]
