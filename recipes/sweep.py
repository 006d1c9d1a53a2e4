"""All runs of a sweep file, on this machine or a Ray cluster; finished runs are skipped.

python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml --plan gpus=4    print what is left and how long it takes
python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml                  run on all GPUs of this machine
python recipes/sweep.py -f yamls/sweeps/digits.yaml prune.levels=2 cpus=2     override keys of all runs or of the sweep
python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml --address auto   run on a running cluster

Press Ctrl-C to stop. Rerun the same command to resume.
"""

from collections.abc import Sequence
from pathlib import Path

from lth_diet.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    from lth_diet.errors import UserError, print_error, print_warnings  # slow: here an interrupt is handled
    from lth_diet.launch import checks, command_line
    from lth_diet.sweep.grid import Sweep
    from lth_diet.sweep.plan import plan, shared_runs

    parser = command_line.recipe_parser(__doc__)
    parser.add_argument("--address", help="address of a running Ray cluster, or auto; default: start a local one")
    try:
        arguments = parser.parse_intermixed_args(argv)
        sweep = Sweep(arguments.file, arguments.overrides)
        print_warnings(sweep.warnings(checks.available_cpus() if arguments.address is None else None))
        if arguments.plan:
            print(plan(sweep, shared_runs(sweep, arguments.overrides)))
            return 0
        from lth_diet.sweep import scheduler  # slow (Ray): imported after the input is validated

        return scheduler.run_sweep(sweep, arguments.address, Path(__file__).parent)
    except (UserError, OSError) as error:
        return print_error(error)


if __name__ == "__main__":
    run_program(main)
