"""Iterative magnitude pruning with rewinding, for every replicate of one arm.

composer -n 4 recipes/imp.py -f yamls/cifar100_random.yaml      a replicate a GPU, or CPU process
python recipes/imp.py -f yamls/digits_all.yaml replicates=[0]   one after another, in this process
python recipes/imp.py -f yamls/digits_all.yaml --plan           what would run, and what exists already

The same command again goes on where the last one stopped. At the end a report of the experiment is in runs/.
"""

import sys
from collections.abc import Sequence

from lth_diet.launch import command_line
from lth_diet.runs.run_directory import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.launch_imp(argv, __doc__, report)


def report(run: RunDirectory) -> None:
    from analysis.report import conclude  # imports MLflow, which is not to be before the input is checked

    conclude(run)


if __name__ == "__main__":
    sys.exit(main())
