"""``python -m fusionlab sweep``: every subset of tasks by every rule, for every method and seed; resumable."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run the command; returns 0, or raises ``InputError`` for what the user can fix."""
    from fusionlab.commands.sweep.command import main as run

    return run(argv)
