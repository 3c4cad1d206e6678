"""Code in a process of its own, without network."""

from __future__ import annotations

import os
import subprocess
import sys


def words_printed_offline(code: str, *arguments: object) -> list[str]:
    """The words that ``code`` prints, with ``arguments`` from ``sys.argv[1]`` on; it must end well."""
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
