"""CINIC-10 (Darlow et al. 2018): a resumable download of the official archive, which is read without unpacking it."""

import hashlib
import tarfile
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import requests
from PIL import Image
from tqdm import tqdm

from lth_diet.data.dataset import Split
from lth_diet.errors import UserError

URL = "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz"
MD5 = "6ee4d0c996905fe93221de577967a372"
ATTEMPTS = 10
_CHUNK = 1 << 20


def decode(root: str) -> tuple[Split, Split, list[str]]:
    """Return the training set (train/ and valid/ merged, as in the paper), test set and class names."""
    path = archive(Path(root))
    *train, class_names = read(path, ("train", "valid"))
    *test, _ = read(path, ("test",))
    return Split(*train), Split(*test), class_names


def archive(root: Path) -> Path:
    """Return the path of the verified archive `root/CINIC-10.tar.gz`, downloading it if it is missing.

    A partial download is kept in `CINIC-10.tar.gz.part`, from which the next call resumes.

    Raises:
        UserError: If the archive is not the official one or cannot be downloaded.
    """
    path = root / "CINIC-10.tar.gz"
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        root.mkdir(parents=True, exist_ok=True)
        _download(part)
        _check(part)
        part.rename(path)
    else:
        _check(path)
    return path


def _check(path: Path) -> None:
    md5 = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
    if md5.hexdigest() != MD5:
        raise UserError(
            f"{path}: incomplete or modified, its MD5 is {md5.hexdigest()}; expected {MD5}, the official archive; "
            "delete the file to download it again"
        )


def _download(part: Path) -> None:
    problem = ""
    for _ in range(ATTEMPTS):
        downloaded = part.stat().st_size if part.exists() else 0
        try:
            if _download_rest(part, downloaded):
                return
        except (requests.RequestException, OSError) as error:
            problem = type(error).__name__
    raise UserError(
        f"dataset.root = {str(part.parent)!r}: CINIC-10.tar.gz is missing and its download from {URL} failed "
        f"({problem}); put the official archive there, or check the network connection and rerun the command to resume"
    )


def _download_rest(part: Path, downloaded: int) -> bool:
    """Append the rest of the archive to `part` and return whether it is complete."""
    headers = {"Range": f"bytes={downloaded}-"} if downloaded else {}
    with requests.get(URL, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:  # range not satisfiable: nothing is left to send
            return True
        response.raise_for_status()
        if response.status_code != 206:  # not partial content: the server sends the whole file
            downloaded = 0
        total = downloaded + int(response.headers.get("Content-Length", 0))
        with (
            open(part, "ab" if downloaded else "wb") as file,
            tqdm(total=total or None, initial=downloaded, unit="B", unit_scale=True, desc="CINIC-10") as bar,
        ):
            for chunk in response.iter_content(1 << 13):  # small: a broken connection loses up to one chunk
                file.write(chunk)
                bar.update(len(chunk))
    return not total or part.stat().st_size >= total


def read(path: Path, parts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read the images of some parts of the archive, in the order of part, class and file name.

    Args:
        path: Path of the archive.
        parts: Any of "train", "valid" and "test".

    Returns:
        Images, uint8 (N, 32, 32, 3); labels, int64 (N,), indices into the class names; sorted class names.

    Raises:
        UserError: If the file is not a readable archive of 32 x 32 PNG images.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            names = sorted({member.name for member in tar if _is_image_of(member, parts)}, key=_split_path)
        if not names:
            raise ValueError(f"no images of {' or '.join(parts)}")
        positions = {name: index for index, name in enumerate(names)}
        images = np.empty((len(names), 32, 32, 3), np.uint8)
        for name, pixels in tqdm(_read_images(path, positions), total=len(names), desc=f"decoding {' + '.join(parts)}"):
            images[positions[name]] = pixels
    except Exception as error:  # tarfile, zlib and Pillow raise many types of exceptions for a damaged file
        raise UserError(f"{path}: not the CINIC-10 archive ({error}); expected the official one") from None
    classes = sorted({_split_path(name)[1] for name in names})
    labels = np.array([classes.index(_split_path(name)[1]) for name in names])
    return images, labels, classes


def _split_path(name: str) -> tuple[str, str, str]:
    """Return (part, class, file name) of a member of the archive."""
    return PurePosixPath(name).parts[-3:]


def _is_image_of(member: tarfile.TarInfo, parts: tuple[str, ...]) -> bool:
    path = _split_path(member.name)
    return member.isfile() and len(path) == 3 and path[0] in parts and path[2].lower().endswith(".png")


def _read_images(path: Path, names: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.name in names and member.isfile():  # a link or device may have the name of an image
                with Image.open(tar.extractfile(member), formats=("PNG",)) as image:
                    if image.size != (32, 32):
                        raise ValueError(f"{member.name} has {image.size[0]} x {image.size[1]} pixels")
                    yield member.name, np.asarray(image.convert("RGB"))
