"""Draws the scored training examples of a scores artifact, and the subset that an arm selects.

python -m analysis.examples runs/scores/<id> -o examples
python -m analysis.examples runs/scores/<id> --arm easy --size 3200 -o examples      also draws this subset
python -m analysis.examples runs/scores/<id> --root data/mine -o examples            reads images outside data/

Writes histogram.png, easiest.png, hardest.png and summary.json; for a subset also subset.png, images.png and
subset.json. Prints the contents of the JSON files.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lth_diet.config.schema import Dataset
from lth_diet.data import catalog, label_noise, subsets
from lth_diet.errors import Parser, UserError, print_error
from lth_diet.program import run_program
from lth_diet.scores.artifact import check_dataset, load_scores, read_manifest
from lth_diet.scores.pictures import save_scores_pictures, save_subset_pictures
from lth_diet.scores.summary import ScoredExamples


def load(artifact: Path, root: str, pixels: int | None = None) -> ScoredExamples:
    """Loads the training examples of a scores artifact, with the labels that were scored.

    Args:
        artifact: Folder of the artifact.
        root: Folder of the data, as dataset.root.
        pixels: Pixels per side of the images, as dataset.size; None keeps them as they are.

    Raises:
        UserError: If the artifact is damaged or was computed on other data.
    """
    path = artifact / "scores.safetensors"
    about = read_manifest(path)
    known = get_args(Dataset.model_fields["name"].annotation)
    if about["dataset"] not in known:
        raise UserError(f"{path}: data set {about['dataset']!r} is not known; expected one of {', '.join(known)}")
    check_dataset(path, about["dataset"], catalog.info(about["dataset"], root))
    data = catalog.load(about["dataset"], root, pixels)
    noise, seed = about.get("label_noise") or 0, about.get("seed") or 0
    labels = label_noise.noisy_labels(data.train.labels, noise, len(data.class_names), seed)
    return ScoredExamples(data, labels, load_scores(path, labels))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder with scores.safetensors and manifest.json")
    parser.add_argument("--root", default="data", help="folder of the data, as dataset.root")
    parser.add_argument("--pixels", type=int, help="pixels per side of the images, as dataset.size")
    parser.add_argument("--arm", choices=("easy", "hard"), help="arm whose subset is drawn")
    parser.add_argument("--size", type=int, help="size of the subset")
    parser.add_argument("--offset", type=int, default=0, help="examples to skip, as pretrain.subset.offset")
    parser.add_argument("--class-balanced", action="store_true", help="as pretrain.subset.class_balanced")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    try:
        arguments = parser.parse_args(argv)
        _check(arguments)
        examples = load(arguments.artifact, arguments.root, arguments.pixels)
        count = len(examples.labels)
        if arguments.arm and not 0 <= arguments.offset < count:
            raise UserError(f"command line: --offset = {arguments.offset}: must be between 0 and {count - 1}")
        if arguments.arm and not 0 < arguments.size <= count - arguments.offset:
            largest = count - arguments.offset
            raise UserError(f"command line: --size = {arguments.size}: must be between 1 and {largest}")
        found = {"scores": save_scores_pictures(arguments.output, examples)}
        if arguments.arm:
            options = {"size": arguments.size, "class_balanced": arguments.class_balanced, "offset": arguments.offset}
            rule = {"easy": subsets.easy, "hard": subsets.hard}[arguments.arm]
            choose = functools.partial(rule, labels=examples.labels, **options)
            indices = choose(examples.scores.mean)
            found["subset"] = save_subset_pictures(arguments.output, examples, indices, choose)
    except UserError as error:
        return print_error(error)
    except OSError as error:
        return print_error(UserError(f"-o {arguments.output}: {error.strerror}; expected a writable folder"))
    print(json.dumps(found, indent=2))
    print(f"pictures: {arguments.output.resolve()}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.pixels is not None and not 4 <= arguments.pixels <= 1024:
        raise UserError(f"command line: --pixels = {arguments.pixels}: must be between 4 and 1024")
    if (arguments.arm is None) != (arguments.size is None):
        raise UserError("command line: --arm and --size must be given together")
    if arguments.arm is None and (arguments.offset or arguments.class_balanced):
        raise UserError("command line: --offset and --class-balanced require --arm and --size")


if __name__ == "__main__":
    run_program(main)
