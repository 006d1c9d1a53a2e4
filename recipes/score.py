"""EL2N scores of a configuration's training examples, with its label noise; written to runs/scores/.

composer -n 4 recipes/score.py -f yamls/cifar10_easy.yaml               networks are distributed over the ranks
python recipes/score.py -f yamls/cifar10_easy.yaml scores.networks=3    networks one after another, in one process
python recipes/score.py -f yamls/cifar10_easy.yaml --plan               print what exists and what would run, and exit

Rerun the same command to resume. A launch has one file. recipes/imp.py computes missing scores itself.
"""

from collections.abc import Sequence

from lth_diet.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    from lth_diet.launch import command_line  # slow: here an interrupt is handled

    return command_line.launch_scoring(argv, __doc__)


if __name__ == "__main__":
    run_program(main)
