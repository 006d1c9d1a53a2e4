"""The run directory, which is the truth: where results lie and what is done.

runs/<dataset>_<arm>-<run id>/
    config.json                     what the run is
    replicate_<r>/
        pretrain/                   weights.safetensors: the rewind point, unmasked
                                    subset.safetensors, .json, .png, images.png: what a subset arm saw
        level_<L>/                  mask.safetensors: the mask that level L trains with (level 0: all true)
                                    weights.safetensors: parameters and buffers at the end of the level
        failed.json                 why the last attempt stopped
runs/scores/<scores id>/
    config.json                     what is scored, and how
    network_<k>/                    el2n.safetensors: its scores
    scores.safetensors              of all networks, and their mean
    examples/                       pictures and figures of the scores
    manifest.json                   written last, with the sha256 of the scores: the done marker

A phase (pretrain, level_<L>, network_<k>) holds what `phases` says.

python -m lth_diet.runs verify runs         check every file of every run below a folder against its checksum
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_diet import scores
from lth_diet.config import DEFAULTS, Config
from lth_diet.errors import Parser, UserError, tell
from lth_diet.phases import Phase, clear_parts, read_json, write_json
from lth_diet.remote import Place, place
from lth_diet.scores import Scores

_RUN = {
    **dict.fromkeys(("run_id", "dataset", "model", "arm", "experiment"), str),
    **dict.fromkeys(("rewind_steps", "seed", "train_steps", "planned_levels"), int),
    "identity": dict,
    "subset_size": int | None,
    "label_noise": float | int,
    "ranks": int | None,
}
_SCORES = {
    **dict.fromkeys(("scores_id", "dataset", "model", "experiment"), str),
    **dict.fromkeys(("seed", "networks", "steps"), int),
    "identity": dict,
    "label_noise": float | int,
}


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json tells of a run directory or a folder of scores.

    Raises:
        UserError: If it is damaged, or a value is missing or of a wrong type.
    """
    path = folder / "config.json"
    return read_json(path, _SCORES if "scores_id" in read_json(path) else _RUN)


class Replicate:
    """The directory of one replicate: one seed of one arm, all its levels.

    Args:
        place: Where it is; a path to look at it only.

    Raises:
        UserError: If its name has no number.
    """

    def __init__(self, place: Place | Path):
        self.place = place if isinstance(place, Place) else Place(place)
        self.path = self.place.path
        self.index = _number(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def pretrain(self) -> Phase:
        return Phase(self.path / "pretrain", self.place.push)

    def level(self, number: int) -> Phase:
        return Phase(self.path / f"level_{number}", self.place.push)

    def levels(self) -> Iterator[tuple[int, Phase]]:
        """The levels that have been begun, in order."""
        numbers = sorted(_number(path) for path in self.path.glob("level_*"))
        return ((number, self.level(number)) for number in numbers)

    @property
    def about(self) -> dict[str, Any]:
        """The run's config.json."""
        return read_config(self.path.parent)

    def phases(self) -> list[Phase]:
        """Pre-training and the levels that have been begun, in order: each is made of those before it."""
        return [self.pretrain, *(phase for _, phase in self.levels())]

    def finished(self, levels: int) -> bool:
        """Whether levels 0 to `levels` are done."""
        return all(self.level(number).done for number in range(levels + 1))

    def fail(self, reason: str) -> None:
        """Leave word of why this attempt stopped, if there is room for it: that may be why."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "failed.json", {"reason": reason})
            self.place.tell("failed.json")

    @property
    def failed(self) -> bool:
        """Whether the last attempt stopped before its end."""
        return (self.path / "failed.json").exists()

    @contextlib.contextmanager
    def held(self, patience: float = 10.0) -> Iterator[None]:
        """Keep other processes out, as `Place.held` does, and forget why the last attempt stopped."""
        with self.place.held(patience):
            clear_parts(self.path)
            for phase in self.phases():
                phase.forget_checkpoint()
            (self.path / "failed.json").unlink(missing_ok=True)
            self.place.push()
            yield


def _number(path: Path) -> int:
    """Of replicate_<r> or level_<L>."""
    if not re.fullmatch(r"[a-z]+_[0-9]{1,9}", path.name):
        raise UserError(f"{path}: not the directory of a replicate or level; allowed: a number after the _")
    return int(path.name.partition("_")[2])


def _whole(identity: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it; a field that did not exist when a run was made had its default."""
    return json.loads(json.dumps(DEFAULTS | identity))


class _Folder:
    """A folder whose config.json tells what made it; nothing is written until `create`.

    Args:
        place: May not exist yet.
        about: What config.json is to hold; its `identity` has to be that of the folder, if there is one.

    Raises:
        UserError: If the folder is there but another configuration made it.
    """

    def __init__(self, place: Place, about: dict[str, Any]):
        self.place = place
        self.path = place.path
        self._about = about
        place.refresh()
        there = self._there()
        if there is not None:
            self._check(there)

    def _there(self) -> dict[str, Any] | None:
        """The config.json that is there."""
        path = self.path / "config.json"
        # listed first: another rank may be creating the directory, and writes config.json before anything else
        names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if not path.exists():
            if not self.place.mirrored and any(not name.startswith(".") for name in names):
                raise UserError(f"{self.path}: not a run directory (it has no config.json); allowed: an empty place")
            return None
        try:
            return read_config(self.path)
        except UserError as error:
            raise UserError(f"{error}; move it away or choose other runs=...") from None

    def _check(self, about: dict[str, Any]) -> None:
        there, mine = _whole(about["identity"]), _whole(self._about["identity"])
        for key in sorted({*there, *mine}):
            if there.get(key) != mine.get(key):
                raise UserError(
                    f"{self.path} was made by another configuration: {key}: {there.get(key)!r} there, "
                    f"{mine.get(key)!r} here; move it away or choose other runs=..."
                )

    def create(self) -> None:
        """Make the folder and say in it what it is."""
        try:
            with self.place.held(patience=-1):
                there = self._there()
                if self._to_say(there) != there:
                    write_json(self.path / "config.json", self._to_say(there))
                    self.place.push()
        except OSError as error:
            raise UserError(
                f"runs: {self.config.runs!r} cannot be written ({error.strerror}); allowed: a folder that can"
            ) from None

    def _to_say(self, there: dict[str, Any] | None) -> dict[str, Any]:
        """What config.json is to hold, given what it holds."""
        return there or self._about


class Run(_Folder):
    """The directory of one arm: `runs/<dataset>_<arm>-<run id>`.

    Args:
        config: The arm.
        ranks: How many train a replicate together, with `parallelism: data`.

    Raises:
        UserError: If the directory is there but another configuration made it.
    """

    def __init__(self, config: Config, ranks: int = 1):
        self.config = config
        about = {
            "run_id": config.run_id(),
            "identity": config.identity(),
            "dataset": config.dataset.name,
            "model": config.model_name,
            "arm": config.arm,
            "subset_size": config.subset_size,
            "rewind_steps": config.rewind_steps,
            "label_noise": config.label_noise,
            "seed": config.seed,
            "train_steps": config.train.steps,
            "experiment": config.experiment_name,
            "ranks": ranks if config.parallelism == "data" else 1,
            "planned_levels": config.prune.levels,
        }
        super().__init__(place(config.runs) / config.run_name, about)

    def _check(self, about: dict[str, Any]) -> None:
        super()._check(about)
        there, mine = about.get("ranks", 1), self._about["ranks"]
        if there != mine:  # BatchNorm saw other batches
            raise UserError(
                f"{self.path} was made by {there} ranks with parallelism: data, and these are {mine}; "
                f"allowed: composer -n {there}, or other runs=..."
            )

    def _to_say(self, there: dict[str, Any] | None) -> dict[str, Any]:
        planned = there["planned_levels"] if there else 0
        return json.loads(json.dumps({**self._about, "planned_levels": max(planned, self.config.prune.levels)}))

    def replicate(self, index: int) -> Replicate:
        return Replicate(self.place / f"replicate_{index}")

    def replicates(self) -> list[Replicate]:
        """Those that the configuration asks for."""
        return [self.replicate(index) for index in self.config.replicates]


class ScoreFolder(_Folder):
    """The folder of a scores artifact, `runs/scores/<scores id>`, which arms with equal scoring settings share.

    Args:
        config: Of any arm; what is not a scoring setting is ignored.

    Raises:
        UserError: If the folder is there but another configuration made it.
    """

    def __init__(self, config: Config):
        self.config = config
        about = {
            "scores_id": config.scores_id(),
            "identity": config.scores_identity(),
            "dataset": config.dataset.name,
            "model": config.model_name,
            "label_noise": config.pretrain.label_noise,
            "seed": config.seed,
            "networks": config.scores.networks,
            "steps": config.scores.steps,
            "experiment": config.experiment_name,
        }
        super().__init__(place(config.runs) / "scores" / config.scores_id(), about)

    def place_of(self, number: int) -> Place:
        """Where a network is, which is held by itself."""
        return self.place / f"network_{number}"

    def network(self, number: int) -> Phase:
        return Phase(self.place_of(number).path)

    def networks(self) -> list[Phase]:
        """All K of them."""
        return [self.network(number) for number in range(self.config.scores.networks)]

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    def load(self, labels: np.ndarray) -> Scores:
        """The scores.

        Args:
            labels: Those that pre-training will see, shape (N,).

        Raises:
            UserError: If they are damaged, or not made as the configuration says.
        """
        self.place.fetch()
        remedy = f"delete {self.place / 'manifest.json'}, and the same command makes them again of their networks"
        try:
            found = scores.load(self.path / "scores.safetensors", labels)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        there = found.manifest.get("identity")
        if not isinstance(there, dict) or _whole(there) != _whole(self.config.scores_identity()):
            raise UserError(f"{self.path}: scores that another configuration made; {remedy}")
        return found


def scores_to_make(run: Run) -> ScoreFolder | None:
    """The scores of the arm, if no file was named; None too if pre-training is done and has no more need of them."""
    config = run.config
    if not config.needs_scores or config.scores.file is not None:
        return None
    folder = ScoreFolder(config)
    return folder if folder.done or not all(replicate.pretrain.done for replicate in run.replicates()) else None


def load_scores(config: Config, labels: np.ndarray) -> Scores:
    """The scores that an easy or hard arm chooses by; arguments and errors as of `ScoreFolder.load`."""
    if config.scores.file is None:
        return ScoreFolder(config).load(labels)
    try:
        return scores.load(Path(config.scores.file), labels)
    except UserError as error:
        raise UserError(f"scores.file: {error}") from None


def folders(runs: Path) -> tuple[list[Path], list[Path]]:
    """Run directories and folders of scores below a folder, or at it.

    Raises:
        UserError: If there is none.
    """
    if re.match(r"\w+:/", str(runs)):
        raise UserError(f"{runs}: not a folder; `python -m lth_diet.remote pull <URL> <folder>` makes one of a URL")
    configs = [*runs.glob("config.json"), *runs.glob("*/config.json"), *runs.glob("scores/*/config.json")]
    if not configs:
        raise UserError(f"{runs}: holds no run; allowed: a folder of run directories, or one of them")
    found = sorted(config.parent for config in configs)
    scored = [folder for folder in found if _says(folder, "scores_id")]
    return [folder for folder in found if folder not in scored], scored


def _says(folder: Path, key: str) -> bool:
    with contextlib.suppress(UserError):
        return key in read_json(folder / "config.json")
    return False


def _damaged(path: Path) -> bool:
    """Whether a JSON file is there and not what was written."""
    try:
        if path.exists():
            read_json(path)
    except UserError:
        return True
    return False


def verify(runs: Path) -> Iterator[tuple[Path, str]]:
    """Check what is finished below a folder.

    Yields:
        Each damaged or missing file, and what has to be done about it.
    """
    directories, scored = folders(runs)
    for folder in [*directories, *scored]:
        try:
            read_config(folder)
        except UserError:
            yield folder / "config.json", "run the same command with runs=<another folder>, or restore it"
    for folder in directories:
        for path in sorted(folder.glob("replicate_*")):
            if _damaged(path / "pretrain/subset.json"):
                yield path / "pretrain/subset.json", "python -m analysis.examples writes its like"
            phases = Replicate(path).phases()
            for number, phase in enumerate(phases):
                for file in phase.damaged() if phase.done else ():
                    later = ", ".join(str(following.path) for following in phases[number:])
                    yield file, f"delete {later}, and the same command computes them again"
    for folder in scored:
        for phase in (Phase(path) for path in sorted(folder.glob("network_*"))):
            for file in phase.damaged() if phase.done else ():
                yield (
                    file,
                    f"delete {phase.path} and {folder / 'manifest.json'}, and the same command computes it again",
                )
        if _damaged(folder / "examples/summary.json"):
            yield folder / "examples/summary.json", "the same command writes it again"
        if (folder / "manifest.json").exists():
            try:
                scores.manifest_of(folder / "scores.safetensors")
            except UserError:
                name = "manifest.json" if _damaged(folder / "manifest.json") else "scores.safetensors"
                yield folder / name, f"delete {folder / 'manifest.json'}, and the same command makes it of its networks"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m lth_diet.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("verify",))
    parser.add_argument("runs", type=Path, help="folder of run directories, or one of them")
    try:
        runs = parser.parse_args(argv).runs
        directories, scored = folders(runs)
        damage = list(verify(runs))
    except (UserError, OSError) as error:
        return tell(error)
    for file, remedy in damage:
        print(f"{file}: damaged or missing; {remedy}")
    counts = f"{len(directories)} runs and {len(scored)} sets of scores"
    print(f"{counts}: {len(damage)} files are damaged" if damage else f"{counts}: every finished file is whole")
    return 1 if damage else 0


if __name__ == "__main__":
    sys.exit(main())
