"""Data sets held in memory as uint8 images, and the loaders over them.

Images stay uint8 until ``Mixup`` normalises, mixes and casts a whole batch in one pass; a batch is
one indexing operation, never a list of samples collated in Python.
"""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from fastmp.mixup import Mixup
from fastmp.ops.loss import MixedTarget

__all__ = ["DATASETS", "DataError", "Dataset", "MixedTarget", "Mixup", "load", "loader", "read_idx"]


class DataError(ValueError):
    """A data set that is unknown, missing, corrupt or truncated; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels for training and testing, in memory.

    Images are uint8 of shape (N, C, H, W), labels int64 of shape (N,). ``mean`` and ``std`` are the
    training images' statistics per channel after scaling to [0, 1].
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


def load(name: str) -> Dataset:
    """The data set of that name, one of ``DATASETS``.

    Raises:
        DataError: an unknown name, or files that cannot be found, fetched or trusted.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; the known ones are {', '.join(DATASETS)}")
    return DATASETS[name]()


def loader(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (images, labels), with the dtypes they have here.

    With ``shuffle`` (training) the order comes from ``generator`` and a last partial batch is
    dropped, unless it is the only one; without (evaluation) every sample comes once, in order.

    Raises:
        ValueError: no samples, as many labels as images, or a batch size below 1.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"expected as many labels as images and at least one, got {len(images)} images "
            f"and {len(labels)} labels"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    samples = _Samples(images, labels)
    order: Sampler[int] = (
        RandomSampler(samples, generator=generator) if shuffle else SequentialSampler(samples)
    )
    batches = BatchSampler(order, batch_size, drop_last=shuffle and len(images) >= batch_size)
    # batch_size=None: the sampler hands whole lists of indices to the data set, nothing to collate
    return DataLoader(samples, sampler=batches, batch_size=None, generator=generator)


class _Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def _dataset(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
) -> Dataset:
    pixels = train[0].numpy().astype(np.float64) / 255
    mean, std = pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))
    return Dataset(name, *train, *test, tuple(mean.tolist()), tuple(std.tolist()), classes)


# ---- handwritten digits, from scikit-learn ----


def _digits() -> Dataset:
    """1,797 grey 8x8 images of digits; the same fifth of every class is always the test."""
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    rank = np.zeros(len(labels), dtype=np.int64)  # the how-manieth of its class, in shuffled order
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        rank[members] = np.arange(len(members))
    test = rank % 5 == 0
    parts = [
        (torch.from_numpy(scaled[part]), torch.from_numpy(labels[part].astype(np.int64)))
        for part in (~test, test)
    ]
    return _dataset("digits", parts[0], parts[1], tuple("0123456789"))


# ---- Fashion-MNIST (Zalando SE, MIT licence; Xiao et al. 2017, arXiv:1708.07747) ----


@dataclass(frozen=True)
class _IdxFile:
    name: str
    shape: tuple[int, ...]
    sha256: str  # of the unpacked contents: packagers compress again, the contents stay the same


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


def _fashion_mnist() -> Dataset:
    """60,000 training and 10,000 test images of clothes, 28x28 grey."""
    folder = _find_fashion_mnist()
    parts = {}
    for part, file in _FASHION_FILES.items():
        array = read_idx(_packed_or_not(folder, file.name), file.shape, file.sha256)
        parts[part] = torch.from_numpy(array)
    train = parts["train_images"].unsqueeze(1), parts["train_labels"].long()
    test = parts["test_images"].unsqueeze(1), parts["test_labels"].long()
    return _dataset("fashion-mnist", train, test, _FASHION_CLASSES)


def _find_fashion_mnist() -> Path:
    """The folder with the four files, downloading them into the cache if there is none."""
    given = os.environ.get("FASTMP_DATA")
    if given:
        folder = Path(given).expanduser() / "fashion-mnist"
        if not _complete(folder):
            raise DataError(
                f"FASTMP_DATA={given} was expected to hold fashion-mnist/ with the files "
                f"{_wanted()} (each also as .gz), but {_missing(folder)}; "
                "correct FASTMP_DATA, or unset it to have them downloaded"
            )
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = cache / "fastmp" / "fashion-mnist"
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
    """Download one file into ``folder``; it appears there whole and checked, or not at all."""
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
        "FASTMP_DATA at a folder that holds fashion-mnist/ with the four files"
    )


def _download(url: str, path: Path, limit: int) -> None:
    """Write what ``url`` gives to ``path``, with a progress bar. ``limit`` in bytes."""
    from tqdm import tqdm  # an optional dependency, needed on this path alone

    with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as out:
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
            while block := answer.read(1 << 16):
                out.write(block)
                bar.update(len(block))
                if bar.n > limit:
                    raise DataError(f"expected at most {limit} bytes, more came")


# ---- the IDX format: two zero bytes, a type code, the number of dimensions, the dimensions ----

_UINT8_CODE = 8


def _unpacked_size(shape: tuple[int, ...]) -> int:
    return 4 + 4 * len(shape) + math.prod(shape)


def read_idx(path: Path, shape: tuple[int, ...], sha256: str) -> np.ndarray:
    """The uint8 array of ``shape`` in the IDX file at ``path``, plain or gzip (by its ending).

    Never unpacks more than one byte beyond the expected size, so a gzip bomb stays small.

    Raises:
        DataError: missing, truncated, too long, not IDX, another shape, or another sum.
    """
    size = _unpacked_size(shape)
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, _UINT8_CODE, len(shape), *shape)
    try:
        with path.open("rb") as file:
            contents = _read_at_most(file, path.suffix == ".gz", size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _distrust(path, f"{size} bytes of IDX data", f"{error}") from error
    if contents[: len(header)] != header:
        found = f"it starts with {contents[: len(header)].hex(' ') or 'nothing'}"
        expected = f"a uint8 IDX file of shape {shape}, starting with {header.hex(' ')}"
        raise _distrust(path, expected, found)
    if len(contents) != size:
        found = f"there are {'more' if len(contents) > size else len(contents)}"
        raise _distrust(path, f"{size} bytes unpacked", found)
    found_sum = hashlib.sha256(contents).hexdigest()
    if found_sum != sha256:
        raise _distrust(path, f"contents with sha256 {sha256}", f"they have {found_sum}")
    return np.frombuffer(contents, np.uint8, offset=len(header)).reshape(shape).copy()


def _read_at_most(file: BinaryIO, packed: bool, limit: int) -> bytes:
    if not packed:
        return file.read(limit)
    with gzip.GzipFile(fileobj=file) as unpacked:
        return unpacked.read(limit)


def _distrust(path: Path, expected: str, found: str) -> DataError:
    return DataError(
        f"{path} cannot be used: expected {expected}, but {found}; "
        "delete the file to have it fetched again, or put a good copy in its place"
    )


#: Every data set, by the name ``load`` takes.
DATASETS: dict[str, Callable[[], Dataset]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}
