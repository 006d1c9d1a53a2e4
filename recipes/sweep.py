"""Every run of a sweep file, on this machine or on a Ray cluster; what is finished is not computed again.

python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml --plan gpus=4    what is left, and how long it takes
python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml                  on all GPUs of this machine
python recipes/sweep.py -f yamls/sweeps/digits.yaml prune.levels=2 cpus=2     key=value for all runs, or of the sweep
python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml --address auto   on a running cluster

Ctrl-C stops it; the same command goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from lth_diet.errors import UserError, print_error
from lth_diet.launch import command_line
from lth_diet.sweep.grid import Sweep
from lth_diet.sweep.plan import plan, shared_runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.recipe_parser(__doc__)
    parser.add_argument("--address", help="of a running Ray cluster, or auto; without it one is started here")
    try:
        arguments = parser.parse_intermixed_args(argv)
        sweep = Sweep(Path(arguments.file), arguments.overrides)
        if arguments.plan:
            print(plan(sweep, shared_runs(sweep, arguments.overrides)))
            return 0
        from lth_diet.sweep import scheduler  # imports Ray, which is not to be before the input is checked

        return scheduler.run_sweep(sweep, arguments.address, Path(__file__).parent)
    except (UserError, OSError) as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
