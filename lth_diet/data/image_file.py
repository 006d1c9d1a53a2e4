"""Decodes one JPEG or PNG file to 8-bit pixels, and rejects files that Pillow would read only in part or change."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lth_diet.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

DECODER_VERSION = 2
"""Raised when the same file is decoded to other pixels; part of the fingerprint of image folders."""
MIN_SIDE = 4  # pixels; the networks halve the sides twice
MAX_SIDE = 1024  # pixels; a file of a few bytes may claim to be of any size
_MAX_SCALED_SIDE = 16_384  # of images that are scaled down
MAX_BYTES = 64 << 20
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # tag of EXIF
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH = 24  # position in the file
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def read_pixels(file: BinaryIO, path: Path, size: int | None = None) -> np.ndarray:
    """Decode an image, upright as its EXIF orientation says and on a white background where it is transparent.

    Args:
        file: The open file.
        path: Its path, for messages.
        size: Scale the image so that its shorter side has this many pixels, and crop the center to a square.

    Returns:
        Pixels, uint8 of shape (H, W, C): one channel for grayscale images, also with 1 bit, alpha or a gray palette;
        three for others.

    Raises:
        UserError: If the file is damaged or truncated, or is not a JPEG or PNG file with one image of `MIN_SIDE` to
            `MAX_SIDE` pixels per side (more if it is scaled) and at most 8 bits per channel.
    """
    from PIL import Image, ImageOps

    def opened() -> "Image.Image":
        file.seek(0)
        return Image.open(file, formats=("PNG", "JPEG"))

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with opened() as image:
                _check(image, file, path, MAX_SIDE if size is None else _MAX_SCALED_SIDE)
                image.verify()  # the checksums of a PNG; unusable afterwards
            with opened() as image:
                is_upright_known = _ORIENTATION in image.getexif()
                if not is_upright_known and any(re.search("EXIF|File Read", str(each.message)) for each in caught):
                    raise UserError(f"{path}: damaged EXIF data; remove it if the image is upright without it")
                image = _as_gray_or_rgb(ImageOps.exif_transpose(image))
                pixels = np.asarray(image if size is None else _scale(image, size))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types of exceptions for a damaged file
        raise UserError(f"{path}: not a readable image ({error}); expected a complete JPEG or PNG file") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def scale_images(images: np.ndarray, size: int) -> np.ndarray:
    """Scale images, uint8 of shape (N, H, W, C), as `read_pixels` does; returns shape (N, size, size, C)."""
    from PIL import Image

    gray = images.shape[3] == 1
    scaled = [_scale(Image.fromarray(image[..., 0] if gray else image), size) for image in images]
    return np.stack([np.asarray(image) for image in scaled]).reshape(len(images), size, size, -1)


def _scale(image: "Image.Image", size: int) -> "Image.Image":
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.BOX)  # the mean of all pixels that become one


def _check(image: "Image.Image", file: BinaryIO, path: Path, max_side: int) -> None:
    width, height = image.size
    if max(image.size) > max_side:
        hint = ", or set dataset.size to scale the images" if max_side == MAX_SIDE else ""
        raise UserError(f"{path}: {width} x {height} pixels; expected at most {max_side} per side{hint}")
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{path}: {width} x {height} pixels; expected at least {MIN_SIDE} per side")
    if image.mode not in _EIGHT_BIT_MODES:
        raise UserError(f"{path}: pixels of mode {image.mode}; expected 8 bits per channel")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise UserError(f"{path}: {frames} images in one file; expected a single image")
    file.seek(0)
    content = file.read()
    if content.startswith(_PNG_SIGNATURE):
        if content[_PNG_BIT_DEPTH] == 16:  # Pillow drops the lower 8 bits of colors
            raise UserError(f"{path}: 16 bits per channel; expected 8 bits per channel")
        if _PNG_END not in content:
            raise ValueError("truncated PNG file")
    elif any(0 in table for table in image.quantization.values()):
        raise ValueError("zeros in its quantization tables")


def _as_gray_or_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    mode = "L" if image.mode in ("1", "L", "LA") or (image.mode == "P" and _has_gray_palette(image)) else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").convert(mode)


def _has_gray_palette(image: "Image.Image") -> bool:
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())
