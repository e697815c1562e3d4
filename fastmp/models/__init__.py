"""The models of ``fastmp train``: built-in ones, one's own by name, trained ones from a run."""

from __future__ import annotations

from fastmp.models.builtin import (
    MODELS,
    ModelError,
    Shape,
    VisionTransformer,
    build,
    convnet,
    made_by,
    mlp,
    vit,
)

__all__ = [
    "MODELS",
    "ModelError",
    "Shape",
    "VisionTransformer",
    "build",
    "convnet",
    "made_by",
    "mlp",
    "vit",
]
