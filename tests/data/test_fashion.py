"""Fashion-MNIST: IDX files, their folders, the download; errors of broken files."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmp import data
from fastmp.data import DataError, fashion

SHAPE = (5, 4, 3)


def idx_bytes(array) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def read(path, contents, packed=False):
    path.write_bytes(gzip.compress(contents) if packed else contents)
    return data.read_idx(path, SHAPE, hashlib.sha256(contents).hexdigest())


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_idx_files_plain_and_packed(tmp_path, array, name):
    got = read(tmp_path / name, idx_bytes(array), packed=name.endswith(".gz"))
    assert got.dtype == np.uint8
    assert got.flags.writeable  # torch warns of read-only arrays
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], r"expected 76 bytes unpacked, but there are 75;"),
        (lambda b: b + b"x", r"expected 76 bytes unpacked, but there are more;"),
        (lambda b: b"", r"starting with 00 00 08 03 .* starts with nothing"),
        (lambda b: b[:3] + b"\x01" + b[4:], r"starts with 00 00 08 01"),
        (lambda b: b[:2] + b"\x0d" + b[3:], r"a uint8 IDX file of shape \(5, 4, 3\)"),
        (lambda b: b[:7] + b"\x06" + b[8:], r"starts with 00 00 08 03 00 00 00 06"),
    ],
)
def test_malformed_idx_files(tmp_path, array, name, change, message):
    path = tmp_path / name
    with pytest.raises(DataError, match=message) as error:
        read(path, change(idx_bytes(array)), packed=name.endswith(".gz"))
    assert str(path) in str(error.value)
    assert "delete the file" in str(error.value)


def test_a_changed_pixel_is_detected(tmp_path, array):
    path = tmp_path / "images"
    contents = idx_bytes(array)
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(DataError, match="expected contents with sha256"):
        data.read_idx(path, SHAPE, hashlib.sha256(contents).hexdigest())


def test_a_truncated_or_foreign_archive(tmp_path, array):
    packed = gzip.compress(idx_bytes(array))
    for contents in (packed[: len(packed) // 2], b"not gzip at all", packed[:40] + b"\0" * 40):
        path = tmp_path / "images.gz"
        path.write_bytes(contents)
        with pytest.raises(DataError, match=r"images.gz cannot be used: expected 76 bytes"):
            data.read_idx(path, SHAPE, "")


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        data.read_idx(tmp_path / "images", SHAPE, "")


def test_a_gzip_bomb_is_not_unpacked(tmp_path, array):
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(idx_bytes(array))
        for _ in range(64):
            out.write(bytes(1 << 20))
    before = peak_unpacked()
    with pytest.raises(DataError, match="there are more"):
        data.read_idx(path, SHAPE, "")
    assert peak_unpacked() - before < 16 << 20


def peak_unpacked() -> int:
    resource = pytest.importorskip("resource", reason="memory is measured on POSIX systems only")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- Fashion-MNIST ----


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A few random images in place of Fashion-MNIST, as .gz files in a folder."""
    random = np.random.default_rng(1)
    files, folder = {}, tmp_path / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, file in fashion._FASHION_FILES.items():
        shape = (6, *file.shape[1:])
        contents = idx_bytes(random.integers(0, 10, shape, dtype=np.uint8))
        files[part] = fashion._IdxFile(file.name, shape, hashlib.sha256(contents).hexdigest())
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(contents))
    monkeypatch.setattr(fashion, "_FASHION_FILES", files)
    monkeypatch.setattr(fashion, "_SYSTEM_FOLDERS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTMP_DATA", raising=False)
    return folder


def test_fastmp_data_is_read(miniature, monkeypatch):
    monkeypatch.setenv("FASTMP_DATA", str(miniature.parent))
    clothes = data.load("fashion-mnist")
    assert clothes.train.images.shape == (6, 1, 28, 28)
    assert clothes.test.labels.dtype == torch.int64
    assert len(clothes.classes) == 10


def test_files_missing_in_fastmp_data_are_named(miniature, monkeypatch):
    monkeypatch.setenv("FASTMP_DATA", str(miniature))
    with pytest.raises(DataError, match=r"FASTMP_DATA=.* there is no folder"):
        data.load("fashion-mnist")
    monkeypatch.setenv("FASTMP_DATA", str(miniature.parent))
    (miniature / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"lacks train-labels-idx1-ubyte; correct FASTMP_DATA"):
        data.load("fashion-mnist")


def test_the_system_folder_is_read_unpacked_too(miniature, monkeypatch):
    for packed in list(miniature.iterdir()):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    monkeypatch.setattr(fashion, "_SYSTEM_FOLDERS", (miniature,))
    assert len(data.load("fashion-mnist").train.labels) == 6


@pytest.fixture
def server(miniature):
    """The miniature over HTTP: two URLs, the first of them 404, and the requests."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(miniature), **kwargs)

        def log_message(self, *_):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{running.server_port}/"
        yield (f"{base}absent/", base), requests
        running.shutdown()


def test_the_files_are_downloaded_once_and_checked(server, miniature, monkeypatch, tmp_path):
    urls, requests = server
    monkeypatch.setattr(fashion, "_FASHION_URLS", urls)
    first = data.load("fashion-mnist")
    cached = tmp_path / "cache" / "fastmp" / "fashion-mnist"
    assert sorted(p.name for p in cached.iterdir()) == sorted(p.name for p in miniature.iterdir())
    count = len(requests)
    assert torch.equal(data.load("fashion-mnist").train.images, first.train.images)
    assert len(requests) == count


def test_a_bad_download_leaves_no_file(server, miniature, monkeypatch, tmp_path):
    monkeypatch.setattr(fashion, "_FASHION_URLS", server[0])
    name = "train-images-idx3-ubyte"
    (miniature / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=rf"{name} could not be downloaded .*404.*starts with"):
        data.load("fashion-mnist")
    assert list((tmp_path / "cache" / "fastmp" / "fashion-mnist").iterdir()) == []
    (miniature / f"{name}.gz").write_bytes(os.urandom(1 << 16))
    with pytest.raises(DataError, match=r"expected at most 5744 bytes, got more"):
        data.load("fashion-mnist")


def test_the_real_files(monkeypatch):
    folder = os.environ.get("FASTMP_DATA") or Path(__file__).parents[3] / "shared" / "data"
    if not (Path(folder) / "fashion-mnist").is_dir():
        pytest.skip("no Fashion-MNIST: set FASTMP_DATA to the folder with fashion-mnist/")
    monkeypatch.setenv("FASTMP_DATA", str(folder))
    clothes = data.load("fashion-mnist")
    assert clothes.train.images.shape == (60000, 1, 28, 28)
    assert torch.bincount(clothes.train.labels).tolist() == [6000] * 10
    assert torch.bincount(clothes.test.labels).tolist() == [1000] * 10
    assert clothes.mean == pytest.approx([0.2860], abs=1e-4)
    assert clothes.std == pytest.approx([0.3530], abs=1e-4)
