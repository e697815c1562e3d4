"""The common benchmark networks: ResNet-18, ResNet-50, ViT-B/16, GPT-2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmp.bench import third_party
from fastmp.models import Shape, VisionTransformer


class _Block(nn.Module):
    """Convolutions around a shortcut: 1x1, 3x3 and 1x1 in a bottleneck, else twice 3x3.

    In a bottleneck the 3x3 has the stride (ResNet v1.5).
    """

    def __init__(self, in_channels: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        out_channels = 4 * width if bottleneck else width
        layers = (
            [
                *_layer(in_channels, width, 1), nn.ReLU(),
                *_layer(width, width, 3, stride), nn.ReLU(),
                *_layer(width, out_channels, 1),
            ]
            if bottleneck
            else [*_layer(in_channels, width, 3, stride), nn.ReLU(), *_layer(width, width, 3)]
        )  # fmt: skip
        self.body = nn.Sequential(*layers)
        is_same = in_channels == out_channels and stride == 1
        projection = [] if is_same else _layer(in_channels, out_channels, 1, stride)
        self.shortcut = nn.Sequential(*projection)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def _layer(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


def _resnet(
    in_shape: Shape, classes: int, blocks: tuple[int, ...], *, bottleneck: bool
) -> nn.Module:
    layers: list[nn.Module] = [*_layer(in_shape[0], 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    in_channels = 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        for block in range(count):
            stride = 2 if block == 0 and width > 64 else 1
            layers.append(_Block(in_channels, width, stride, bottleneck=bottleneck))
            in_channels = 4 * width if bottleneck else width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, classes)]
    model = nn.Sequential(*layers)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def resnet18(in_shape: Shape, classes: int) -> nn.Module:
    """He et al. 2015 (arXiv:1512.03385), channels_last; 11.7 M parameters for 1,000 classes."""
    return _resnet(in_shape, classes, (2, 2, 2, 2), bottleneck=False)


def resnet50(in_shape: Shape, classes: int) -> nn.Module:
    """He et al. 2015 (arXiv:1512.03385), channels_last; 25.6 M parameters for 1,000 classes."""
    return _resnet(in_shape, classes, (3, 4, 6, 3), bottleneck=True)


def vit_b16(in_shape: Shape, classes: int) -> nn.Module:
    """Dosovitskiy et al. 2021 (arXiv:2010.11929), mean-pooled; 86 M parameters."""
    return VisionTransformer(
        in_shape, classes, patch=16, width=768, depth=12, heads=12, expansion=4
    )


def timm_vit_b16() -> Callable[[Shape, int], nn.Module] | None:
    """timm's, with class token; None where timm is not installed."""
    timm = third_party.find("timm")
    if timm is None:
        return None

    def make(in_shape: Shape, classes: int) -> nn.Module:
        channels, size, _ = in_shape
        model: nn.Module = timm.create_model(
            "vit_base_patch16_224", img_size=size, in_chans=channels, num_classes=classes
        )
        return model

    return make


def gpt2(**config: int) -> Callable[[], nn.Module] | None:
    """GPT-2 of 124 M parameters (Radford et al. 2019) without dropout, from transformers.

    Args:
        config: changes to its ``GPT2Config``.

    Returns:
        None where transformers is not installed.
    """
    transformers = third_party.find("transformers")
    if transformers is None:
        return None

    def make() -> nn.Module:
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model: nn.Module = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**dropout, **config)
        )
        return model

    return make
