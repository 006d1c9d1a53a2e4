"""What is in an image folder: the images of each class, and the files that are not used."""

import collections
import contextlib
import os
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lth_diet.data.image_file import MAX_BYTES
from lth_diet.errors import UserError

PARTS = ("train", "valid", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
UNBALANCED = 10
"""Ratio of the sizes of the largest and smallest class from which a warning says so."""

_OTHER_FORMATS = (
    *(".apng", ".avif", ".bmp", ".dcm", ".dng", ".exr", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe"),
    *(".jxl", ".npy", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".webp"),
)
_SYSTEM_NAMES = {
    *(".ds_store", ".git", ".ipynb_checkpoints", ".spotlight-v100", ".trashes", "$recycle.bin", "@eadir"),
    *("__macosx", "__pycache__", "desktop.ini", "lost+found", "system volume information", "thumbs.db"),
}
_ALIASES = {"training": "train", "val": "valid", "validation": "valid", "dev": "valid", "testing": "test"}

Kind = tuple[str, str, str]
"""What is not used: a noun, where it is, and the remedy."""
_OTHER: Kind = ("other file", "", "")
_OTHER_FORMAT: Kind = ("picture", " of another format", "; expected JPEG or PNG")
_HIDDEN: Kind = ("hidden image", "", "; rename what begins with a dot to use it")
_NESTED: Kind = ("image", " in folders inside class folders", "; move them up to <class>/ to use them")
_EMPTY: Kind = ("class folder", " without images", "")


class Layout:
    """The files of an image folder, found in one walk.

    Attributes:
        images: (class name, name, status) of each image, by part; sorted by class and name. Names are relative to the
            folder.
        unused: Number of files of each kind that are not used, and the name of the first one.

    Raises:
        UserError: If an image is not a regular file or too large.
        OSError: If a file or folder cannot be read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.images: dict[str, list[tuple[str, str, os.stat_result]]] = {part: [] for part in PARTS}
        self.unused: dict[Kind, tuple[int, str]] = {}
        self._folders: list[str] = []
        for entry in _scan(root) if root.is_dir() else ():
            self._add_top(entry)

    def _add_top(self, entry: os.DirEntry) -> None:
        if not entry.is_dir():
            self._add_unused_file(entry.name, "train/<class>/", " outside train/ and test/")
            return
        self._folders.append(entry.name)
        if entry.name in PARTS:
            for inner in _scan(entry.path):
                self._add_to_part(entry.name, inner)
            return
        meant = _meant(entry.name)
        remedy = f"; did you mean {meant}/?" if meant else "; only train/, valid/ and test/ are read"
        kind = _HIDDEN if entry.name.startswith(".") else ("image", f" in {entry.name}/", remedy)
        self._add_unused(kind, filter(_is_picture, _files_below(entry, entry.name)))

    def _add_to_part(self, part: str, entry: os.DirEntry) -> None:
        name = f"{part}/{entry.name}"
        if not entry.is_dir():
            self._add_unused_file(name, f"{part}/<class>/", f" directly in {part}/")
        elif entry.name.startswith("."):
            self._add_unused(_HIDDEN, filter(_is_picture, _files_below(entry, name)))
        else:
            images, unused = len(self.images[part]), dict(self.unused)
            for inner in _scan(entry.path):
                self._add_to_class(part, entry.name, inner)
            if len(self.images[part]) == images and self.unused == unused:
                self._add_unused(_EMPTY, [f"{name}/"])

    def _add_to_class(self, part: str, class_name: str, entry: os.DirEntry) -> None:
        name = f"{part}/{class_name}/{entry.name}"
        if entry.name.startswith("."):
            names = _files_below(entry, name) if entry.is_dir() else [name]
            self._add_unused(_HIDDEN, filter(_is_picture, names))
        elif _is_image(name):
            self.images[part].append((class_name, name, _status(entry)))
        elif entry.is_dir(follow_symlinks=False):
            for inner in _files_below(entry, name):
                self._add_unused(_NESTED if _is_picture(inner) else _OTHER, [inner])
        else:
            self._add_unused_file(name, "", "")

    def _add_unused_file(self, name: str, expected: str, where: str) -> None:
        if name.rpartition("/")[2].startswith("."):
            self._add_unused(_HIDDEN, filter(_is_picture, [name]))
        elif _is_image(name):
            self._add_unused(("image", where, f"; expected {expected}"), [name])
        else:
            self._add_unused(_OTHER_FORMAT if _is_picture(name) else _OTHER, [name])

    def _add_unused(self, kind: Kind, names: Iterable[str]) -> None:
        for name in names:
            count, first = self.unused.get(kind, (0, name))
            self.unused[kind] = (count + 1, first)

    def check(self) -> None:
        """Check that train/ and test/ exist and have images of the same two or more classes.

        Raises:
            UserError: If not.
        """
        if not self.root.is_dir():
            found = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{self.root} {found}; expected a folder with train/<class>/ and test/<class>/")
        for part in ("train", "test"):
            if part not in self._folders:
                raise UserError(
                    f"{self.root} has no folder {part}/; expected train/<class>/ and test/<class>/" + self._hint(part)
                )
            if not self.images[part] and not (part == "train" and self.images["valid"]):
                raise UserError(
                    f"{self.root / part} has no images; expected one folder per class with JPEG or PNG files"
                    + "".join(f"; {sentence}" for sentence in self._describe_unused(f"{part}/"))
                )
        train, test = self._class_sizes("train", "valid"), self._class_sizes("test")
        if train.keys() != test.keys():
            raise UserError(
                f"{self.root}: {_describe_mismatch(train.keys() - test.keys(), test.keys() - train.keys())}"
            )
        if len(train) < 2:
            raise UserError(f"{self.root} has only one class, {next(iter(train))!r}; expected at least two")

    def _hint(self, part: str) -> str:
        """Name a folder that may be the missing one."""
        meant = (part, "valid") if part == "test" else (part,)
        near = [name for name in self._folders if _meant(name) in meant and name not in ("train", "test")]
        return f"; to use {near[0]}/ as {part}/, rename it" if near else ""

    def warnings(self) -> list[str]:
        """One sentence for each kind of file that is not used, and for classes that look wrong."""
        sentences = self._describe_unused()
        train, test = self._class_sizes("train", "valid"), self._class_sizes("test")
        alike: dict[str, list[tuple[str, str]]] = {}
        for pair in _look_alike(train):
            alike.setdefault(_difference(*pair), []).append(pair)
        for difference, pairs in alike.items():
            names = f"{pairs[0][0]!a} and {pairs[0][1]!a}"
            which = f"{len(pairs)} pairs of classes, such as {names}," if len(pairs) > 1 else f"classes {names}"
            sentences.append(f"{which} differ only in {difference}")
        for sizes, noun in ((train, "training image"), (test, "test image")):
            (largest, most), *_, (smallest, fewest) = sizes.most_common()
            if most >= UNBALANCED * fewest:
                sentences.append(
                    f"the classes are unbalanced: {_count(most, noun)} of {largest!r}, but {fewest:,} of {smallest!r}"
                )
        return [f"{self.root}: {sentence}" for sentence in sentences]

    def _describe_unused(self, prefix: str = "") -> list[str]:
        return [
            f"{_count(count, noun)}{where} {'are' if count > 1 else 'is'} not used "
            f"({'such as ' * (count > 1)}{name}){remedy}"
            for (noun, where, remedy), (count, name) in self.unused.items()
            if name.startswith(prefix)
        ]

    def _class_sizes(self, *parts: str) -> collections.Counter[str]:
        return collections.Counter(class_name for part in parts for class_name, _, _ in self.images[part])


def _scan(folder: Path | str) -> list[os.DirEntry]:
    """Entries of a folder, sorted by name, without those that operating systems and editors add."""
    with os.scandir(folder) as entries:
        mine = [entry for entry in entries if not (entry.name.startswith("._") or entry.name.lower() in _SYSTEM_NAMES)]
    return sorted(mine, key=lambda entry: entry.name)


def _files_below(folder: os.DirEntry, name: str) -> Iterator[str]:
    """Names of the files below a folder that is not used. A link in it to another folder counts as a file."""
    with contextlib.suppress(PermissionError):
        for entry in _scan(folder.path):
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry, f"{name}/{entry.name}")
            else:
                yield f"{name}/{entry.name}"


def _status(entry: os.DirEntry) -> os.stat_result:
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):  # reading from a pipe may block forever
        raise UserError(f"{entry.path} is not a regular file; expected a JPEG or PNG file")
    if status.st_size > MAX_BYTES:
        raise UserError(
            f"{entry.path}: {status.st_size >> 20:,} MiB; expected an image of at most {MAX_BYTES >> 20} MiB"
        )
    return status


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _is_picture(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, *_OTHER_FORMATS))


def _meant(folder: str) -> str | None:
    """The part that a folder of this name is probably meant to be."""
    name = folder.strip().lower()
    return name if name in PARTS else _ALIASES.get(name)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number > 1)}"


def _describe_mismatch(only_train: Collection[str], only_test: Collection[str]) -> str:
    folded = {_fold(name).casefold(): name for name in sorted(only_test)}
    for name in sorted(only_train):
        other = folded.get(_fold(name).casefold())
        if other is not None:
            return (
                f"class {name!a} is only in train/ and {other!a} only in test/; they differ in "
                f"{_difference(name, other)}: rename one"
            )
    sides = [
        f"class {min(names)!r}{f' and {len(names) - 1:,} more' * (len(names) > 1)} only in {part}"
        for names, part in ((only_train, "train/"), (only_test, "test/"))
        if names
    ]
    return f"found {', '.join(sides)}; expected the same classes in train/ and test/"


def _look_alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that look the same, or differ only in upper and lower case."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(_fold(name).casefold(), name)
        if other != name:
            yield other, name


def _fold(name: str) -> str:
    """A name without what cannot be seen: its Unicode form, blanks at its ends and invisible characters."""
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", " ".join(visible.split()))


def _difference(name: str, other: str) -> str:
    if unicodedata.normalize("NFKC", name) == unicodedata.normalize("NFKC", other):
        return "their Unicode form"
    if " ".join(name.split()) == " ".join(other.split()):
        return "blanks"
    if name.casefold() == other.casefold():
        return "upper and lower case"
    return "blanks, case, Unicode form or invisible characters"
