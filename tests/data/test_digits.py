"""The digits of scikit-learn."""

import pytest
import torch

from fastmp import data


def test_digits():
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert len(digits.train.images) + len(digits.test.images) == 1797
    assert (int(digits.train.images.min()), int(digits.train.images.max())) == (0, 255)
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx([float(pixels.mean())])
    assert digits.std == pytest.approx([float(pixels.std(correction=0))])
    assert digits.classes == tuple("0123456789")


def test_the_split_of_digits_is_stratified_and_fixed():
    one, two = data.load("digits"), data.load("digits")
    assert torch.equal(one.test.images, two.test.images)
    test, train = (torch.bincount(labels) for labels in (one.test.labels, one.train.labels))
    assert torch.equal(test, torch.ceil((test + train) / 5).long())
    # no image is in both splits
    rows = {bytes(image.numpy().tobytes()) for image in one.train.images}
    assert not rows & {bytes(image.numpy().tobytes()) for image in one.test.images}
