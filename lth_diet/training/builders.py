"""Builds the data, the network and the loaders of a phase from a configuration and a seed."""

import dataclasses
import functools
from typing import Any

from composer.models import ComposerClassifier
from composer.utils import dist

from lth_diet.config.schema import Config
from lth_diet.data import catalog, dataset, seeds
from lth_diet.data.label_noise import noisy_labels
from lth_diet.data.loader import EvaluationLoader, Loader, StackedLoader
from lth_diet.networks import classifier
from lth_diet.training import devices

EVALUATION_PIXELS = 2000 * 32 * 32
"""Pixels per rank and evaluation batch of all networks: a layer of 16 channels in fp32 has 125 MiB of outputs."""


class Builder:
    """Builds data, network and loaders for replicates or scoring networks that train together as one stack, or for one.

    Args:
        config: Configuration of the arm.
        scopes: Scope of the seeds of each: a replicate's index or "network_<k>"; none for data alone. See
            `lth_diet.data.seeds`.
    """

    def __init__(self, config: Config, *scopes: int | str):
        self.config = config
        self.scopes = scopes

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
        """The randomly initialized networks, as one stack if there are several."""
        depth, width = self.config.model.depth, self.config.model.width
        *size, channels = self.data.train.images.shape[1:]
        classes = len(self.data.class_names)
        networks = [classifier.build_classifier(depth, classes, width, channels, seed) for seed in self.seeds("init")]
        return classifier.stack_classifiers(networks, (channels, *size))

    def build_loader(self, data: dataset.Dataset) -> Loader | StackedLoader:
        """Training batches of `data`, for each scope in its own order and with its own augmentation."""
        size, flip, where = self.config.train.batch_size, self.config.dataset.flip, _device_and_rank()
        seeds_of_loaders = zip(self.seeds("order"), self.seeds("augmentation"), strict=True)
        loaders = [
            Loader(data, size, order, augmentation, flip=flip, **where) for order, augmentation in seeds_of_loaders
        ]
        return StackedLoader(loaders) if len(loaders) > 1 else loaders[0]

    def build_evaluation_loader(self, split: dataset.Split) -> EvaluationLoader:
        """All images of a split, without augmentation, in batches of 2000 on a GPU, 500 on a CPU, or fewer if large."""
        height, width = split.images.shape[1:3]
        copies = len(self.scopes)
        fitting = max(EVALUATION_PIXELS // (height * width * copies), 1) * dist.get_world_size()
        batch_size = min(2000 if devices.is_gpu() else 500, fitting)
        return EvaluationLoader(self.data, split, batch_size, copies=copies, **_device_and_rank())

    def seeds(self, purpose: str) -> list[int]:
        """Seed of each scope for a purpose, e.g. "init" or "order"; see `derive_seed`."""
        return [seeds.derive_seed(self.config.seed, scope, purpose) for scope in self.scopes]


def _device_and_rank() -> dict[str, Any]:
    return {"device": devices.torch_device(), "rank": dist.get_global_rank(), "ranks": dist.get_world_size()}
