"""Image files: splits, crops, random numbers, errors."""

from __future__ import annotations

import random
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from fastmp import data
from fastmp.data import DataError
from fastmp.data.files import Images, opened
from tests.data.image_cases import picture, write


def test_a_folder_with_training_and_validation(tmp_path):
    dataset = data.load(str(write(tmp_path, ("train", "val"))))
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test)) == (8, 8)
    assert dataset.shape == (3, 16, 16)  # the shorter side of the first image
    images, labels = dataset.test.batch([0, 7])
    assert labels.tolist() == [0, 1]
    middle = np.asarray(picture(200))[:, 4:20]
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), middle)
    whole = torch.stack([dataset.train.batch([i])[0][0] for i in range(8)]).double() / 255
    torch.testing.assert_close(torch.tensor(dataset.mean).double(), whole.mean((0, 2, 3)))
    torch.testing.assert_close(
        torch.tensor(dataset.std).double(), whole.std((0, 2, 3), correction=0)
    )


def test_a_folder_of_classes_is_split(tmp_path):
    write(tmp_path, (".",), per_class=20, mode="L")
    dataset = data.load(str(tmp_path), image_size=8, warn=False)
    assert (len(dataset.train), len(dataset.test)) == (36, 4)
    assert dataset.shape == (1, 8, 8)
    assert torch.bincount(dataset.test.labels).tolist() == [2, 2]
    tested = dataset.test.batch(range(4))[0]
    trained = dataset.train.batch(range(36))[0]
    assert not any(torch.equal(a, b) for a in tested for b in trained)


def test_crops_are_a_function_of_seed_and_index(tmp_path):
    source = data.load(str(write(tmp_path, ("train", "val")))).train
    one, _ = source.batch([3, 5], seed=1)
    two, _ = source.batch([5], seed=1)
    assert torch.equal(one[1], two[0])  # independent of the rest of the batch
    assert not torch.equal(one, source.batch([3, 5], seed=2)[0])
    assert not torch.equal(one, source.batch([3, 5])[0])


def test_worker_processes_change_nothing(tmp_path):
    source = data.load(str(write(tmp_path, ("train", "val")))).train
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batches = []
    for workers in (0, 2):
        loader = data.loader(source, 3, shuffle=True, seed=4, workers=workers)
        loader.set_epoch(2)
        loader.start_at(1)
        batches.append(list(loader))
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run must not draw another seed
    (one,), (two,) = batches
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_a_file_that_is_no_image(tmp_path):
    write(tmp_path, ("train", "val"))
    bad = tmp_path / "train" / "dog" / "003.png"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"003\.png cannot be read: expected an image"):
        data.load(str(tmp_path))
    whole = (tmp_path / "train" / "cat" / "000.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"003\.png cannot be read.*replace it or leave it out"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("side", [12_000, 20_000])
@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_that_decodes_to_gigabytes_is_refused_before_decoding(tmp_path, side):
    """A PNG header with side x side pixels; pillow itself refuses the larger one."""
    write(tmp_path, ("train", "val"))
    bad = tmp_path / "train" / "dog" / "003.png"
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bad.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
        + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )  # fmt: skip
    with pytest.raises(DataError, match=r"003\.png cannot be read: .*pixels.*leave it out"):
        data.load(str(tmp_path))


def damaged(whole, rng):
    """Cut, or with bytes exchanged in the header or anywhere."""
    if rng.random() < 0.3:
        return whole[: rng.randrange(len(whole))]
    bytes_ = bytearray(whole)
    for _ in range(rng.choice([1, 3, 20])):
        bytes_[rng.randrange(min(rng.choice([40, 200, 9999]), len(whole)))] = rng.choice(
            [0, 1, 127, 255, rng.randrange(256)]
        )
    return bytes(bytes_)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Image size")
def test_whatever_a_decoder_raises_names_the_file(tmp_path):
    """Pillow's decoders raise OSError, SyntaxError, ValueError, RuntimeError and more."""
    rng, raised = random.Random(0), {}
    path = tmp_path / "x.png"
    source = Images(lambda _: (opened(str(path), "x.png"), "x.png"), torch.tensor([0]), (3, 16, 16))
    for kind in ("PNG", "PPM", "TIFF", "DDS", "SGI", "JPEG", "GIF"):
        picture(1, size=(32, 32)).save(path, kind)
        whole = path.read_bytes()
        for broken in (b"", *(damaged(whole, rng) for _ in range(30))):
            path.write_bytes(broken)
            try:
                source.batch([0])
            except DataError as error:
                raised.setdefault(type(error.__cause__), str(error))
    assert ValueError in raised
    assert len(raised) >= 3
    for message in raised.values():
        assert message.startswith("x.png cannot be read: expected an image, got: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_in_the_middle_of_an_epoch(tmp_path, workers):
    write(tmp_path, ("train", "val"))
    source = data.load(str(tmp_path)).train
    (tmp_path / "train" / "dog" / "003.png").write_bytes(b"P5 4 4 0 ")  # a ValueError of Pillow's
    with pytest.raises(DataError, match=r"dog/003\.png cannot be read: .*; replace it or") as error:
        list(data.loader(source, 2, shuffle=True, workers=workers))
    assert "\n" not in str(error.value)  # the worker's traceback


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="expected one subfolder per class with images"):
        data.load(str(tmp_path))
    write(tmp_path, ("train", "val"))
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(DataError, match=r"has classes without images in .*train: cow"):
        data.load(str(tmp_path))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    write(tmp_path, ("train", "val"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fastmp\[data\]'"):
        data.load("hf:anything")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'fastmp\[data\]'"):
        data.load(str(tmp_path))
