"""Fashion-MNIST (Zalando SE, MIT licence; Xiao et al. 2017, arXiv:1708.07747)."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import struct
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from fastmp.data.dataset import DataError, Dataset, in_memory
from fastmp.files import cache_dir


@dataclass(frozen=True)
class _IdxFile:
    name: str
    shape: tuple[int, ...]
    sha256: str  # of the unpacked contents: packages are recompressed, contents are equal


_FASHION_FILES = {
    "train_images": _IdxFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train_labels": _IdxFile(
        "train-labels-idx1-ubyte",
        (60000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test_images": _IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "test_labels": _IdxFile(
        "t10k-labels-idx1-ubyte",
        (10000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_URLS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
_SYSTEM_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),  # Debian: apt install dataset-fashion-mnist
    Path("/usr/share/datasets/fashion_mnist"),
)


def fashion_mnist() -> Dataset:
    """60,000 training and 10,000 test images of clothes, 28x28 grey."""
    folder = _find_fashion_mnist()
    parts = {}
    for part, file in _FASHION_FILES.items():
        array = read_idx(_packed_or_not(folder, file.name), file.shape, file.sha256)
        parts[part] = torch.from_numpy(array)
    train = parts["train_images"].unsqueeze(1), parts["train_labels"].long()
    test = parts["test_images"].unsqueeze(1), parts["test_labels"].long()
    return in_memory("fashion-mnist", train, test, _FASHION_CLASSES)


def _find_fashion_mnist() -> Path:
    """The folder with the four files; downloads them into the cache if no folder has them."""
    given = os.environ.get("FASTMP_DATA")
    if given:
        folder = Path(given).expanduser() / "fashion-mnist"
        if not _complete(folder):
            raise DataError(
                f"FASTMP_DATA={given}: expected fashion-mnist/ in it with the files {_wanted()} "
                f"(each also as .gz), but {_missing(folder)}; correct FASTMP_DATA, or unset it "
                "to download them"
            )
        return folder
    cached = cache_dir() / "fashion-mnist"
    for folder in (*_SYSTEM_FOLDERS, cached):
        if _complete(folder):
            return folder
    for file in _FASHION_FILES.values():
        if not _packed_or_not(cached, file.name).exists():
            _fetch(file, cached)
    return cached


def _packed_or_not(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _complete(folder: Path) -> bool:
    return all(_packed_or_not(folder, file.name).is_file() for file in _FASHION_FILES.values())


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    absent = [
        f.name for f in _FASHION_FILES.values() if not _packed_or_not(folder, f.name).exists()
    ]
    return f"{folder} lacks {', '.join(absent)}"


def _wanted() -> str:
    return ", ".join(file.name for file in _FASHION_FILES.values())


def _fetch(file: _IdxFile, folder: Path) -> None:
    """Download one file, check it and move it into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in (f"{base}{file.name}.gz" for base in _FASHION_URLS):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / f"{file.name}.gz"
            try:
                _download(url, part, limit=_unpacked_size(file.shape) + 1024)
                read_idx(part, file.shape, file.sha256)
            except (OSError, http.client.HTTPException, DataError) as error:
                failures.append(f"{url}: {error}")
                continue
            part.replace(folder / part.name)
            return
    raise DataError(
        f"{file.name} could not be downloaded ({'; '.join(failures)}); check the network, or point "
        "FASTMP_DATA at a folder with fashion-mnist/ and the four files in it"
    )


def _download(url: str, path: Path, limit: int) -> None:
    """Download ``url`` to ``path`` with a progress bar; ``limit`` is the largest size, in bytes."""
    from tqdm import tqdm  # an optional dependency, used for downloads only

    with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as out:
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
            while block := answer.read(1 << 16):
                out.write(block)
                bar.update(len(block))
                if bar.n > limit:
                    raise DataError(f"expected at most {limit} bytes, got more")


# ---- the IDX format: two zero bytes, a type code, the number of dimensions, the dimensions ----

_UINT8_CODE = 8


def _unpacked_size(shape: tuple[int, ...]) -> int:
    return 4 + 4 * len(shape) + math.prod(shape)


def read_idx(path: Path, shape: tuple[int, ...], sha256: str) -> np.ndarray:
    """The uint8 array of ``shape`` in the IDX file at ``path``, plain or gzip (by its ending).

    ``sha256`` is the hash of the unpacked file, in hexadecimal digits.

    At most one byte beyond the expected size is unpacked, so a gzip bomb stays small.

    Raises:
        DataError: a missing, truncated or too long file, no IDX, another shape or hash.
    """
    size = _unpacked_size(shape)
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, _UINT8_CODE, len(shape), *shape)
    try:
        with path.open("rb") as file:
            contents = _read_at_most(file, path.suffix == ".gz", size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt_error(path, f"{size} bytes of IDX data", f"{error}") from error
    if contents[: len(header)] != header:
        found = f"it starts with {contents[: len(header)].hex(' ') or 'nothing'}"
        expected = f"a uint8 IDX file of shape {shape}, starting with {header.hex(' ')}"
        raise _corrupt_error(path, expected, found)
    if len(contents) != size:
        found = f"there are {'more' if len(contents) > size else len(contents)}"
        raise _corrupt_error(path, f"{size} bytes unpacked", found)
    found_sum = hashlib.sha256(contents).hexdigest()
    if found_sum != sha256:
        raise _corrupt_error(path, f"contents with sha256 {sha256}", f"they have {found_sum}")
    return np.frombuffer(contents, np.uint8, offset=len(header)).reshape(shape).copy()


def _read_at_most(file: BinaryIO, packed: bool, limit: int) -> bytes:
    if not packed:
        return file.read(limit)
    with gzip.GzipFile(fileobj=file) as unpacked:
        return unpacked.read(limit)


def _corrupt_error(path: Path, expected: str, found: str) -> DataError:
    return DataError(
        f"{path} cannot be used: expected {expected}, but {found}; "
        "delete the file to download it again, or replace it with a good copy"
    )
