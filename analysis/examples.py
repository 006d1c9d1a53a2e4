"""Numbers and pictures of a scores artifact, and of the subset that an arm takes by it.

python -m analysis.examples runs/scores/<id> -o examples
python -m analysis.examples runs/scores/<id> --arm easy --size 3200 -o examples      and of this subset
python -m analysis.examples runs/scores/<id> --root data/mine -o examples            images that are not in data/

Writes histogram.png, easiest.png, hardest.png and summary.json, and for a subset subset.png, images.png and
subset.json; prints the numbers.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lth_diet import datasets, label_noise, scores, seeds, subsets
from lth_diet.config import Dataset
from lth_diet.errors import Parser, UserError, tell
from lth_diet.examples import Examples, record_scores, record_subset


def load(artifact: Path, root: str) -> Examples:
    """The examples that an artifact scores, with its labels.

    Args:
        artifact: Its folder.
        root: Folder of the data.

    Raises:
        UserError: If the artifact is damaged or the data are not those that it scores.
    """
    path = artifact / "scores.safetensors"
    about = scores.manifest_of(path)
    known = get_args(Dataset.model_fields["name"].annotation)
    if about["dataset"] not in known:
        raise UserError(f"{path}: data set {about['dataset']!r} is not known; allowed: {', '.join(known)}")
    scores.refuse_other_data(path, about["dataset"], datasets.facts(about["dataset"], root).fingerprint)
    data = datasets.load(about["dataset"], root)
    classes, stream = len(data.class_names), seeds.stream(about.get("seed") or 0, "all", "noise")
    labels = label_noise.randomise(data.train.labels, about.get("label_noise") or 0, classes, stream)
    return Examples(data, labels, scores.load(path, labels))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of scores.safetensors and manifest.json")
    parser.add_argument("--root", default="data", help="folder of the data, as dataset.root")
    parser.add_argument("--arm", choices=("easy", "hard"))
    parser.add_argument("--size", type=int, help="M of the subset")
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--class-balanced", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    try:
        arguments = parser.parse_args(argv)
        _check(arguments)
        examples = load(arguments.artifact, arguments.root)
        most = len(examples.labels)
        if arguments.arm and not 0 <= arguments.offset < most:
            raise UserError(f"command line: --offset {arguments.offset}; allowed: 0 to {most - 1}")
        if arguments.arm and not 0 < arguments.size <= most - arguments.offset:
            raise UserError(f"command line: --size {arguments.size}; allowed: 1 to {most - arguments.offset}")
        found = {"scores": record_scores(arguments.output, examples)}
        if arguments.arm:
            options = {"size": arguments.size, "class_balanced": arguments.class_balanced, "offset": arguments.offset}
            end = {"easy": subsets.easy, "hard": subsets.hard}[arguments.arm]
            choose = functools.partial(end, labels=examples.labels, **options)
            indices = choose(examples.scores.mean)
            found["subset"] = record_subset(arguments.output, examples, indices, choose)
    except UserError as error:
        return tell(error)
    except OSError as error:
        return tell(UserError(f"-o {arguments.output}: {error.strerror}; allowed: a folder to write to"))
    print(json.dumps(found, indent=2))
    print(f"pictures: {arguments.output.resolve()}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.arm is None) != (arguments.size is None):
        raise UserError("command line: --arm and --size make a subset together; allowed: both or neither")
    if arguments.arm is None and (arguments.offset or arguments.class_balanced):
        raise UserError("command line: --offset and --class-balanced are of a subset; allowed: with --arm and --size")


if __name__ == "__main__":
    sys.exit(main())
