"""Exports of a trained model, each of which is run and compared with the model."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastmp.checkpoint import weights
from fastmp.models.classifier import Classifier

Format = Literal["safetensors", "onnx", "torch.export"]
FILES: dict[Format, str] = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "torch.export": "model.pt2",
}
OPSET = 18  # of ONNX
_BATCHES = (1, 5)  # sizes that are tried
_TOLERANCE = 1e-3  # of the largest logit: a wrong operator is off by far more than fp32 sums are


class ExportError(RuntimeError):
    """An export that could not be made, or computes something else than the model."""


def export(model: Classifier, format: Format, path: Path) -> float | None:
    """Write ``model`` as one file, with batches of any size.

    The input of ``onnx`` and ``torch.export`` is "images", fp32 (N, C, H, W) in [0, 1], the output
    "logits", fp32 (N, classes); classes, shape, mean and std are in the file's metadata.

    Args:
        model: in fp32 on the CPU.
        format: of the file.
        path: of the file, whose folder exists.

    Returns:
        the largest difference from the model's logits, as a share of the largest of them, on random
        images; None for safetensors, which holds the weights themselves.

    Raises:
        ExportError: a package is missing, the model cannot be exported, or the export differs.
        OSError: the file cannot be written.
    """
    about = _about(model)
    if format == "safetensors":
        weights.write(path, model.network.state_dict(), about)
        return None
    try:
        make = _onnx if format == "onnx" else _exported
        with _quiet():
            run = make(model, path, about)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the package {error.name}; install it with: pip install 'fastmp[onnx]'"
        ) from error
    except OSError:
        raise
    except Exception as error:  # the exporters raise errors of many kinds
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"the model cannot be exported as {format}: {type(error).__name__}: {reason}"
        ) from error
    difference = max(_difference(model, run, size) for size in _BATCHES)
    if not difference <= _TOLERANCE:
        path.unlink()
        raise ExportError(
            f"the export as {format} computes other logits than the model: they differ by "
            f"{difference:.1e} of the largest, at most {_TOLERANCE:.0e} is expected; it was removed"
        )
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of packages that are not installed and of their own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _about(model: Classifier) -> dict[str, str]:
    prepared = model.preprocessing
    values: dict[str, Any] = {
        "classes": model.classes,
        "shape": prepared.shape,
        "mean": prepared.mean,
        "std": prepared.std,
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _images(model: Classifier, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    shape = (number, *model.preprocessing.shape)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


@torch.no_grad()
def _difference(model: Classifier, run: Callable[[Tensor], Tensor], size: int) -> float:
    images = _images(model, size)
    expected = model(images)
    return float((run(images) - expected).abs().max() / expected.abs().max())


def _exported(model: Classifier, path: Path, about: dict[str, str]) -> Callable[[Tensor], Tensor]:
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(model, (_images(model, 2),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files=about)
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def _onnx(model: Classifier, path: Path, about: dict[str, str]) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    importlib.import_module("onnxscript")  # torch.onnx needs it, and says so in a page
    program = torch.onnx.export(
        model,
        (_images(model, 2),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    made = program.model_proto
    for name, value in about.items():
        made.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(made)
    path.write_bytes(made.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run
