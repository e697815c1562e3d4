"""The confusion matrix of a classifier, the accuracy of each class, the worst mistakes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

WORST = 12  # mistakes that are kept


@dataclass(frozen=True)
class Mistake:
    """An image (C, H, W), as the loader gave it, its label, and the class it was taken for."""

    image: Tensor
    label: int
    predicted: int
    probability: float  # of ``predicted``


@dataclass(frozen=True)
class Confusion:
    """``counts``, int64 (classes, classes): images by label (row) and prediction (column).

    ``worst``: mistakes, the most confident one first.
    """

    counts: Tensor
    worst: tuple[Mistake, ...]

    @property
    def images(self) -> int:
        """Images in all."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Correct ones as a share of all."""
        return int(self.counts.trace()) / max(self.images, 1)

    def per_class(self) -> list[tuple[int, float | None]]:
        """Of each class the number of images, and the share that is correct; None without any."""
        totals, correct = self.counts.sum(1).tolist(), self.counts.diag().tolist()
        return [(n, c / n if n else None) for n, c in zip(totals, correct, strict=True)]

    def most_confused(self, number: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes, as (label, prediction, images)."""
        rows = self.counts.tolist()
        found = [(n, i, j) for i, row in enumerate(rows) for j, n in enumerate(row) if n and i != j]
        return [(i, j, n) for n, i, j in sorted(found, key=lambda f: (-f[0], f[1:]))[:number]]


@torch.no_grad()
def measure(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> Confusion:
    """Run a model over labelled images.

    Args:
        model: images (N, C, H, W) to logits (N, classes); in eval mode.
        batches: of images (N, C, H, W) and labels int64 (N,), or class probabilities (N, classes);
            labels that are no class are left out.
        device: of the model.

    Raises:
        ValueError: no batches, or logits that are not (N, classes).
    """
    counts: Tensor | None = None
    worst: list[tuple[float, int, Mistake]] = []
    seen = 0
    for images, labels in batches:
        shares = model(images.to(device)).float().softmax(1).cpu()
        if shares.dim() != 2:
            raise ValueError(f"expected logits (N, classes), got {tuple(shares.shape)}")
        classes = shares.shape[1]
        if counts is None:
            counts = torch.zeros(classes, classes, dtype=torch.int64, device="cpu")
        labels = (labels.argmax(1) if labels.dim() > 1 else labels).cpu()
        known = (labels >= 0) & (labels < classes)
        probabilities, predicted = shares.max(1)
        index = labels[known] * classes + predicted[known]
        counts += torch.bincount(index, minlength=classes**2).view(classes, classes)
        for i in (known & (predicted != labels)).nonzero().flatten().tolist():
            share = float(probabilities[i])
            mistake = Mistake(images[i].cpu(), int(labels[i]), int(predicted[i]), share)
            # seen breaks ties: of equal ones the earlier stays
            heapq.heappush(worst, (share, -(seen + i), mistake))
            if len(worst) > WORST:
                heapq.heappop(worst)
        seen += len(labels)
    if counts is None:
        raise ValueError("the loader gave no batches; expected at least one")
    return Confusion(counts, tuple(entry[2] for entry in sorted(worst, reverse=True)))
