"""CIFAR-10 and CIFAR-100, downloaded and verified by torchvision."""

import contextlib
from pathlib import Path

import numpy as np

from lth_diet.data.dataset import Split
from lth_diet.errors import UserError

_ARCHIVE_FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}


def decode(class_name: str, root: str) -> tuple[Split, Split, list[str]]:
    """Return the training set, test set and class names.

    Args:
        class_name: torchvision's dataset class, "CIFAR10" or "CIFAR100".
        root: Folder with the extracted archive. The archive is downloaded if it is missing.

    Raises:
        UserError: If the files are missing or modified and cannot be downloaded.
    """
    from torchvision import datasets as torchvision_datasets  # imports torch, which is slow

    try:
        parts = [getattr(torchvision_datasets, class_name)(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        with contextlib.suppress(OSError):
            Path(root).rmdir()  # only if the failed download left it empty
        raise UserError(
            f"dataset.root = {root!r}: {class_name} is missing and its download failed ({reason}); put the "
            f"extracted {_ARCHIVE_FOLDERS[class_name]} there, or check the network connection and rerun the command"
        ) from None
    train, test = (Split(np.asarray(part.data), np.asarray(part.targets)) for part in parts)
    return train, test, parts[0].classes
