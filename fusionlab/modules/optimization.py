"""What the optimizer is told: its bounds, and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math

from fusionlab.errors import InputError


def check_optimization(learning_rate: float, weight_decay: float, num_warmup_steps: int) -> None:
    """Raise for settings that no training can have.

    Raises:
        InputError: the rate is not positive, or another is negative.
    """
    if not learning_rate > 0:
        raise InputError(f"learning_rate must be positive, got {learning_rate}")
    for name, value in (("weight_decay", weight_decay), ("num_warmup_steps", num_warmup_steps)):
        if not value >= 0:
            raise InputError(f"{name} must be at least 0, got {value}")


def lr_multiplier(step: int, num_warmup_steps: int, num_steps: int, schedule: str) -> float:
    """Factor on the peak learning rate: linear warm-up, then constant or half a cosine down to zero.

    Args:
        step: updates done before this one.
        num_warmup_steps: updates until the peak is reached.
        num_steps: updates of the whole run; not positive means unknown (no end), which a cosine cannot follow.
        schedule: ``cosine`` or ``constant``.

    Example:
        >>> [round(lr_multiplier(step, 2, 6, "cosine"), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if schedule == "constant" or num_steps <= 0:
        return 1.0
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
