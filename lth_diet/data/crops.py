"""Crops, flips and normalization of uint8 images with few operators on the device."""

import numpy as np
import torch
from torch import Tensor

from lth_diet.data.dataset import Dataset

_OUTSIDE = -(2**40)  # of the image: plus any index of a pixel, still negative


class Crops:
    """Crops of zero-padded images, some of them flipped, as one gather of pixels.

    Args:
        height, width: Size of the images and of the crops, in pixels.
        padding: Pixels added on each side.
    """

    def __init__(self, height: int, width: int, padding: int):
        def windows(size: int) -> np.ndarray:
            pixels = np.arange(2 * padding + 1)[:, None] + np.arange(size) - padding
            return np.where((pixels >= 0) & (pixels < size), pixels, _OUTSIDE)

        self.height, self.width = height, width
        self._rows = windows(height) * width
        self._columns = np.stack([windows(width), windows(width)[:, ::-1]])

    def plan(self, images: np.ndarray, top: np.ndarray, left: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return the numbers that `take` needs, int64, for B crops, or for B crops of each of R replicates.

        Args:
            images: Index of the image of each crop, (B,) or (B, R).
            top, left: Edges of each crop in the padded image, (B,) or (B, R), 0 to 2 x padding.
            flipped: Which crops to flip horizontally, boolean (B,) or (B, R).
        """
        # (B, H) or (B, H, R): in the order of the pixels that `take` gathers
        rows = images[:, None] * (self.height * self.width) + self._rows[top].swapaxes(1, -1)
        columns = self._columns[flipped.astype(int), left].swapaxes(1, -1)
        return np.concatenate([images.ravel(), rows.ravel(), columns.ravel()])

    def take(self, images: Tensor, plan: Tensor, replicates: int = 1) -> tuple[Tensor, Tensor]:
        """Return the crops of `images`, (N, H, W, C), as (B, H, W, R x C), and the indices of their images, (B x R,).

        Channels r x C to (r + 1) x C - 1 are those of replicate r.
        """
        count = len(plan) // (1 + self.height + self.width)
        indices, rows, columns = plan.split([count, count * self.height, count * self.width])
        pixels = rows.view(-1, self.height, 1, replicates) + columns.view(-1, 1, self.width, replicates)
        inside = (pixels >= 0).view(torch.uint8)
        # selecting numbers is faster than selecting rows of one number, and multiplying than masked_fill
        crops = images.flatten(0, 2).squeeze(1).index_select(0, pixels.clamp_(min=0).flatten())
        return crops.view(*pixels.shape, -1).mul_(inside[..., None]).flatten(3), indices


class Normalize:
    """Computes (x / 255 - mean) / std with one multiplication and one addition.

    Args:
        dataset: Its mean and standard deviation are used.
        device: Device of the images.
        replicates: Number of replicates whose images are concatenated along the channels.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str, replicates: int = 1):
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (dataset.mean, dataset.std))
        count = dataset.train.images.shape[2] * replicates
        # repeated over a row of pixels: broadcasting vectors of three numbers is slow
        self.scale = (1 / (255 * std)).float().repeat(count).to(device)
        self.shift = (-mean / std).float().repeat(count).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, H, W, R x C) to float32 (B, R x C, H, W) in channels-last memory format."""
        rows = images.flatten(2).float()
        torch.addcmul(self.shift, rows, self.scale, out=rows)
        return rows.view(images.shape).permute(0, 3, 1, 2)
