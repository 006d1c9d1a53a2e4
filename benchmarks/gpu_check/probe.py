"""Runs recipes/imp.py in this process and records what its trainings did with the device.

probe.py HOOKS -f digits.yaml key=value ...       HOOKS is JSON:

record    path without suffix; each rank writes <record>_<rank>.json at its end
kill      [phase, step]: kill this process with SIGKILL at a step of a phase such as level_1 or network_0
fault     [phase, step]: break the GPU's context of this process there
sync      "error": a step that waits for the device fails; "warn": the place is recorded. On the CPU, reads of single
          numbers from tensors are recorded. The first steps may wait, and so may rows of the training curve.
report    whether to write the report at the end, which needs more packages
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lth_diet.launch import command_line
from lth_diet.program import run_program
from recipes import imp


def main() -> int:
    options, *arguments = sys.argv[1:]
    options = json.loads(options)
    path = f"{options['record']}_{os.environ.get('RANK', 0)}.json"  # ranks that train alone change the variable later
    active: list[Any] = []

    def with_hooks(work: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        from hooks import Hooks  # imports Composer, after the recipe has set the variables of the launcher

        if not active:
            active.append(Hooks(options))
            active[0].patch()
        try:
            return work(*args, **kwargs)
        finally:
            with contextlib.suppress(RuntimeError):  # after a fault of the GPU
                Path(path).write_text(json.dumps(active[0].record()))

    for name in ("compute_scores", "train_replicates"):
        setattr(command_line, name, functools.partial(with_hooks, getattr(command_line, name)))
    return (
        imp.main(arguments)
        if options.get("report")
        else command_line.launch_imp(arguments, "", lambda runs, command, ranks: None)
    )


if __name__ == "__main__":
    run_program(main)
