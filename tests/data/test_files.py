"""Image files and Hugging Face data sets: splits, crops, random numbers, errors."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from fastmp import data
from fastmp.data import DataError

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed: no image files")


def picture(seed, size=(24, 16), mode="RGB"):
    """Random pixels, so that no two crops are equal."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder, parts, per_class=4, **options):
    for number, (part, name) in enumerate((p, c) for p in parts for c in ("cat", "dog")):
        target = folder / part / name
        target.mkdir(parents=True)
        for i in range(per_class):
            picture(100 * number + i, **options).save(target / f"{i:03}.png")
    return folder


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
    dataset = data.load(str(tmp_path), image_size=8)
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
    with pytest.raises(DataError, match=r"003\.png cannot be read.*replace or delete it"):
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
    with pytest.raises(DataError, match=r"003\.png cannot be read: .*pixels.*replace or delete it"):
        data.load(str(tmp_path))


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="expected one subfolder per class with images"):
        data.load(str(tmp_path))
    write(tmp_path, ("train", "val"))
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(DataError, match=r"has classes without images in .*train: cow"):
        data.load(str(tmp_path))


def hugging_face(count=12):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    content = {"picture": [picture(i) for i in range(count)], "kind": [i % 2 for i in range(count)]}
    return datasets, datasets.Dataset.from_dict(content, features=features)


def test_hugging_face_splits(tmp_path):
    datasets, rows = hugging_face()
    parts = datasets.DatasetDict({"train": rows.select(range(8)), "test": rows.select([8, 9])})
    parts.save_to_disk(tmp_path / "two")
    dataset = data.load(f"hf:{tmp_path}/two")
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test)) == (8, 2)
    expected = np.asarray(picture(9))[:, 4:20]
    image = dataset.test.batch([1])[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image, expected)

    rows.save_to_disk(tmp_path / "one")
    dataset = data.load(f"hf:{tmp_path}/one")
    assert (len(dataset.train), len(dataset.test)) == (10, 2)


def test_hugging_face_without_the_columns(tmp_path):
    _, rows = hugging_face()
    rows.remove_columns("kind").save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"type ClassLabel, got {'picture': 'Image'}"):
        data.load(f"hf:{tmp_path}/d")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    write(tmp_path, ("train", "val"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fastmp\[data\]'"):
        data.load("hf:anything")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'fastmp\[data\]'"):
        data.load(str(tmp_path))
