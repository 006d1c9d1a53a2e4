"""CIFAR-10 and CIFAR-100, downloaded and checked by torchvision."""

import contextlib
from pathlib import Path

import numpy as np

from lth_diet.data.dataset import Split
from lth_diet.errors import UserError


def decode(kind: str, root: str) -> tuple[Split, Split, list[str]]:
    from torchvision import datasets as torchvision_datasets  # imports torch: only when there is no cache yet

    try:
        parts = [getattr(torchvision_datasets, kind)(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        with contextlib.suppress(OSError):
            Path(root).rmdir()  # if the attempt made it, and left it empty
        raise UserError(
            f"dataset.root: {root!r} does not hold {kind} and the download failed ({reason}); allowed: a folder with "
            f"the extracted {archive_folder(kind)}, or a network that reaches its source"
        ) from None
    train, test = (Split(np.asarray(part.data), np.asarray(part.targets)) for part in parts)
    return train, test, parts[0].classes


def archive_folder(kind: str) -> str:
    """The folder that the official archive of a CIFAR data set extracts to."""
    return {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[kind]
