"""``python -m fusionlab``: help and dispatch without heavy imports, and the exit codes.

0 done; 2 bad input (one message on stderr); 1 a fault (traceback); 130 stopped by Ctrl-C; 141 nobody reads the output
any more, as after ``| head``.
"""

from __future__ import annotations

import os
import select
import signal
import sys

from fusionlab.errors import InputError, did_you_mean

COMMANDS = {
    "fit": "fine-tune one adapter per task, fuse them by every configured rule, score everything",
    "validate": "score a fused model or an adapter on the validation splits",
    "test": "score a fused model or an adapter on the test splits",
    "predict": "label the images of a folder, or answer the texts of a file",
    "fuse": "fuse checkpoints or adapters on disk, of any size, into one model",
    "sweep": "fuse every subset of tasks by every rule, for several methods and seeds; resumable",
    "push": "send a model's folder with its card to the hub",
    "report": "draw runs and sweeps as Markdown and one HTML page",
    "rules": "which rule for my models? a table of all rules and searches",
}
INTERRUPTED = "fusionlab: stopped by SIGINT; the same command begins again, a fit or a sweep where it was"
UNREAD = 141  # what a shell reports after the signal SIGPIPE
LIGHTNING = ("fit", "validate", "test", "predict")

HELP = """usage: python -m fusionlab COMMAND [options]

Fine-tune CLIP, ViT, T5 and language models on many tasks, fuse the task vectors into one model, evaluate it exactly.

commands:
{commands}

`python -m fusionlab COMMAND --help` lists a command's options.
`python -m fusionlab fit` alone runs the embedded default.
""".format(commands="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        try:
            return run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _is_unread():
            raise
        return UNREAD


def run(argv: list[str]) -> int:
    """Run one command; bad input is told in one line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"fusionlab {version('fusionlab')}")
        return 0
    try:
        return dispatch(argv[0], argv[1:])
    except InputError as error:
        print(f"fusionlab: {error}", file=sys.stderr)
        return 2


def _is_unread() -> bool:
    """Whether it is the standard output that nobody reads; what is left to be written to it is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def dispatch(command: str, rest: list[str]) -> int:
    """Run one command with its arguments; bad input is raised."""
    if command in LIGHTNING:
        from fusionlab.commands.fit import main as run_lightning

        return run_lightning([command, *rest])
    if command == "fuse":
        from fusionlab.commands.fuse import main as run_fuse

        return run_fuse(rest)
    if command == "sweep":
        from fusionlab.commands.sweep import main as run_sweep

        return run_sweep(rest)
    if command == "push":
        from fusionlab.commands.push import main as run_push

        return run_push(rest)
    if command == "report":
        from fusionlab.commands.report import main as run_report

        return run_report(rest)
    if command == "rules":
        from fusionlab.commands.rules import main as run_rules

        return run_rules(rest)
    raise InputError(f"no command {command!r}; {did_you_mean(command, COMMANDS)} See python -m fusionlab --help.")


if __name__ == "__main__":
    sys.exit(main())
