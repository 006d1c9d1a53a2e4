"""What a phase is trained with: data, labels, network and batches, as a configuration and a seed give them."""

import functools

from composer.models import ComposerClassifier
from composer.utils import dist

from lth_diet import datasets, models, seeds, training
from lth_diet.config import Config
from lth_diet.label_noise import noisy_labels
from lth_diet.loader import EvaluationLoader, Loader


class Ingredients:
    """Those of one replicate, or of one network that scores.

    Args:
        config: The arm.
        owner: Of the random streams: a replicate's index, or "network_<k>".
    """

    def __init__(self, config: Config, owner: int | str):
        self.config = config
        self.owner = owner

    @functools.cached_property
    def data(self) -> datasets.Dataset:
        return datasets.load(self.config.dataset.name, self.config.dataset.root)

    @functools.cached_property
    def noisy(self) -> datasets.Dataset:
        """The data as pre-training and scoring see it: with label noise, if the arm has any."""
        classes = len(self.data.class_names)
        return self.data.with_labels(noisy_labels(self.config, self.data.train.labels, classes))

    def network(self) -> ComposerClassifier:
        """The network at its random initialisation."""
        depth, width = self.config.model.depth, self.config.model.width
        channels = self.data.train.images.shape[-1]
        return models.classifier(depth, len(self.data.class_names), width, channels, seed=self.stream("init"))

    def loader(self, data: datasets.Dataset) -> Loader:
        """Training batches of `data`, in this owner's order."""
        order, augmentation = self.stream("order"), self.stream("augmentation")
        return Loader(data, self.config.train.batch_size, order, augmentation, **_share())

    def evaluation(self, split: datasets.Split) -> EvaluationLoader:
        """All images of a split, in batches that keep the device busy."""
        return EvaluationLoader(self.data, split, 2000 if training.device() == "gpu" else 500, **_share())

    def stream(self, name: str) -> int:
        """The seed of one of the owner's streams."""
        return seeds.stream(self.config.seed, self.owner, name)


def _share() -> dict[str, str | int]:
    where = "cuda" if training.device() == "gpu" else "cpu"
    return {"device": where, "rank": dist.get_global_rank(), "ranks": dist.get_world_size()}
