"""Builds the data, the network and the loaders of a phase from a configuration and a seed."""

import dataclasses
import functools
from typing import Any

from composer.models import ComposerClassifier
from composer.utils import dist

from lth_diet.config.schema import Config
from lth_diet.data import catalog, dataset, seeds
from lth_diet.data.label_noise import noisy_labels
from lth_diet.data.loader import EvaluationLoader, Loader
from lth_diet.networks import classifier
from lth_diet.training import devices

EVALUATION_PIXELS = 2000 * 32 * 32
"""Pixels per rank and evaluation batch: a layer of 16 channels in fp32 has 125 MiB of outputs."""


class Builder:
    """Builds data, network and loaders for one replicate or one scoring network.

    Args:
        config: Configuration of the arm.
        scope: Scope of the seeds: a replicate's index, "network_<k>", or "all" for data alone. See
            `lth_diet.data.seeds`.
    """

    def __init__(self, config: Config, scope: int | str):
        self.config = config
        self.scope = scope

    @functools.cached_property
    def data(self) -> dataset.Dataset:
        """The data set with its true labels."""
        return catalog.load(self.config.dataset.name, self.config.dataset.root, self.config.dataset.size)

    @functools.cached_property
    def noisy_data(self) -> dataset.Dataset:
        """The data set with the labels of pre-training and scoring, which have the configured label noise."""
        images, labels = self.data.train.images, self.data.train.labels
        noisy = noisy_labels(labels, self.config.pretrain.label_noise, len(self.data.class_names), self.config.seed)
        return dataclasses.replace(self.data, train=dataset.Split(images, noisy))

    def build_network(self) -> ComposerClassifier:
        """A randomly initialized network."""
        depth, width = self.config.model.depth, self.config.model.width
        channels = self.data.train.images.shape[-1]
        return classifier.build_classifier(depth, len(self.data.class_names), width, channels, seed=self.seed("init"))

    def build_loader(self, data: dataset.Dataset) -> Loader:
        """Training batches of `data`, in the order and with the augmentation of this scope."""
        order, augmentation = self.seed("order"), self.seed("augmentation")
        flip = self.config.dataset.flip
        return Loader(data, self.config.train.batch_size, order, augmentation, flip=flip, **_device_and_rank())

    def build_evaluation_loader(self, split: dataset.Split) -> EvaluationLoader:
        """All images of a split, without augmentation, in batches of 2000 on a GPU, 500 on a CPU, or fewer if large."""
        height, width = split.images.shape[1:3]
        fitting = max(EVALUATION_PIXELS // (height * width), 1) * dist.get_world_size()
        batch_size = min(2000 if devices.is_gpu() else 500, fitting)
        return EvaluationLoader(self.data, split, batch_size, **_device_and_rank())

    def seed(self, purpose: str) -> int:
        """Seed of this scope for a purpose, e.g. "init" or "order"; see `derive_seed`."""
        return seeds.derive_seed(self.config.seed, self.scope, purpose)


def _device_and_rank() -> dict[str, Any]:
    return {"device": devices.torch_device(), "rank": dist.get_global_rank(), "ranks": dist.get_world_size()}
