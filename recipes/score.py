"""EL2N scores of a configuration's training examples, with its label noise: one artifact in runs/scores/.

composer -n 4 recipes/score.py -f yamls/cifar10_easy.yaml               networks are dealt to the ranks
python recipes/score.py -f yamls/cifar10_easy.yaml scores.networks=3    one after another, in this process
python recipes/score.py -f yamls/cifar10_easy.yaml --plan               what would run, and what exists already

The same command again goes on where the last one stopped. recipes/imp.py does this by itself when an arm needs it.
"""

import sys
from collections.abc import Sequence

from lth_diet.launch import command_line


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.launch_scoring(argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
