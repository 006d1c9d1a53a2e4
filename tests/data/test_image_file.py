import io
import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from lth_diet.data.image_file import read_pixels, scale_images
from lth_diet.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(content):
    return read_pixels(io.BytesIO(content), "a.png")


def png(width, height, depth, color_type, rows):
    """A PNG file of any bit depth and color type, from the bytes of its rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_color_is_read_as_it_is_and_opaque_alpha_changes_nothing():
    assert np.array_equal(read(encode(Image.fromarray(NOISE))), NOISE)
    assert np.array_equal(read(encode(Image.fromarray(NOISE).convert("RGBA"))), NOISE)


def test_transparent_pixels_are_composed_on_white():
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[2:4, :, 3], drawing[6, :, 3] = 255, 51
    expected = np.full((8, 8), 255)
    expected[2:4], expected[6] = 0, 204
    assert np.array_equal(read(encode(Image.fromarray(drawing))), np.stack([expected] * 3, -1))
    assert np.array_equal(read(encode(Image.fromarray(drawing).convert("LA"))), expected[..., None])


@pytest.mark.parametrize(("mode", "color"), [("L", 7), ("RGB", (7, 8, 9)), ("P", 0)])
def test_a_transparent_color_is_composed_on_white(mode, color):
    image = Image.fromarray(NOISE).convert("L").quantize(4) if mode == "P" else Image.new(mode, (8, 8), color)
    image.putpixel((3, 4), color)
    pixels = read(encode(image, transparency=color))
    assert (pixels[4, 3] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_images_are_upright_as_their_exif_orientation_says(orientation, format):
    stored = Image.fromarray(np.repeat(np.repeat(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3), 8, 0), 8, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"quality": 100} if format == "JPEG" else {})
    a = np.asarray(stored)
    upright = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.T, a[::-1].T, a[::-1, ::-1].T, a[:, ::-1].T][orientation - 1]
    assert np.abs(read(encode(stored, format, **options))[..., 0].astype(int) - upright).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_grayscale_images_have_one_channel_in_every_encoding(mode):
    gray = Image.fromarray(NOISE).convert("1").convert("L")
    pixels = read(encode(gray.convert(mode)))
    assert np.array_equal(pixels, np.asarray(gray)[..., None])
    assert read(encode(Image.fromarray(NOISE).quantize(8))).shape == (8, 12, 3)  # a palette of colors


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gray_levels_of_few_bits_are_scaled_to_8_bits(depth):
    levels = 2**depth
    row = bytes(sum((j % levels) << (8 - depth - (j % (8 // depth)) * depth) for j in range(i, i + 8 // depth)) for i in range(0, 8, 8 // depth))  # fmt: skip
    assert read(png(8, 8, depth, 0, [row] * 8))[0, :levels, 0].tolist() == [
        255 * (j % levels) // (levels - 1) for j in range(min(levels, 8))
    ]


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_per_channel_are_rejected_in_gray_and_color(color_type, channels):
    content = png(8, 8, 16, color_type, [b"\x12\x34" * 8 * channels] * 8)
    with pytest.raises(UserError, match=r"a\.png: (16 bits per channel|pixels of mode I;16); expected 8 bits per chan"):
        read(content)


def test_cmyk_is_converted_to_rgb():
    red = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert read(red)[3, 3].tolist() == pytest.approx([255, 0, 0], abs=4)


@pytest.mark.parametrize("size", [(3, 8), (8, 3), (1, 1)])
def test_sides_of_fewer_than_4_pixels_are_rejected(size):
    assert read(encode(Image.new("L", (4, 4)))).shape == (4, 4, 1)
    with pytest.raises(UserError, match=r"a\.png: \d x \d pixels; expected at least 4 per side"):
        read(encode(Image.new("RGB", size)))


@pytest.mark.parametrize("format", ["PNG", "MPO"])
def test_files_with_several_images_are_rejected(format):
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    with pytest.raises(UserError, match=r"a\.png: 2 images in one file; expected a single image"):
        read(encode(frames[0], format, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_no_truncated_file_is_accepted(format):
    content = encode(Image.fromarray(NOISE), format)
    for length in range(len(content)):
        with pytest.raises(UserError, match=r"a\.png: not a readable image"):
            read(content[:length])
    assert np.array_equal(read(content + bytes(9)), read(content))  # what follows its end does not matter


def test_no_changed_byte_of_a_png_is_accepted():
    content = encode(Image.fromarray(NOISE))
    for position in range(len(content)):
        with pytest.raises(UserError, match=r"a\.png: "):
            read(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])


def test_a_jpeg_without_quantization_tables_is_rejected():
    content = encode(Image.fromarray(NOISE), "JPEG")
    for position in itertools.islice(range(content.index(b"\xff\xdb") + 5, len(content)), 0, 20, 5):
        with pytest.raises(UserError, match=r"not a readable image \(zeros in its quantization tables\)"):
            read(content[:position] + bytes(40) + content[position + 40 :])


def test_exif_data_from_which_the_orientation_cannot_be_read_is_rejected():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.fromarray(NOISE), "JPEG", exif=exif)
    start = content.index(b"Exif\0\0") + 6
    with pytest.raises(UserError, match="a.png: damaged EXIF data; remove it if the image is upright without it"):
        read(content[:start] + content[start : start + 8] + b"\xff\xff\0" + content[start + 11 :])


def test_a_scaled_image_is_the_mean_of_its_pixels_around_the_center():
    content = encode(Image.fromarray(NOISE))  # 8 x 12 pixels: 2 columns are cropped on each side
    mean = NOISE[:, 2:10].reshape(4, 2, 4, 2, 3).mean((1, 3))
    scaled = read_pixels(io.BytesIO(content), "a.png", 4)
    assert scaled.shape == (4, 4, 3) and np.abs(scaled - mean).max() <= 1
    assert np.array_equal(scale_images(NOISE[None], 4)[0], scaled)
    gray = scale_images(NOISE[None, ..., :1], 4)
    assert gray.shape == (1, 4, 4, 1) and np.array_equal(gray[0, ..., 0], scaled[..., 0])


def test_a_portrait_is_turned_before_it_is_cropped():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_pixels(io.BytesIO(encode(Image.fromarray(NOISE), exif=exif)), "a.png", 8)
    assert np.array_equal(turned, np.rot90(NOISE, -1)[2:10])


def test_damaged_exif_data_is_accepted_if_it_has_the_orientation():
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x0131, 2, 99, 9999)  # beyond the end
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    upright = read(encode(Image.fromarray(NOISE), "JPEG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(encode(Image.fromarray(NOISE), "JPEG", exif=exif)), np.rot90(upright, -1))


def test_large_photographs_are_accepted_if_they_are_scaled():
    content = encode(Image.new("L", (1500, 1100), 7), "JPEG")
    assert np.array_equal(read_pixels(io.BytesIO(content), "a.jpg", 8), np.full((8, 8, 1), 7))
    with pytest.raises(UserError, match="1500 x 1100 pixels; expected at most 1024 per side, or set dataset.size"):
        read(content)
