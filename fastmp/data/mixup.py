"""Mixup and cutmix of a training batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmp import functional
from fastmp.ops.checks import wide_dtype
from fastmp.ops.loss import MixedTarget


class MixParams(NamedTuple):
    """Random parameters of one mixed batch.

    lam: the weight λ of each sample, fp32, () or (N). partner: the index it is mixed with, int64
    (N). box: for cutmix top, bottom, left and right, int64 (4) or (N, 4); None for mixup.
    """

    lam: Tensor
    partner: Tensor
    box: Tensor | None


class Mixup:
    """Mixes each batch with a random permutation of itself.

    Zhang et al. 2018 (mixup, arXiv:1710.09412), Yun et al. 2019 (CutMix, arXiv:1905.04899). The
    permutation is drawn, so batches may have any size. A batch has either mixup or cutmix; with
    ``per_sample`` each sample has its own λ and box, and is mixed with probability ``prob``.

    Args:
        alpha: λ ~ Beta(alpha, alpha) for mixup; 0: no mixup.
        cutmix_alpha: the same for cutmix; 0: no cutmix.
        prob: the probability of mixing.
        switch_prob: the probability of cutmix rather than mixup, where both are on.
        per_sample: one λ per sample rather than one per batch.
        generator: of the random numbers, on the CPU. Default: a new one, seeded from torch's global
            generator, so that ``torch.manual_seed`` makes it reproducible.
        mean, std, dtype: normalisation and dtype of the result, as in ``fastmp.functional.mix``.

    Raises:
        ValueError: a probability outside [0, 1], a negative or infinite alpha, a generator that is
            not on the CPU.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
        *,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("alpha", alpha), ("cutmix_alpha", cutmix_alpha)):
            if not (0.0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not (0.0 <= value <= 1.0):
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.randint(2**63 - 1, (), device="cpu")))
        if generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
        self.alpha = alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.per_sample = per_sample
        self.generator = generator
        self.mean = mean
        self.std = std
        self.dtype = dtype

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, MixedTarget]:
        """Mix a batch.

        Args:
            x: (N, ...), floating or uint8; (N, C, H, W) for cutmix, mean or std.
            y: class indices (N, ...); a map of them (N, H, W); floating targets such as class
                probabilities (N, K) or (N, K, H, W). Cutmix pastes a map, of three dimensions or
                more, with the box of the image.

        Returns:
            the mixed batch, a new tensor, and its targets; λ is () or, per sample, (N), in fp32.
            Pasted maps and class probabilities are mixed themselves: there a is b and λ is 1.

        Raises:
            TypeError: y is no tensor.
            ValueError: the batch sizes differ, x has no image shape where one is needed, or y is a
                map of another size than x, which cutmix cannot paste.
        """
        self._check(x, y)  # before a number is drawn
        return self.apply(x, y, self.draw(x))

    def _check(self, x: Tensor, y: Tensor) -> None:
        if not isinstance(y, Tensor):
            raise TypeError(
                f"y must be a tensor of targets, got {type(y).__name__}; mix each of its tensors "
                "with apply, and the params of one draw"
            )
        if y.dim() == 0 or x.dim() == 0 or x.shape[0] != y.shape[0]:
            raise ValueError(
                f"x and y must have the same batch size, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if self.cutmix_alpha == 0:
            return
        if x.dim() != 4:
            raise ValueError(f"cutmix needs x of shape (N, C, H, W), got {tuple(x.shape)}")
        size = x.shape[2:]
        flat = y.dim() == 2 and y.shape[1] == size.numel() > 1
        if flat or (y.dim() > 2 and y.shape[-2:] != size):
            raise ValueError(
                f"cutmix pastes a map of targets of the image's size (N, ..., {size[0]}, {size[1]})"
                f", got {tuple(y.shape)}; resize the map, or set cutmix_alpha=0"
            )

    def draw(self, x: Tensor) -> MixParams | None:
        """Random parameters for the batch ``x``, on its device; None: the batch is not mixed."""
        draws = x.shape[0] if self.per_sample else 1
        use_cutmix = self._draw_cutmix()
        mixed = self._uniform(draws) < self.prob
        alpha = self.cutmix_alpha if use_cutmix else self.alpha
        if alpha == 0 or not mixed.any():
            return None
        lam = torch.where(mixed, self._beta(alpha, draws), 1.0)
        box = None
        if use_cutmix:
            box, lam = self._box(lam, x.shape[2], x.shape[3])
        if not self.per_sample:
            lam, box = lam[0], None if box is None else box[0]
        index = torch.randperm(x.shape[0], generator=self.generator, device="cpu")
        # CUDA stages pageable memory before the call returns: the source may be freed at once.
        index, lam = (t.to(x.device, non_blocking=True) for t in (index, lam.float()))
        box = None if box is None else box.to(x.device, non_blocking=True)
        return MixParams(lam, index, box)

    def apply(self, x: Tensor, y: Tensor, params: MixParams | None) -> tuple[Tensor, MixedTarget]:
        """Mix a batch with ``params``, all tensors: a CUDA graph can capture it."""
        self._check(x, y)
        if params is None:
            shape = (x.shape[0],) if self.per_sample else ()
            lam = torch.ones(shape, dtype=torch.float32, device=x.device)
            return self.plain(x), MixedTarget(y, y, lam)
        lam, index, box = params
        out = functional.mix(x, lam, index, box=box, mean=self.mean, std=self.std, dtype=self.dtype)
        return out, mix_target(y, params)

    def plain(self, x: Tensor) -> Tensor:
        """Normalise and cast without mixing, for evaluation."""
        return functional.mix(x, None, None, mean=self.mean, std=self.std, dtype=self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator, from which the next batches are drawn."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the generator.

        Raises:
            ValueError: no generator state in ``state_dict``.
        """
        state = state_dict.get("generator")
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise ValueError(
                "state_dict must hold 'generator', the uint8 state of a torch.Generator, "
                f"got the keys {sorted(state_dict)}"
            )
        self.generator.set_state(state.cpu())

    def _uniform(self, n: int) -> Tensor:
        """n numbers in [0, 1)."""
        return torch.rand(n, dtype=torch.float64, generator=self.generator, device="cpu")

    def _draw_cutmix(self) -> bool:
        if self.alpha > 0 and self.cutmix_alpha > 0:
            return bool(self._uniform(1) < self.switch_prob)
        return self.cutmix_alpha > 0

    def _beta(self, alpha: float, n: int) -> Tensor:
        """n numbers from Beta(alpha, alpha), fp64.

        Beta = G1 / (G1 + G2) with gamma variables, and Gamma(alpha) = Gamma(alpha + 1)·U^(1/alpha)
        (Marsaglia and Tsang 2000), in logarithms: for alpha = 0.001 a fourth of all pairs of gamma
        variables underflow to 0 in fp64.
        """
        shape = torch.full((2, n), alpha + 1.0, dtype=torch.float64, device="cpu")
        gamma = torch._standard_gamma(shape, generator=self.generator)
        uniform = 1.0 - self._uniform(2 * n).reshape(2, n)
        # -log U is at most 37: finite. Below 1e-300 all λ are 0 or 1 anyway
        first, second = gamma.log() + uniform.log() / max(alpha, 1e-300)
        return torch.sigmoid(first - second)

    def _box(self, lam: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Boxes of area (1-λ)·H·W around uniform centres, clipped, and λ = 1 - clipped area."""
        side = (1.0 - lam).sqrt()
        edges = []
        for size in (height, width):
            half = (side * size / 2).round()
            centre = (self._uniform(lam.numel()) * size).floor()
            edges += [(centre - half).clamp(0, size), (centre + half).clamp(0, size)]
        top, bottom, left, right = edges
        area = (bottom - top) * (right - left)
        box = torch.stack(edges, 1).to(torch.int64)
        return box, 1.0 - area / max(height * width, 1)


def mix_target(y: Tensor, params: MixParams) -> MixedTarget:
    """The targets of a batch that was mixed with ``params``; see ``Mixup``."""
    lam, index, box = params
    partner = y[index]
    if box is not None and y.dim() > 2:
        mixed = torch.where(_inside(box, y), partner, y)
    elif y.is_floating_point() and y.dim() > 1:
        weight = lam.reshape(-1, *[1] * (y.dim() - 1)).to(wide_dtype(y.dtype))
        mixed = (weight * y + (1 - weight) * partner).to(y.dtype)
    else:
        return MixedTarget(y, partner, lam)
    return MixedTarget(mixed, mixed, torch.ones_like(lam))


def _inside(box: Tensor, y: Tensor) -> Tensor:
    """Where the pixels of the maps y (N, ..., H, W) lie in the boxes (4) or (N, 4)."""
    top, bottom, left, right = box.reshape(-1, 4, *[1] * (y.dim() - 1)).unbind(1)
    rows = torch.arange(y.shape[-2], device=y.device)[:, None]
    columns = torch.arange(y.shape[-1], device=y.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
