"""Handwritten digits, from scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from fastmp.data.dataset import Dataset, in_memory


def digits() -> Dataset:
    """1,797 grey 8x8 images of digits; a fixed fifth of every class is the test split."""
    from sklearn.datasets import load_digits  # slow to import, unused by other data sets

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    rank = np.zeros(len(labels), dtype=np.int64)  # position within its class, in shuffled order
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        rank[members] = np.arange(len(members))
    test = rank % 5 == 0
    parts = [
        (torch.from_numpy(scaled[part]), torch.from_numpy(labels[part].astype(np.int64)))
        for part in (~test, test)
    ]
    return in_memory("digits", parts[0], parts[1], tuple("0123456789"))
