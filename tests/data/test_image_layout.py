import itertools
import shutil
import unicodedata
from pathlib import Path

import pytest
from helpers import write_image_folder

from lth_diet.data import catalog
from lth_diet.errors import UserError


@pytest.fixture
def data(place, monkeypatch):
    """An image folder data/ of 6 training and 2 test images in each of the classes ant and bee."""
    catalog.info.cache_clear()
    return write_image_folder(place / "data")


def add(*names):
    for name in names:
        path = Path("data") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_whose_files_are_all_used_gives_no_warning(data):
    assert catalog.warnings("image_folder", "data") == []
    assert catalog.warnings("digits", "data") == []


UNUSED = {
    "nested images": (
        ["train/ant/images/0.JPEG", "train/ant/images/1.JPEG", "train/bee/more/deep/2.png"],
        "3 images in folders inside class folders are not used (such as train/ant/images/0.JPEG); move them up to "
        "<class>/ to use them",
    ),
    "pictures of other formats": (
        ["train/ant/0.webp", "test/bee/1.BMP"],
        "2 pictures of another format are not used (such as test/bee/1.BMP); expected JPEG or PNG",
    ),
    "images directly in train": (
        ["train/0.png"],
        "1 image directly in train/ is not used (train/0.png); expected train/<class>/",
    ),
    "images directly in the folder": (
        ["0.jpg"],
        "1 image outside train/ and test/ is not used (0.jpg); expected train/<class>/",
    ),
    "images directly in val": (
        ["val/0.png", "val/1.png"],
        "2 images in val/ are not used (such as val/0.png); did you mean valid/?",
    ),
    "a validation folder": (
        ["Validation/ant/0.png"],
        "1 image in Validation/ is not used (Validation/ant/0.png); did you mean valid/?",
    ),
    "another folder": (
        ["raw/ant/0.webp"],
        "1 image in raw/ is not used (raw/ant/0.webp); only train/, valid/ and test/ are read",
    ),
    "hidden images": (
        ["train/.cat/0.png", "train/ant/.0.png"],
        "2 hidden images are not used (such as train/.cat/0.png); rename what begins with a dot to use it",
    ),
    "other files": (
        ["labels.csv", "train/ant/boxes.txt", "train/ant/0007"],
        "3 other files are not used (such as labels.csv)",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_files_that_are_not_used_are_counted_and_one_is_named(data, case):
    names, sentence = UNUSED[case]
    add(*names)
    assert catalog.warnings("image_folder", "data") == [f"data: {sentence}"]
    assert catalog.info("image_folder", "data").train_size == 12


def test_each_kind_of_unused_file_has_its_own_sentence(data):
    add(*(name for names, _ in UNUSED.values() for name in names))
    (data / "train/cat").mkdir()
    (data / "train/ant/link").symlink_to("..", target_is_directory=True)
    sentences = catalog.warnings("image_folder", "data")
    assert len(sentences) == len(UNUSED) + 1
    assert "data: 1 class folder without images is not used (train/cat/)" in sentences
    assert "data: 4 other files are not used (such as labels.csv)" in sentences  # a link to a folder is not followed


def test_files_of_operating_systems_and_editors_are_neither_images_nor_classes_nor_reported(data):
    before = catalog.info("image_folder", "data")
    catalog.info.cache_clear()
    for part, folder in itertools.product(("train", "test"), (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir")):
        add(f"{part}/{folder}/0.png", f"{part}/ant/{folder}/0.png", f"{folder}/{part}/0.png")
    for name in ("._photo.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        add(f"train/ant/{name}", f"train/{name}", name)
    assert catalog.info("image_folder", "data") == before


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ("caf\u00e9", "cafe\u0301", r"class 'caf\\xe9' is only in train/ and 'cafe\\u0301' only in test/; they differ in "
         "their Unicode form: rename one"),
        ("ant", "ant ", "class 'ant' is only in train/ and 'ant ' only in test/; they differ in blanks"),
        ("Ant", "ant", "class 'Ant' is only in train/ and 'ant' only in test/; they differ in upper and lower case"),
        ("ant", "\u200bant", r"'ant' is only in train/ and '\\u200bant' only in test/; they differ in .* invisible"),
        ("ant", "wasp", "found class 'ant' only in train/, class 'wasp' only in test/; expected the same classes in "),
    ],
)  # fmt: skip
def test_classes_that_are_in_only_one_split_are_both_named_with_their_difference(data, train, test, sentence):
    (data / "train/ant").rename(data / "train" / train)
    (data / "test/ant").rename(data / "test" / test)
    with pytest.raises(UserError, match=sentence):
        catalog.info("image_folder", "data")


def test_test_images_that_are_training_images_and_images_of_two_classes_are_reported(data):
    shutil.copy("data/train/ant/0001.png", "data/test/ant/copy.png")
    shutil.copy("data/train/ant/0001.png", "data/train/bee/copy.png")
    assert catalog.warnings("image_folder", "data") == [
        "data: 1 test image is also in train/ or valid/ (test/ant/copy.png is train/ant/0001.png), so test accuracies are "
        "too high",
        "data: 1 image is also in another class (train/bee/copy.png is train/ant/0001.png)",
    ]


def test_a_test_folder_that_is_the_validation_folder_is_reported(data):
    Path("data/test").rename("data/valid")
    Path("data/test").symlink_to("valid")
    (sentence,) = catalog.warnings("image_folder", "data")
    assert sentence.startswith("data: 4 test images are also in train/ or valid/ (test/ant/")


def test_classes_that_look_alike_are_reported(data):
    for part, name in itertools.product(("train", "test"), ("ant ", unicodedata.normalize("NFD", "é"), "é")):
        add(f"{part}/{name}/0.png")
    assert catalog.warnings("image_folder", "data")[:2] == [
        "data: classes 'ant' and 'ant ' differ only in blanks",
        r"data: classes 'e\u0301' and '\xe9' differ only in their Unicode form",
    ]


def test_classes_that_differ_in_case_are_counted_in_one_sentence(data):
    for part, name in itertools.product(("train", "test"), ("Ant", "Bee")):
        add(f"{part}/{name}/0.png")
    assert catalog.warnings("image_folder", "data")[0] == (
        "data: 2 pairs of classes, such as 'Ant' and 'ant', differ only in upper and lower case"
    )


def test_unbalanced_classes_are_reported(data):
    add(*(f"train/ant/{number}.png" for number in range(54)))
    assert catalog.warnings("image_folder", "data") == [
        "data: the classes are unbalanced: 60 training images of 'ant', but 6 of 'bee'"
    ]


def test_a_folder_without_usable_images_names_those_that_it_has(place):
    catalog.info.cache_clear()
    add("train/n01/images/0.JPEG", "train/n02/images/1.JPEG", "test/n01/0.JPEG")
    with pytest.raises(UserError, match="data/train has no images; .*; 2 images in folders inside class folders are n"):
        catalog.info("image_folder", "data")


@pytest.mark.parametrize(("there", "missing"), [("Train", "train"), ("training", "train"), ("val", "test")])
def test_a_missing_split_is_reported_with_the_folder_that_may_be_meant(data, there, missing):
    (data / missing).rename(data / there)
    with pytest.raises(UserError, match=f"data has no folder {missing}/; .*; to use {there}/ as {missing}/, rename it"):
        catalog.info("image_folder", "data")


def test_suffixes_of_any_case_and_links_to_images_and_folders_are_used(data):
    (data / "train/ant/0000.png").rename(data / "train/ant/0000.PNG")
    (data / "train/ant/link.JpEg").symlink_to("0001.png")
    (data / "train/bee").rename(data.parent / "bees")
    (data / "train/bee").symlink_to("../../bees", target_is_directory=True)
    assert catalog.info("image_folder", "data").train_size == 13
    assert catalog.warnings("image_folder", "data") == []


def test_a_file_that_is_too_large_to_be_an_image_is_not_read(data):
    with open(data / "train/ant/0000.png", "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"0000\.png: 1,048,576 MiB; expected an image of at most 64 MiB"):
        catalog.info("image_folder", "data")
