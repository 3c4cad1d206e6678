"""What ``validate`` and ``test`` write and draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from fusionlab.contracts import Module
from fusionlab.errors import InputError
from fusionlab.files import check_file, named, path_of
from fusionlab.layout import CONFIG, OF_A_RUN, RESULTS, SCORED
from fusionlab.reporting import print_table, write_results


def check_output(output: str | None, arguments: Mapping[str, Any]) -> None:
    """Raise if a command's output cannot be written, or would take the place of what it reads or of a run's own file.

    Args:
        output: the file.
        arguments: of the data, some of which are files and folders.

    Raises:
        InputError: naming the file.
    """
    if output is None:
        return
    with named("output", "give a file that can be written"):
        path = check_file(output)
    if not path.exists():
        return
    if path.name in OF_A_RUN and (path.parent / CONFIG).exists():
        raise InputError(f"output {output!r} is {path.name} of the run in {str(path.parent)!r}; give another file")
    for name, value in arguments.items():
        given = Path(value).expanduser() if isinstance(value, str) else None
        if given is not None and given.exists() and given.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"output {output!r} is among what is read, data.{name} {value!r}; give another file")


def write_scores(command: str, config: Any, trainer: Trainer, module: Module) -> None:
    """Draw the rows that were scored, and write them: to ``output``, else into the run folder.

    Raises:
        InputError: the module kept none.
    """
    if not module.rows:
        name = type(module).__name__
        step = {"validate": "validation_step"}.get(command, "test_step")
        raise InputError(
            f"{command} scored nothing: {name}.rows is empty; expected the rows of fusionlab.evaluate there, which "
            f"{name}.{step} keeps (fusionlab.contracts.Module.rows)"
        )
    if config.verbose:
        print_table(module.rows, f"{module.backbone.name}: {config.model.init_args.get('weights') or 'pretrained'}")
    if trainer.fast_dev_run:
        print("fast_dev_run: nothing is written")
        return
    path = path_of(config.output) if config.output is not None else Path(config.trainer.default_root_dir) / RESULTS
    if path.exists() and config.output is None:  # the results of the run itself stay as they are
        path = path.with_name(SCORED[command])
    write_results(path, module.rows)
    print(f"rows: {path}")
