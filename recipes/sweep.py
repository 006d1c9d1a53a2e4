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

from lth_diet import launch
from lth_diet.errors import UserError, tell
from lth_diet.sweep import Sweep, in_common, plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = launch.parser(__doc__)
    parser.add_argument("--address", help="of a running Ray cluster, or auto; without it one is started here")
    try:
        arguments = parser.parse_intermixed_args(argv)
        sweep = Sweep(Path(arguments.file), arguments.overrides)
        if arguments.plan:
            print(plan(sweep, in_common(sweep, arguments.overrides)))
            return 0
        from lth_diet import cluster  # imports Ray, which is not to be before the input is checked

        return cluster.run(sweep, arguments.address, Path(__file__).parent)
    except (UserError, OSError) as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
