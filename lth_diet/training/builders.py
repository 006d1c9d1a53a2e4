"""What a phase is trained with: data, labels, network and batches, as a configuration and a seed give them."""

import functools

from composer.models import ComposerClassifier
from composer.utils import dist

from lth_diet.config.schema import Config
from lth_diet.data import catalog, dataset, seeds
from lth_diet.data.label_noise import noisy_labels
from lth_diet.data.loader import EvaluationLoader, Loader
from lth_diet.networks import classifier
from lth_diet.training import trainer


class Builder:
    """Those of one replicate, or of one network that scores.

    Args:
        config: The arm.
        scope: Of the random streams: a replicate's index, or "network_<k>".
    """

    def __init__(self, config: Config, scope: int | str):
        self.config = config
        self.scope = scope

    @functools.cached_property
    def data(self) -> dataset.Dataset:
        return catalog.load(self.config.dataset.name, self.config.dataset.root)

    @functools.cached_property
    def noisy_data(self) -> dataset.Dataset:
        """The data as pre-training and scoring see it: with label noise, if the arm has any."""
        classes = len(self.data.class_names)
        return self.data.with_labels(
            noisy_labels(self.data.train.labels, self.config.pretrain.label_noise, classes, self.config.seed)
        )

    def build_network(self) -> ComposerClassifier:
        """The network at its random initialisation."""
        depth, width = self.config.model.depth, self.config.model.width
        channels = self.data.train.images.shape[-1]
        return classifier.build_classifier(depth, len(self.data.class_names), width, channels, seed=self.seed("init"))

    def build_loader(self, data: dataset.Dataset) -> Loader:
        """Training batches of `data`, in this scope's order."""
        order, augmentation = self.seed("order"), self.seed("augmentation")
        return Loader(data, self.config.train.batch_size, order, augmentation, **_placement())

    def build_evaluation_loader(self, split: dataset.Split) -> EvaluationLoader:
        """All images of a split, in batches that keep the device busy."""
        return EvaluationLoader(self.data, split, 2000 if trainer.device() == "gpu" else 500, **_placement())

    def seed(self, purpose: str) -> int:
        """The seed of one of the scope's streams."""
        return seeds.derive_seed(self.config.seed, self.scope, purpose)


def _placement() -> dict[str, str | int]:
    where = "cuda" if trainer.device() == "gpu" else "cpu"
    return {"device": where, "rank": dist.get_global_rank(), "ranks": dist.get_world_size()}
