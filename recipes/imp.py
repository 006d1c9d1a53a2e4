"""Iterative magnitude pruning with weight rewinding, for all replicates of one arm or several.

composer -n 4 recipes/imp.py -f yamls/cifar100_random.yaml      one replicate per GPU or CPU process
python recipes/imp.py -f yamls/digits_all.yaml replicates=[0]   replicates one after another, in one process
python recipes/imp.py -f yamls/digits_all.yaml --plan           print what exists and what would run, and exit
composer -n 2 recipes/imp.py -f yamls/digits_init.yaml -f yamls/digits_all.yaml prune.levels=3
                                                                several arms; overrides apply to all of them

Rerun the same command to resume. At the end a report of each experiment is written to runs/.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lth_diet.program import run_program

if TYPE_CHECKING:
    from lth_diet.runs.run_directory import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    from lth_diet.launch import command_line  # slow: here an interrupt is handled

    return command_line.launch_imp(argv, __doc__, report)


def report(runs: "Sequence[RunDirectory]", command: str, ranks: int) -> None:
    sys.path.append(str(Path(__file__).parents[1]))  # of analysis, where only lth_diet is installed
    from analysis.report import write_run_reports  # slow (MLflow): imported after the input is validated

    write_run_reports(runs, command, ranks)


if __name__ == "__main__":
    run_program(main)
