"""CINIC-10 (Darlow et al. 2018): the official archive, downloaded in as many goes as needed, read without unpacking."""

import hashlib
import tarfile
from collections.abc import Iterator
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
    """Training set (train and valid merged, as in the paper), test set and class names."""
    path = archive(Path(root))
    *train, class_names = read(path, ("train", "valid"))
    *test, _ = read(path, ("test",))
    return Split(*train), Split(*test), class_names


def archive(root: Path) -> Path:
    """The checked archive `root/CINIC-10.tar.gz`, downloaded if it is not there.

    What a broken connection left in `CINIC-10.tar.gz.part` is kept, and the download goes on from there.

    Raises:
        UserError: If the archive is not the official one, or cannot be downloaded.
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
            f"{path}: partial or altered, its md5 is {md5.hexdigest()}; allowed: {MD5}, the official archive; "
            "delete the file to download it again"
        )


def _download(part: Path) -> None:
    problem = ""
    for _ in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        try:
            if _fetch(part, have):
                return
        except (requests.RequestException, OSError) as error:
            problem = type(error).__name__
    raise UserError(
        f"dataset.root: {part.parent} does not hold CINIC-10.tar.gz and {URL} cannot be downloaded ({problem}); "
        "allowed: a folder with the official archive, or a network that reaches it; run the command again to go on"
    )


def _fetch(part: Path, have: int) -> bool:
    """Append what is missing to `part`; whether that made it whole."""
    with requests.get(URL, headers={"Range": f"bytes={have}-"} if have else {}, stream=True, timeout=60) as answer:
        if answer.status_code == 416:  # nothing is left to send
            return True
        answer.raise_for_status()
        if answer.status_code != 206:  # the server sends all of it, whatever was asked for
            have = 0
        whole = have + int(answer.headers.get("Content-Length", 0))
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=whole or None, initial=have, unit="B", unit_scale=True, desc="CINIC-10") as bar,
        ):
            for chunk in answer.iter_content(1 << 13):  # what a break loses
                file.write(chunk)
                bar.update(len(chunk))
    return not whole or part.stat().st_size >= whole


def read(path: Path, parts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of some parts of the archive, in the order of part, class and name.

    Args:
        path: What `archive` returned.
        parts: Of "train", "valid", "test".

    Returns:
        Images, uint8 (N, 32, 32, 3); labels, int64 (N,), numbering the classes by name; the classes.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            names = sorted(
                {member.name for member in tar if _is_of(member, parts)},
                key=lambda name: (parts.index(_place(name)[0]), *_place(name)[1:]),
            )
        if not names:
            raise ValueError(f"no images of {' or '.join(parts)}")
        place = {name: index for index, name in enumerate(names)}
        images = np.empty((len(names), 32, 32, 3), np.uint8)
        for name, pixels in tqdm(_pixels(path, place), total=len(names), desc=f"decoding {' + '.join(parts)}"):
            images[place[name]] = pixels
    except Exception as error:  # tarfile, zlib and Pillow raise nearly anything for a damaged file
        raise UserError(f"{path}: not the archive of CINIC-10 ({error}); allowed: the official one") from None
    classes = sorted({_place(name)[1] for name in names})
    labels = np.array([classes.index(_place(name)[1]) for name in names])
    return images, labels, classes


def _place(name: str) -> tuple[str, str, str]:
    """(part, class, file name) of a member."""
    return PurePosixPath(name).parts[-3:]


def _is_of(member: tarfile.TarInfo, parts: tuple[str, ...]) -> bool:
    place = _place(member.name)
    return member.isfile() and len(place) == 3 and place[0] in parts and place[2].lower().endswith(".png")


def _pixels(path: Path, wanted: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.name in wanted and member.isfile():  # a link or device may bear the same name
                with Image.open(tar.extractfile(member), formats=("PNG",)) as image:
                    if image.size != (32, 32):
                        raise ValueError(f"{member.name} has {image.size[0]} x {image.size[1]} pixels")
                    yield member.name, np.asarray(image.convert("RGB"))
