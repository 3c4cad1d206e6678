"""``python -m fusionlab fuse``: checkpoints and adapters on disk, of any size, into one model."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run the command; returns 0, or raises ``InputError`` for what the user can fix."""
    from fusionlab.commands.fuse.command import main as run

    return run(argv)
