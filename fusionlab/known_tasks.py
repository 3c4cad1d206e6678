"""Tasks known by name: where they are on the hub, what their classes are called, how they are asked for."""

from __future__ import annotations

from fusionlab.tasks import Task

DEFAULT_TEMPLATES = ("a photo of a {}.",)

IMAGE_TASKS: dict[str, Task] = {}
