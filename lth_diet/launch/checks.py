"""Checks of a configuration against the ranks, the data and the machine of a launch."""

import os
import shutil

from lth_diet.config.schema import Config
from lth_diet.data import catalog
from lth_diet.data.label_noise import noisy_labels
from lth_diet.errors import UserError
from lth_diet.launch.processes import ProcessInfo
from lth_diet.runs.run_store import open_run_store
from lth_diet.runs.scores_directory import ScoresDirectory, load_arm_scores


def check_imp(config: Config, process: ProcessInfo) -> None:
    """Check that every rank has something to train.

    Raises:
        UserError: If the ranks cannot share the batches or the replicates.
    """
    if config.parallelism == "data":
        if config.train.batch_size % process.world_size:
            raise UserError(
                f"train.batch_size = {config.train.batch_size}: must be a multiple of the {process.world_size} ranks "
                "with parallelism: data"
            )
    elif process.world_size > len(config.replicates):
        raise UserError(
            f"command line: {process.world_size} ranks for {len(config.replicates)} replicates; use composer -n "
            f"{len(config.replicates)} or fewer, more replicates, or parallelism=data"
        )


def check_scoring(config: Config, process: ProcessInfo) -> None:
    """Check that there are scores to compute, and networks for every rank.

    Raises:
        UserError: If there are not.
    """
    if config.scores.file is not None:
        raise UserError(f"scores.file = {config.scores.file!r}: must be unset to compute scores")
    if process.world_size > config.scores.networks:
        raise UserError(
            f"command line: {process.world_size} ranks for {config.scores.networks} networks; use composer -n "
            f"{config.scores.networks} or fewer, or more scores.networks"
        )


def check_environment(config: Config, process: ProcessInfo) -> None:
    """Check the store of the runs, the data, the scores and the machine. Decodes the data if there is no cache yet.

    Raises:
        UserError: If one of them cannot be used with this configuration.
    """
    open_run_store(config.runs).check()
    data = catalog.load(config.dataset.name, config.dataset.root)
    images = len(data.test.labels)
    if config.parallelism == "data" and images < process.world_size:
        raise UserError(
            f"command line: {process.world_size} ranks for {images} test images; use composer -n {images} or fewer "
            "with parallelism: data"
        )
    if config.needs_scores and (config.scores.file is not None or ScoresDirectory(config).done):
        labels = noisy_labels(data.train.labels, config.pretrain.label_noise, len(data.class_names), config.seed)
        load_arm_scores(config, labels)
    if config.precision == "bf16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("precision = 'bf16': must be auto or fp32 without a GPU")
    if config.compile and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise UserError("compile = true: must be false without a C++ compiler in CXX or the PATH")
