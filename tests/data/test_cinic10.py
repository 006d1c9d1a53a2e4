import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from lth_diet.data import catalog, cinic10
from lth_diet.errors import UserError

CLASSES = ("airplane", "truck")


@pytest.fixture
def official(place, monkeypatch):
    """Bytes of a small archive in the official layout, whose MD5 counts as the official one."""
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for part in ("valid", "train", "test"):
            for label in reversed(CLASSES):
                for index in (1, 0):
                    png = io.BytesIO()
                    Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(png, "PNG")
                    member = tarfile.TarInfo(f"./{part}/{label}/{label}-{index}.png")
                    member.size = len(png.getvalue())
                    tar.addfile(member, io.BytesIO(png.getvalue()))
        readme = tarfile.TarInfo("./README.md")
        tar.addfile(readme, io.BytesIO())
    content = buffer.getvalue()
    monkeypatch.setattr(cinic10, "MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    return content


@pytest.fixture
def server(official, monkeypatch):
    """Serve the archive on loopback, breaking the connection halfway for the first `breaks` requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        requested = []  # noqa: RUF012
        breaks = 2
        supports_ranges = True

        def do_GET(self):
            requested = self.headers.get("Range")
            Handler.requested.append(requested)
            partial = requested and Handler.supports_ranges
            start = int(requested.removeprefix("bytes=").removesuffix("-")) if partial else 0
            rest = official[start:]
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if len(Handler.requested) <= Handler.breaks:
                rest = rest[: len(rest) // 2]
            self.wfile.write(rest)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(cinic10, "URL", f"http://127.0.0.1:{httpd.server_address[1]}/CINIC-10.tar.gz")
    yield Handler
    httpd.shutdown()
    httpd.server_close()


def test_broken_download_resumes_where_it_stopped(server, official, place):
    path = cinic10.archive(place / "data")
    assert path.read_bytes() == official
    first, second, third = server.requested
    assert first is None
    assert 0 < int(second[6:-1]) < int(third[6:-1]) < len(official)
    assert not list((place / "data").glob("*.part"))


def test_partial_download_of_an_earlier_process_is_resumed(server, official, place):
    server.breaks = 0
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz.part").write_bytes(official[:100])
    assert cinic10.archive(place / "data").read_bytes() == official
    assert server.requested == ["bytes=100-"]


def test_download_restarts_if_the_server_does_not_support_ranges(server, official, place):
    server.supports_ranges, server.breaks = False, 1
    assert cinic10.archive(place / "data").read_bytes() == official


@pytest.mark.parametrize("modify", [lambda b: b[:-10], lambda b: b[:50] + b"x" + b[51:]])
def test_incomplete_or_modified_archive_raises_with_its_path(official, place, modify):
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz").write_bytes(modify(official))
    with pytest.raises(UserError, match=r"data/CINIC-10\.tar\.gz: incomplete or modified, its MD5 is"):
        catalog.load("cinic10", "data")


def test_unreachable_source_raises(official, place, monkeypatch):
    monkeypatch.setattr(cinic10, "URL", "http://127.0.0.1:9/CINIC-10.tar.gz")
    with pytest.raises(UserError, match=r"data': CINIC-10\.tar\.gz is missing and its download from .* failed"):
        cinic10.archive(place / "data")


def test_train_and_valid_are_merged_and_classes_are_numbered_by_name(official, place):
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz").write_bytes(official)
    data = catalog.load("cinic10", "data")
    assert data.train.images.shape == (8, 32, 32, 3) and data.test.images.shape == (4, 32, 32, 3)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert data.class_names == CLASSES
    assert data.mean == (0.4789, 0.4723, 0.4305) and data.std == (0.2421, 0.2383, 0.2587)
    with tarfile.open(place / "data/CINIC-10.tar.gz") as tar:
        names = [f"./{p}/{c}/{c}-{i}.png" for p in ("train", "valid") for c in CLASSES for i in (0, 1)]
        expected = np.stack([np.asarray(Image.open(tar.extractfile(name))) for name in names])
    assert np.array_equal(data.train.images, expected)


def test_the_size_is_that_of_the_official_dataset():
    assert catalog.info("cinic10", "data").train_size == 180_000


def make_archive(*members):
    """Return the bytes of an archive with members (name, type, content or link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
            else:
                member.linkname = content
            tar.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()


def png(size=(32, 32)):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


GOOD = [(f"{part}/ant/0.png", tarfile.REGTYPE, png()) for part in ("train", "valid", "test")]


def load_as_official(place, monkeypatch, content):
    """Load an archive as if it were the official one and check that no files are created."""
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz").write_bytes(content)
    monkeypatch.setattr(cinic10, "MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setenv("LTH_DIET_CACHE", str(place.parent / "cache"))
    before = set(place.rglob("*"))
    try:
        return catalog.load("cinic10", "data")
    finally:
        assert set(place.rglob("*")) == before
        assert not list(place.parent.rglob("trap*"))


HARMLESS = {
    "paths outside the folder": [("../../trap.png", tarfile.REGTYPE, png()), ("/tmp/trap.png", tarfile.REGTYPE, png())],
    "links": [
        ("train/ant/1.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("train/ant/2.png", tarfile.LNKTYPE, "/etc/passwd"),
        ("train/bee", tarfile.SYMTYPE, "../../trap"),
    ],
    "devices": [("train/ant/1.png", tarfile.CHRTYPE, ""), ("train/ant/2.png", tarfile.FIFOTYPE, "")],
    "a device with the name of an image": [("train/ant/0.png", tarfile.CHRTYPE, "")],
    "a link with the name of an image": [("train/ant/0.png", tarfile.SYMTYPE, "/etc/passwd")],
    "an image twice": [("train/ant/0.png", tarfile.REGTYPE, png())],
}


@pytest.mark.parametrize("case", HARMLESS)
def test_only_images_of_a_hostile_archive_are_read_and_nothing_is_unpacked(place, monkeypatch, case):
    data = load_as_official(place, monkeypatch, make_archive(*GOOD, *HARMLESS[case]))
    assert data.train.images.shape == (2, 32, 32, 3) and (data.train.images == (255, 0, 0)).all()


REJECTED = {
    "an image of another size": png((31, 32)),
    "an image of one pixel": png((1, 1)),
    "text": b"hello",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n",
    "nothing": b"",
}


@pytest.mark.parametrize("case", REJECTED)
def test_archive_with_an_invalid_image_raises(place, monkeypatch, case):
    content = make_archive(*GOOD, ("train/ant/1.png", tarfile.REGTYPE, REJECTED[case]))
    with pytest.raises(UserError, match=r"CINIC-10\.tar\.gz: not the CINIC-10 archive \("):
        load_as_official(place, monkeypatch, content)


INVALID_ARCHIVES = {"nothing": b"", "text": b"hello", "half": make_archive(*GOOD)[:100], "no images": make_archive()}


@pytest.mark.parametrize("content", INVALID_ARCHIVES.values(), ids=INVALID_ARCHIVES)
def test_invalid_or_incomplete_archive_raises(place, monkeypatch, content):
    with pytest.raises(UserError, match=r"CINIC-10\.tar\.gz: not the CINIC-10 archive \("):
        load_as_official(place, monkeypatch, content)
