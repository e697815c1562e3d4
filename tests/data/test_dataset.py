"""Data sets in memory, and data sets by name."""

import pytest
import torch

from fastmp import data
from fastmp.data import Arrays, DataError


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
