"""Instruction data: rows as what is said, what is said as tokens, tokens as batches."""

from fusionlab.data.chat.encoding import Encoded, Encoder
from fusionlab.data.chat.kinds import ChatTask
from fusionlab.data.chat.tasks import ChatTasks

__all__ = ["ChatTask", "ChatTasks", "Encoded", "Encoder"]
