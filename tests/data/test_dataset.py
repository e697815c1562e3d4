"""Data sets in memory, and data sets by name."""

import pytest
import torch

from fastmp import data
from fastmp.data import Arrays, DataError, Dataset


def test_images_and_labels_of_unequal_numbers():
    with pytest.raises(ValueError, match=r"as many labels as images.* 5 images and 4 labels"):
        Arrays(torch.zeros(5, 1, 2, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="at least one, got 0 images"):
        Arrays(torch.zeros(0, 1, 2, 2), torch.zeros(0))


def test_unknown_data_set():
    with pytest.raises(
        DataError, match=r"unknown data set 'mnist'; expected digits, fashion-mnist"
    ):
        data.load("mnist")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class(label):
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    right, wrong = (Arrays(images, torch.tensor(labels)) for labels in ([0, 1, 1], [0, label, 1]))
    with pytest.raises(
        DataError, match=rf"own: expected labels from 0 to 1, got {label} among the"
    ):
        Dataset("own", right, wrong, (0.5,), (0.5,), ("cat", "dog"))
