"""The flags of ``fit``, ``validate``, ``test`` and ``predict`` beside Lightning's own."""

from __future__ import annotations

from types import NoneType
from typing import get_args

from lightning.pytorch.cli import LightningArgumentParser

from fusionlab.commands.parser import add_switches


def add_flags(parser: LightningArgumentParser) -> None:
    """Add them to the parser of a command."""
    add_switches(
        parser,
        {
            "overwrite": "start anew in a run folder that is in use (fit)",
            "train_only": "train and write the adapters only; a later fit over all tasks there fuses and scores (fit)",
            "dry_run": "check everything by the code of the run, tell what it would do and take, and stop (fit)",
        },
    )
    parser.add_argument(
        "--checkpoint_every_n_steps", type=int, default=100, help="updates between two saves of last.ckpt (fit)"
    )
    parser.add_argument(
        "--start_timeout", type=float, default=300, help="seconds to wait at the start for all processes"
    )
    parser.add_argument(
        "--output", type=str, default=None, help="file for the predictions (predict) or the rows (validate, test)"
    )
    parser.add_argument(
        "--harness",
        type=list[str | dict] | None,
        default=None,
        help="tasks of lm-eval to score language models on by its own code, without a chat template: names it "
        "knows, YAML files, or mappings (fit, test)",
    )
    parser.add_argument("--harness_limit", type=int | None, default=None, help="documents of each such task")
    parser.add_argument(
        "--harness_num_fewshot",
        type=int | None,
        default=None,
        help="examples before a question, for all such tasks but those that say 0 themselves",
    )


def take_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Let a number that may be whole or a share be whole where it is written so: 1 batch is not 1.0, all of them.

    ``typing`` gives all unions of the same types the order of the first that any library made, so that what
    Lightning's own means depends on what else is installed; ``int | float`` keeps its order.
    """
    for action in parser._actions:
        if set(get_args(getattr(action, "_typehint", None))) == {int, float, NoneType}:
            action._typehint = int | float | None
