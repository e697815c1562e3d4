"""ResNet-50 and ViT-B/16, for images of 224x224: the shapes that everybody measures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmp.models import Shape, VisionTransformer


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the 3x3 has the stride (ResNet v1.5)."""

    def __init__(self, deep: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            *_layer(deep, width, 1), nn.ReLU(),
            *_layer(width, width, 3, stride), nn.ReLU(),
            *_layer(width, wide, 1),
        )  # fmt: skip
        is_same = deep == wide and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Sequential(*_layer(deep, wide, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def _layer(deep: int, wide: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(deep, wide, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(wide)]


def resnet50(in_shape: Shape, classes: int) -> nn.Module:
    """He et al. 2015 (arXiv:1512.03385), channels_last; 25.6 M parameters for 1,000 classes."""
    layers: list[nn.Module] = [*_layer(in_shape[0], 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    deep = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(_Bottleneck(deep, width, 2 if block == 0 and width > 64 else 1))
            deep = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(deep, classes)]
    model = nn.Sequential(*layers)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def vit_b16(in_shape: Shape, classes: int) -> nn.Module:
    """Dosovitskiy et al. 2021 (arXiv:2010.11929), mean-pooled; 86 M parameters."""
    return VisionTransformer(
        in_shape, classes, patch=16, width=768, depth=12, heads=12, expansion=4
    )
