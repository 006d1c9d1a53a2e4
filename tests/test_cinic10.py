import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from lth_diet import cinic10, datasets
from lth_diet.errors import UserError

CLASSES = ("airplane", "truck")


@pytest.fixture
def official(place, monkeypatch):
    """A small archive in the official layout; its bytes."""
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
    """Serves the archive on loopback and breaks the connection half-way, the first `breaks` times."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = []  # noqa: RUF012
        breaks = 2
        ranges = True

        def do_GET(self):
            asked = self.headers.get("Range")
            Handler.asked.append(asked)
            begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and Handler.ranges else 0
            rest = official[begin:]
            self.send_response(206 if asked and Handler.ranges else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if len(Handler.asked) <= Handler.breaks:
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


def test_a_broken_download_goes_on_where_it_broke(server, official, place):
    path = cinic10.archive(place / "data")
    assert path.read_bytes() == official
    first, second, third = server.asked
    assert first is None
    assert 0 < int(second[6:-1]) < int(third[6:-1]) < len(official)
    assert not list((place / "data").glob("*.part"))


def test_a_download_of_an_earlier_process_is_continued(server, official, place):
    server.breaks = 0
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz.part").write_bytes(official[:100])
    assert cinic10.archive(place / "data").read_bytes() == official
    assert server.asked == ["bytes=100-"]


def test_a_server_that_cannot_resume_sends_all_again(server, official, place):
    server.ranges, server.breaks = False, 1
    assert cinic10.archive(place / "data").read_bytes() == official


@pytest.mark.parametrize("alter", [lambda b: b[:-10], lambda b: b[:50] + b"x" + b[51:]])
def test_a_partial_or_altered_archive_is_refused_by_name(official, place, alter):
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz").write_bytes(alter(official))
    with pytest.raises(UserError, match=r"data/CINIC-10\.tar\.gz: partial or altered, its md5 is"):
        datasets.load("cinic10", "data")


def test_an_unreachable_source_is_one_sentence(official, place, monkeypatch):
    monkeypatch.setattr(cinic10, "URL", "http://127.0.0.1:9/CINIC-10.tar.gz")
    with pytest.raises(UserError, match=r"data does not hold CINIC-10\.tar\.gz and .* cannot be downloaded"):
        cinic10.archive(place / "data")


def test_train_and_valid_are_merged_and_classes_are_numbered_by_name(official, place):
    (place / "data").mkdir()
    (place / "data/CINIC-10.tar.gz").write_bytes(official)
    data = datasets.load("cinic10", "data")
    assert data.train.images.shape == (8, 32, 32, 3) and data.test.images.shape == (4, 32, 32, 3)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert data.class_names == CLASSES
    assert data.mean == (0.4789, 0.4723, 0.4305) and data.std == (0.2421, 0.2383, 0.2587)
    with tarfile.open(place / "data/CINIC-10.tar.gz") as tar:
        names = [f"./{p}/{c}/{c}-{i}.png" for p in ("train", "valid") for c in CLASSES for i in (0, 1)]
        expected = np.stack([np.asarray(Image.open(tar.extractfile(name))) for name in names])
    assert np.array_equal(data.train.images, expected)


def test_the_sizes_are_those_of_the_official_data_set():
    facts = datasets.facts("cinic10", "data")
    assert (facts.train_size, facts.test_size, facts.classes) == (180_000, 90_000, 10)
