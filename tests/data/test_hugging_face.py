"""Hugging Face data sets: splits, labels, columns."""

from __future__ import annotations

import numpy as np
import pytest

from fastmp import data
from fastmp.data import DataError
from tests.data.image_cases import Image, picture


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
    dataset = data.load(f"hf:{tmp_path}/one", warn=False)
    assert (len(dataset.train), len(dataset.test)) == (10, 2)
    assert dataset.notes[0].endswith("drawn with seed 0, is held out for it, 2 of 12")


def test_hugging_face_without_the_columns(tmp_path):
    _, rows = hugging_face()
    rows.remove_columns("kind").save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"type ClassLabel, got {'picture': 'Image'}"):
        data.load(f"hf:{tmp_path}/d")


def saved(folder, **splits):
    """Splits of (images, labels) on the disk, as name for data.load."""
    datasets, rows = hugging_face(1)
    parts = {
        split: datasets.Dataset.from_dict({"picture": images, "kind": labels}, rows.features)
        for split, (images, labels) in splits.items()
    }
    datasets.DatasetDict(parts).save_to_disk(folder)
    return f"hf:{folder}"


def test_a_test_split_without_labels_is_not_used(tmp_path):
    images = [picture(i) for i in range(20)]
    name = saved(tmp_path / "d", train=(images, [0, 1] * 10), test=(images, [-1] * 20))
    dataset = data.load(name, warn=False)
    assert (len(dataset.train), len(dataset.test)) == (18, 2)
    assert dataset.notes[0] == "the split 'test' has no labels and is not used"


@pytest.mark.parametrize("missing", [-1, None])
def test_labels_out_of_range_are_refused(tmp_path, missing):
    images = [picture(i) for i in range(4)]
    name = saved(tmp_path / "d", train=(images, [0, 1] * 2), test=(images, [0, missing, 1, 1]))
    with pytest.raises(DataError, match=r"labels from 0 to 1, got -1 among the test labels \(1 of"):
        data.load(name)


def test_images_are_read_as_from_files(tmp_path):
    """Grey only if all are; 16 bits scaled; upright; an image that is missing or damaged named."""
    turned = Image.Exif()
    turned[0x0112] = 3
    picture(1, size=(16, 16)).save(tmp_path / "turned.png", exif=turned)
    wide = Image.fromarray(np.full((16, 16), 0x8080, np.uint16))
    images = [picture(i, size=(16, 16), mode="L") for i in range(3)] + [wide]
    name = saved(tmp_path / "grey", train=(images, [0, 1, 0, 1]), test=(images, [0, 1, 0, 1]))
    dataset = data.load(name, warn=False)
    assert dataset.shape == (1, 16, 16)
    assert (dataset.test.batch([3])[0] == 0x80).all()
    turned = {"path": str(tmp_path / "turned.png"), "bytes": None}
    name = saved(tmp_path / "mix", train=(images, [0, 1, 0, 1]), test=([turned, wide], [0, 1]))
    dataset = data.load(name, warn=False)
    upright = np.asarray(picture(1, size=(16, 16)))[::-1, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset.test.batch([0])[0][0], upright)
    for broken, message in ((None, "nothing"), ({"path": None, "bytes": b"P5 4 4 0 "}, "maxval")):
        bad = [picture(1), broken, picture(2)]
        name = saved(tmp_path / message, train=(bad, [0, 1, 1]), test=(bad[:1], [0]))
        with pytest.raises(DataError, match=f"^image 1 of hf:.* cannot be read: .*{message}"):
            data.load(name)


def test_one_class_is_refused(tmp_path):
    datasets, rows = hugging_face()
    rows.cast_column("kind", datasets.Value("int64")).map(lambda _: {"kind": 0}).cast_column(
        "kind", datasets.ClassLabel(names=["all"])
    ).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"expected at least 2 classes, got \['all'\]"):
        data.load(f"hf:{tmp_path}/d")
