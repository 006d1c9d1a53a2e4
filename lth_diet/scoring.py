"""Scores a data set: trains K networks and measures the EL2N score of every training example (paper, appendix A)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors
from torch import nn

from lth_diet import datasets, scores, seeds, training
from lth_diet.config import Config
from lth_diet.display import Progress
from lth_diet.errors import UserError
from lth_diet.examples import Examples, record_scores
from lth_diet.ingredients import Ingredients
from lth_diet.loader import EvaluationLoader
from lth_diet.phases import AnotherProcessError, Phase, clear_parts, read_json, versions
from lth_diet.runs import ScoreFolder
from lth_diet.scores import Scores, el2n

_PATIENCE = 10.0  # seconds that one round of waiting gives each network's holder


class Scoring:
    """One scores artifact. Any number of processes may make it together: each trains a network that no other holds.

    The network of a process that dies goes to another, which goes on from its last checkpoint.

    Args:
        config: Its scoring settings.
        progress: Told of what happens.
        track: Called whenever there is something new for MLflow in the folder.
        order: Numbers of the networks, those to begin with first.
    """

    def __init__(self, config: Config, progress: Progress, track: Callable[[], None], order: Sequence[int]):
        self.config = config
        self.folder = ScoreFolder(config)
        self.progress = progress
        self.track = track
        self.order = order

    def run(self) -> None:
        """Return when the artifact is there, whoever made it."""
        patience = 0.0
        while not (self.folder.done or all(network.done for network in self.folder.networks())):
            if any(self.train(number, patience) for number in self.order):
                patience = 0.0
            elif not patience:
                patience = _PATIENCE
                self.progress.say(f"{self.folder.place}: waiting for networks that other processes train")
            self.folder.place.refresh()
        with self.folder.place.held(patience=-1):
            if not self.folder.done:
                clear_parts(self.folder.path)
                for number in self.order:
                    self.tidy(number)
                self.combine()
            elif not self.shown:
                labels = Ingredients(self.config, "all").noisy.train.labels
                self.show(self.folder.load(labels), labels)
            self.folder.place.push()
        self.track()  # also what an earlier launch could not send

    def train(self, number: int, patience: float = 0.0) -> bool:
        """Train and evaluate a network; False if it is done already or in the hands of another process.

        Args:
            number: Of the network.
            patience: As of `Place.held`.
        """
        place = self.folder.place_of(number)
        phase = Phase(place.path, place.push)
        if phase.done:
            return False
        try:
            with place.held(patience):
                if phase.done:
                    return False
                clear_parts(phase.path)
                ingredients = Ingredients(self.config, phase.name)
                model, data = ingredients.network(), ingredients.noisy
                settings = self.config.train
                schedule = training.Schedule(0, self.config.scores.steps, settings.lr, settings.milestones)
                self.progress.begin(phase.name, "scoring")
                loader, evaluation = ingredients.loader(data), ingredients.evaluation(data.test)
                result = training.train(
                    model, loader, evaluation, schedule, [], phase, self.config, self.progress, self.track
                )
                errors = el2n(probabilities(model.module, ingredients.evaluation(data.train)), data.train.labels)
                phase.write("el2n.safetensors", save_tensors({"el2n": errors.astype(np.float32)}))
                phase.finish({"network": number, **result})
        except AnotherProcessError:
            return False
        self.progress.measured(phase.name, "scoring", result["test_accuracy_percent"])
        self.progress.end(phase.name, "done")
        self.track()
        return True

    def tidy(self, number: int) -> None:
        """Have a finished network here, without the checkpoint of a process that was killed as it finished."""
        place = self.folder.place_of(number)
        with place.held(patience=-1):
            Phase(place.path).forget_checkpoint()
            place.push()

    def combine(self) -> None:
        """Make one artifact of the networks' scores."""
        ingredients = Ingredients(self.config, "all")
        networks = self.folder.networks()
        values = np.stack([load_file(network.verified("el2n.safetensors"))["el2n"] for network in networks])
        labels = ingredients.noisy.train.labels
        self.show(Scores(values, {}), labels)
        facts = datasets.facts(self.config.dataset.name, self.config.dataset.root)
        scores.save(
            self.folder.path,
            values,
            labels,
            self.config.dataset.name,
            facts.fingerprint,
            label_noise=self.config.pretrain.label_noise,
            seed=self.config.seed,
            network_seeds=[seeds.stream(self.config.seed, network.name, "init") for network in networks],
            model=self.config.model_name,
            networks=len(networks),
            steps=self.config.scores.steps,
            test_accuracy_percent=[network.result()["test_accuracy_percent"] for network in networks],
            identity=self.config.scores_identity(),
            versions=versions(),
        )

    @property
    def shown(self) -> bool:
        """Whether the artifact has been drawn."""
        try:
            return bool(read_json(self.folder.path / "examples/summary.json"))
        except UserError:
            return False

    def show(self, found: Scores, labels: np.ndarray) -> None:
        """Draw the artifact; a picture that fails is a warning."""
        examples = Examples(Ingredients(self.config, "all").data, labels, found)
        with self.progress.warning("no pictures of the scores"):
            record_scores(self.folder.path / "examples", examples)


@torch.no_grad()
def probabilities(network: nn.Module, images: EvaluationLoader) -> np.ndarray:
    """Softmax outputs in evaluation mode and single precision (no bf16, no TF32), float64 (N, classes).

    Softmax in double precision keeps the easiest examples apart, whose probabilities are 1 in single precision.
    """
    network.eval()
    with _without_tf32():
        return torch.cat([network(batch).double().softmax(1).cpu() for batch, _ in images]).numpy()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Composer allows TF32 on GPUs, and leaves it so."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed
