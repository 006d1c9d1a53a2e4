"""Instability analysis: from which step of pre-training on is training stable to SGD noise?

composer -n 2 recipes/instability.py -f yamls/cifar10_all.yaml steps=[0,100,200,400]
                                                                error barriers of the copies from these steps
python recipes/instability.py -f yamls/digits_all.yaml -f yamls/digits_easy.yaml
                                                                several arms, each at its own rewind step
python recipes/instability.py -f yamls/digits_all.yaml steps=[0,40] level=4
                                                                with masks of finished runs that rewind to these steps
python recipes/instability.py -f yamls/digits_all.yaml steps=[0,40] --plan
                                                                print what exists and what would run, and exit

Keys: those of the arm, steps (1 to 20 steps, less than train.steps), copies (2 to 16, default 2) and level (default 0,
dense). Rerun the same command to resume, or with other steps to add them. The figure is runs/instability/barriers.png;
a report of the experiment that exists is updated.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lth_diet.program import run_program

if TYPE_CHECKING:
    from lth_diet.runs.instability_directory import InstabilityDirectory


def main(argv: Sequence[str] | None = None) -> int:
    from lth_diet.config.instability import load_instability  # slow: here an interrupt is handled
    from lth_diet.launch import command_line

    return command_line.launch_imp(argv, __doc__, draw, load_instability)


def draw(runs: "Sequence[InstabilityDirectory]", command: str, ranks: int) -> None:
    from lth_diet.launch.instability import barriers
    from lth_diet.tracking.figures import barrier_curves  # slow (matplotlib): imported after the input is validated

    labels = [run.arm_label for run in runs]
    names = [
        label if labels.count(label) == 1 else f"{label} ({run.path.name})"
        for label, run in zip(labels, runs, strict=True)
    ]
    curves = {name: measured for name, run in zip(names, runs, strict=True) if (measured := barriers(run))}
    if curves:
        level = runs[0].keys.level
        path = runs[0].path.parent / f"barriers{f'_level_{level}' * (level > 0)}.png"
        titles = dict.fromkeys(f"{run.config.dataset.name}, {run.config.model_name}" for run in runs)
        try:
            barrier_curves(curves, " and ".join(titles) + f", level {level}" * (level > 0)).savefig(path)
            print(f"figure: {path}", flush=True)
        except OSError as error:  # training has finished: the report and the other ranks still follow
            print(f"no figure: {path}: {error.strerror}", flush=True)
    sys.path.append(str(Path(__file__).parents[1]))  # of analysis, where only lth_diet is installed
    from analysis.report import update_run_reports  # slow (MLflow): imported after the input is validated

    update_run_reports(runs)


if __name__ == "__main__":
    run_program(main)
