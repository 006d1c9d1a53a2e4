import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import write_image_folder
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from lth_diet.data import catalog, image_folder
from lth_diet.errors import UserError
from lth_diet.files import read_json, sha256, write_json


@pytest.fixture(autouse=True)
def empty_cache(place, monkeypatch):
    """Give every test an empty cache."""
    monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    catalog.info.cache_clear()
    catalog._prepared.clear()


def test_digits_are_split_into_1442_and_355_stratified_and_the_same_every_time():
    digits = catalog.load("digits", "unused")
    assert digits.train.images.shape == (1442, 8, 8, 1) and digits.test.images.shape == (355, 8, 8, 1)
    assert len(digits.class_names) == 10
    assert catalog.info("digits", "unused").train_size == 1442
    share = np.bincount(digits.test.labels) / np.bincount(np.concatenate([digits.train.labels, digits.test.labels]))
    assert np.all(np.abs(share - 0.2) < 0.01)
    assert digits.train.images.max() == 255
    assert hashlib.sha256(digits.train.labels.tobytes()).hexdigest()[:16] == "9313721fa010b406"
    assert not digits.flip


def test_mean_and_std_are_computed_from_the_training_images():
    digits = catalog.load("digits", "unused")
    pixels = digits.train.images / 255
    assert digits.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist())
    assert digits.std == pytest.approx(pixels.std((0, 1, 2)).tolist())


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
        ("cifar100", (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
        ("cinic10", (0.47889522, 0.47227842, 0.43047404), (0.24205776, 0.23828046, 0.25874835)),  # README of CINIC-10
    ],
)
def test_known_mean_and_std_are_the_published_ones(name, mean, std):
    assert catalog._STATISTICS[name] == (pytest.approx(mean, abs=5.1e-5), pytest.approx(std, abs=5.1e-5))


def test_images_are_memory_mapped_uint8_and_labels_int64():
    digits = catalog.load("digits", "unused")
    assert isinstance(digits.train.images, np.memmap) and digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int64


def test_all_callers_share_the_arrays_until_the_cache_is_replaced(place):
    first, second = catalog.load("digits", "unused"), catalog.load("digits", "unused")
    assert first.train.images is second.train.images and first.test.labels is second.test.labels
    shutil.rmtree(place / "cache/digits")
    catalog.prepare("digits", "unused")
    third = catalog.load("digits", "unused")
    assert third.train.images is not first.train.images
    assert np.array_equal(third.train.images, first.train.images)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_image_folder_is_read_in_class_and_name_order_with_valid_merged_into_train(place, suffix):
    root = write_image_folder(place / "data", {"train": 3, "valid": 2, "test": 1}, suffix=suffix)
    data = catalog.load("image_folder", str(root))
    paths = [p for part in ("train", "valid") for p in sorted((root / part).glob(f"*/*{suffix}"))]
    expected = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert np.array_equal(data.train.images, expected)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [0, 1]
    assert data.class_names == ("ant", "bee")
    assert catalog.info("image_folder", str(root)).train_size == 10


def test_grayscale_images_have_one_channel(place):
    root = write_image_folder(place / "data")
    for path in root.glob("*/*/*.png"):
        Image.open(path).convert("L").save(path)
    assert catalog.load("image_folder", str(root)).train.images.shape[-1] == 1


def fingerprint(root):
    catalog.info.cache_clear()
    return catalog.info("image_folder", str(root)).fingerprint


def replace(path, image):
    """Write another image of the same size in bytes and with the same modification time, in place."""
    status = path.stat()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with open(path, "r+b") as file:
        file.write(buffer.getvalue().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_fingerprint_depends_on_names_and_contents_and_not_on_the_root_or_times(place):
    roots = [write_image_folder(place / name) for name in "ab"]
    os.utime(roots[1] / "train/ant/0000.png", (0, 0))
    first = fingerprint(roots[0])
    assert fingerprint(roots[1]) == first
    path = roots[1] / "train/ant/0000.png"
    path.rename(path.with_name("9999.png"))
    assert fingerprint(roots[1]) != first
    path.with_name("9999.png").rename(path)
    assert fingerprint(roots[1]) == first
    replace(path, Image.new("RGB", (8, 8)))
    assert fingerprint(roots[1]) != first


def test_a_new_version_of_the_decoder_changes_the_fingerprint(place, monkeypatch):
    root = write_image_folder(place / "data")
    first = fingerprint(root)
    monkeypatch.setattr(image_folder, "DECODER_VERSION", 3)
    assert fingerprint(root) != first


def test_the_old_fingerprint_is_the_one_of_earlier_versions(place):
    root = write_image_folder(place / "data")
    files = [f"{path.relative_to(root)} {path.stat().st_size}" for path in sorted(root.glob("train/*/*"))]
    files += [f"{path.relative_to(root)} {path.stat().st_size}" for path in sorted(root.glob("test/*/*"))]
    expected = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    assert catalog.info("image_folder", str(root)).old_fingerprint == expected


def test_an_image_replaced_with_the_same_size_and_time_is_decoded_again(place):
    root = write_image_folder(place / "data")
    before = catalog.load("image_folder", str(root)).train.images.copy()
    replace(root / "train/ant/0000.png", Image.fromarray(before[0] // 2))
    catalog.info.cache_clear()
    after = catalog.load("image_folder", str(root)).train.images
    assert np.array_equal(after[0], before[0] // 2) and np.array_equal(after[1:], before[1:])


def test_an_image_that_changes_while_the_images_are_read_raises(place):
    root = write_image_folder(place / "data")
    catalog.info("image_folder", str(root))
    replace(root / "train/ant/0000.png", Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match=r"ant/0000\.png changed while the images were read; rerun the command"):
        catalog.load("image_folder", str(root))


def test_changes_since_an_earlier_state_are_counted_and_named(place):
    root = write_image_folder(place / "data")
    catalog.load("image_folder", str(root))
    (first,) = catalog.cached_fingerprints()
    for name in ("0001", "0002"):
        replace(root / f"train/ant/{name}.png", Image.new("RGB", (8, 8)))
    (root / "test/ant/0000.png").rename(root / "test/ant/new.png")
    catalog.info.cache_clear()
    assert catalog.changes_since(first, str(root)) == (
        "2 changed (such as train/ant/0001.png), 1 added (test/ant/new.png), 1 removed (test/ant/0000.png)"
    )
    write_image_folder(place / "other", seed=1)
    assert catalog.changes_since(first, str(place / "other")) is None


def write_cifar(root, cls, monkeypatch, count=20):
    """Write a small dataset in torchvision's layout and set the checksums that torchvision expects."""
    fine = cls is CIFAR100
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for listing in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(cls, listing):
            images = random.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = random.integers(0, 100 if fine else 10, count).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels" if fine else "labels": labels}))
            entries.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
        monkeypatch.setattr(cls, listing, entries)
    names = {cls.meta["key"]: [f"class {i}" for i in range(100 if fine else 10)]}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(names))
    md5 = hashlib.md5((folder / cls.meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    return folder


@pytest.mark.parametrize(("name", "cls", "files"), [("cifar10", CIFAR10, 5), ("cifar100", CIFAR100, 1)])
def test_cifar_is_read_from_the_official_layout(place, monkeypatch, name, cls, files):
    write_cifar(place / "data", cls, monkeypatch)
    data = catalog.load(name, "data")
    expected = cls("data", train=True)
    assert data.train.images.shape == (20 * files, 32, 32, 3)
    assert np.array_equal(data.train.images, expected.data)
    assert data.train.labels.tolist() == expected.targets
    assert np.array_equal(data.test.images, cls("data", train=False).data)
    assert data.test.labels.tolist() == cls("data", train=False).targets
    assert (data.mean, data.std) == catalog._STATISTICS[name]
    assert len(data.class_names) == (10 if name == "cifar10" else 100)
    assert data.flip


def test_modified_cifar_file_is_not_unpickled(place, monkeypatch):
    folder = write_cifar(place / "data", CIFAR10, monkeypatch)
    trap = b"cos\nmkdir\n(S'trap'\ntR."
    (folder / "data_batch_2").write_bytes(trap)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing-is-here.tar.gz")
    with pytest.raises(UserError, match="dataset.root = 'data': CIFAR10 is missing and its download failed"):
        catalog.load("cifar10", "data")
    assert not (place / "trap").exists()
    assert not (place / "cache" / "cifar10").exists()


def test_failed_download_leaves_no_folder(place, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing-is-here.tar.gz")
    with pytest.raises(UserError, match="its download failed"):
        catalog.load("cifar10", "data")
    assert not (place / "data").exists()


def test_concurrent_processes_build_the_cache_once(place):
    root = write_image_folder(place / "data", {"train": 200, "test": 20})
    script = (
        "import sys; from lth_diet.data import catalog, image_folder\n"
        "real = image_folder.decode\n"
        "def counted(root, images, size):\n"
        "    open(sys.argv[2], 'a').write('built\\n')\n"
        "    return real(root, images, size)\n"
        "image_folder.decode = counted\n"
        "print(catalog.load('image_folder', sys.argv[1]).train.images.sum())"
    )
    command = [sys.executable, "-c", script, str(root), str(place / "builds")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    sums = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(sums) == 1
    assert (place / "builds").read_text() == "built\n"


def test_partial_cache_of_a_killed_process_is_removed(place):
    root = write_image_folder(place / "data")
    folder = catalog._cache_folder("image_folder", str(root), None)
    stale = folder.with_name(f"{folder.name}.part-99999")
    stale.mkdir(parents=True)
    catalog.load("image_folder", str(root))
    assert folder.exists() and not stale.exists()


def test_image_folder_without_train_raises(place):
    with pytest.raises(
        UserError, match=r"nowhere does not exist; expected a folder with train/<class>/ and test/<class>/"
    ):
        catalog.info("image_folder", "nowhere")


def test_image_folder_without_images_raises(place):
    (place / "data/train/ant").mkdir(parents=True)
    with pytest.raises(UserError, match="has no images"):
        catalog.info("image_folder", "data")


def test_class_in_only_one_of_train_and_test_raises(place):
    root = write_image_folder(place / "data")
    (root / "test/bee").rename(root / "test/wasp")
    with pytest.raises(
        UserError, match="class 'bee' only in train/, class 'wasp' only in test/; expected the same classes"
    ):
        catalog.info("image_folder", str(root))


def test_image_of_another_size_raises_with_its_path_and_nothing_is_cached(place):
    root = write_image_folder(place / "data")
    Image.new("RGB", (9, 8)).save(root / "train/bee/0001.png")
    with pytest.raises(UserError, match=r"bee/0001\.png: 9 x 8 pixels, color; expected 8 x 8 pixels, color"):
        catalog.load("image_folder", str(root))
    assert not list((place / "cache").glob("*/*.npy"))


@pytest.mark.parametrize("name", ["train_x.npy", "test_y.npy", "about.json"])
def test_a_damaged_cache_is_rebuilt_and_every_process_of_the_launch_is_told(place, name):
    before = catalog.load("digits", "unused").train.images.copy()
    path = place / "cache/digits" / name
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    reason = "" if name == "about.json" else f" (the checksum of {name} is wrong)"
    for _ in range(2):
        warning = catalog.prepare("digits", "unused", "launch")
        assert warning == f"the cache {place}/cache/digits is damaged{reason}; it was rebuilt"
    assert path.read_bytes() == content
    assert np.array_equal(catalog.load("digits", "unused").train.images, before)
    assert catalog.prepare("digits", "unused", "next launch") is None
    assert {path.name for path in (place / "cache").iterdir()} == {"digits", "digits.lock", "digits.verified"}


def test_a_cache_without_checksums_is_rebuilt(place, capfd):
    expected = catalog.load("digits", "unused").train.images.copy()
    folder = place / "cache/digits"
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps({key: about[key] for key in ("mean", "std", "class_names")}))
    np.save(folder / "train_x.npy", np.zeros_like(expected))
    catalog._prepared.clear()
    assert np.array_equal(catalog.load("digits", "unused").train.images, expected)
    assert capfd.readouterr().err == f"warning: the cache {folder} has no checksums; it was rebuilt\n"


def test_a_damaged_cache_whose_data_is_gone_is_reported_with_both(place):
    root = write_image_folder(place / "data")
    catalog.load("image_folder", "data")
    (array,) = (place / "cache").glob("*/train_x.npy")
    array.write_bytes(b"")
    shutil.move(root / "train/ant/0000.png", place)
    with pytest.raises(
        UserError, match=r"image_folder-\w+ is damaged .* and cannot be rebuilt: .*0000.png cannot be read"
    ):
        catalog.prepare("image_folder", "data")


def test_a_cache_is_verified_once_per_launch_and_once_by_a_process_without_launch(monkeypatch):
    catalog.load("digits", "unused")
    hashed = []
    original = catalog.sha256
    monkeypatch.setattr(catalog, "sha256", lambda path: hashed.append(path.name) or original(path))
    for launch, count in (("1", 4), ("1", 4), ("2", 8), ("2", 8)):
        catalog.prepare("digits", "unused", launch)
        catalog.load("digits", "unused")
        assert len(hashed) == count
    catalog._prepared.clear()  # as in a new process
    catalog.load("digits", "unused")
    catalog.load("digits", "unused")
    assert len(hashed) == 12


def test_a_whole_cache_that_cannot_be_written_is_used(monkeypatch):
    catalog.load("digits", "unused")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(catalog, "FileLock", refuse)
    assert catalog.prepare("digits", "unused", "launch") is None


def test_a_cache_with_other_content_and_right_checksums_raises(place):
    catalog.load("digits", "unused")
    folder = place / "cache/digits"
    np.save(folder / "train_x.npy", np.array([{"a": "b"}], object), allow_pickle=True)
    about = read_json(folder / "about.json")
    write_json(folder / "about.json", about | {"sha256": {name: sha256(folder / name) for name in about["sha256"]}})
    with pytest.raises(UserError, match="cache/digits is damaged; expected the cache of digits; delete it to rebuild"):
        catalog.load("digits", "unused")


def test_damaged_image_raises_with_its_path(place):
    root = write_image_folder(place / "data")
    (root / "test/ant/0000.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"test/ant/0000\.png: not a readable image"):
        catalog.load("image_folder", str(root))


def test_16_bit_image_raises_with_its_path(place):
    root = write_image_folder(place / "data")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(root / "train/bee/0001.png")
    with pytest.raises(UserError, match=r"bee/0001\.png: pixels of mode I;16; expected 8 bits per channel"):
        catalog.load("image_folder", str(root))


def test_image_folder_with_one_class_raises(place):
    root = write_image_folder(place / "data")
    for part in ("train", "test"):
        shutil.rmtree(root / part / "bee")
    with pytest.raises(UserError, match="data has only one class, 'ant'; expected at least two"):
        catalog.info("image_folder", str(root))


def test_dangling_link_raises_with_its_path(place):
    root = write_image_folder(place / "data")
    (root / "train/ant/0009.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"ant/0009\.png cannot be read \(No such file or directory\)"):
        catalog.info("image_folder", str(root))


def test_file_name_that_is_not_utf_8_is_accepted(place):
    root = write_image_folder(place / "data")
    (root / "train/ant/0000.png").rename(root / "train/ant" / os.fsdecode(b"\xff.png"))
    assert catalog.info("image_folder", str(root)).train_size == 12
    assert len(catalog.load("image_folder", str(root)).train.images) == 12


def test_cache_that_cannot_be_written_raises(monkeypatch):
    monkeypatch.setenv("LTH_DIET_CACHE", "/proc/nope")
    with pytest.raises(UserError, match="/proc/nope/digits: the cache of digits cannot be written"):
        catalog.load("digits", "unused")


def test_images_of_different_sizes_need_a_size(place):
    write_image_folder(place / "data", {"train": 2, "test": 1}, shape=(8, 12))
    Image.new("RGB", (20, 9), "red").save("data/train/ant/red.png")
    catalog.info.cache_clear()
    with pytest.raises(
        UserError, match="red.png: 20 x 9 pixels, color; expected 12 x 8 .*; set dataset.size=32 to scale"
    ):
        catalog.load("image_folder", "data")
    data = catalog.load("image_folder", "data", 6)
    assert data.train.images.shape == (5, 6, 6, 3) and data.test.images.shape == (2, 6, 6, 3)
    assert np.allclose(data.mean, data.train.images.mean((0, 1, 2)) / 255)


def test_every_dataset_can_be_scaled_and_each_size_has_a_cache_of_its_own():
    digits, scaled = catalog.load("digits", "unused"), catalog.load("digits", "unused", 4)
    means = digits.train.images.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
    assert scaled.train.images.shape == means.shape and np.abs(scaled.train.images - means).max() <= 1
    assert np.array_equal(scaled.train.labels, digits.train.labels)
    assert scaled.mean[0] == pytest.approx(scaled.train.images.mean() / 255) and scaled.std != digits.std
