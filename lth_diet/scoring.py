"""Scores a data set: trains K networks and measures the EL2N score of every training example (paper, appendix A)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors
from torch import nn

from lth_diet.config.identity import scores_identity
from lth_diet.config.schema import Config
from lth_diet.data import catalog, seeds
from lth_diet.data.loader import EvaluationLoader
from lth_diet.errors import UserError
from lth_diet.files import LockedError, read_json, remove_partial_files
from lth_diet.runs.phase_directory import PhaseDirectory, versions
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact
from lth_diet.scores.artifact import Scores
from lth_diet.scores.el2n import el2n
from lth_diet.scores.pictures import save_scores_pictures
from lth_diet.scores.summary import ScoredExamples
from lth_diet.training import trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress

_LOCK_TIMEOUT = 10.0  # seconds that one round of waiting gives each network's holder


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
        self.folder = ScoresDirectory(config)
        self.progress = progress
        self.track = track
        self.order = order

    def run(self) -> None:
        """Return when the artifact is there, whoever made it."""
        timeout = 0.0
        while not (self.folder.done or all(network.done for network in self.folder.networks())):
            if any(self.train(number, timeout) for number in self.order):
                timeout = 0.0
            elif not timeout:
                timeout = _LOCK_TIMEOUT
                self.progress.log(f"{self.folder.store}: waiting for networks that other processes train")
            self.folder.store.refresh_index()
        with self.folder.store.lock(timeout=-1):
            if not self.folder.done:
                remove_partial_files(self.folder.path)
                for number in self.order:
                    self.tidy(number)
                self.combine()
            elif not self.shown:
                labels = Builder(self.config, "all").noisy_data.train.labels
                self.show(self.folder.load(labels), labels)
            self.folder.store.upload()
        self.track()  # also what an earlier launch could not send

    def train(self, number: int, timeout: float = 0.0) -> bool:
        """Train and evaluate a network; False if it is done already or in the hands of another process.

        Args:
            number: Of the network.
            timeout: As of `Place.held`.
        """
        store = self.folder.network_store(number)
        phase = PhaseDirectory(store.path, store.upload)
        if phase.done:
            return False
        try:
            with store.lock(timeout):
                if phase.done:
                    return False
                remove_partial_files(phase.path)
                builder = Builder(self.config, phase.name)
                model, data = builder.build_network(), builder.noisy_data
                settings = self.config.train
                schedule = trainer.Schedule(0, self.config.scores.steps, settings.lr, settings.milestones)
                self.progress.start_phase(phase.name, "scoring")
                loader, evaluation = builder.build_loader(data), builder.build_evaluation_loader(data.test)
                result = trainer.train(
                    model, loader, evaluation, schedule, [], phase, self.config, self.progress, self.track
                )
                errors = el2n(
                    probabilities(model.module, builder.build_evaluation_loader(data.train)), data.train.labels
                )
                phase.write("el2n.safetensors", save_tensors({"el2n": errors.astype(np.float32)}))
                phase.finish({"network": number, **result})
        except LockedError:
            return False
        self.progress.report_accuracy(phase.name, "scoring", result["test_accuracy_percent"])
        self.progress.set_state(phase.name, "done")
        self.track()
        return True

    def tidy(self, number: int) -> None:
        """Have a finished network here, without the checkpoint of a process that was killed as it finished."""
        store = self.folder.network_store(number)
        with store.lock(timeout=-1):
            PhaseDirectory(store.path).remove_stale_checkpoints()
            store.upload()

    def combine(self) -> None:
        """Make one artifact of the networks' scores."""
        builder = Builder(self.config, "all")
        networks = self.folder.networks()
        values = np.stack([load_file(network.verified("el2n.safetensors"))["el2n"] for network in networks])
        labels = builder.noisy_data.train.labels
        self.show(Scores(values, {}), labels)
        facts = catalog.info(self.config.dataset.name, self.config.dataset.root)
        artifact.save_scores(
            self.folder.path,
            values,
            labels,
            self.config.dataset.name,
            facts.fingerprint,
            label_noise=self.config.pretrain.label_noise,
            seed=self.config.seed,
            network_seeds=[seeds.derive_seed(self.config.seed, network.name, "init") for network in networks],
            model=self.config.model_name,
            networks=len(networks),
            steps=self.config.scores.steps,
            test_accuracy_percent=[network.result()["test_accuracy_percent"] for network in networks],
            identity=scores_identity(self.config),
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
        examples = ScoredExamples(Builder(self.config, "all").data, labels, found)
        with self.progress.warn_on_error("no pictures of the scores"):
            save_scores_pictures(self.folder.path / "examples", examples)


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
    before = [store.allow_tf32 for store in places]
    try:
        for store in places:
            store.allow_tf32 = False
        yield
    finally:
        for store, allowed in zip(places, before, strict=True):
            store.allow_tf32 = allowed
