"""The conversion of a model to 16-bit weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fastmp.amp.fusion import fuse_linear, unfuse_linear
from fastmp.nn import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d

_IN_FP32: dict[type[nn.Module], type[nn.Module]] = {
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Vectors of torch's spectral norms, which are multiplied with the weight: 1 if it has one row.
_SPECTRAL = ("_u", "_v")


def convert(
    model: nn.Module,
    dtype: torch.dtype = torch.float16,
    *,
    fuse: bool = True,
    keep_fp32: Iterable[str | type[nn.Module]] = (),
) -> nn.Module:
    """Give a model 16-bit weights and fused linear layers, in place.

    Parameters and floating-point buffers become ``dtype``. These become fp32, because a cast
    changes what they say:

    - batch norms, and instance norms with running statistics: sums over many steps;
    - buffers without dimensions and of one whole number: counters (bf16 stops at 256) and scales.
      Without dimensions they change the dtype of no result;
    - buffers with "freq" in their name, and vectors that no checkpoint holds: the frequencies of
      rotary embeddings, which are multiplied with positions;
    - buffers of whole numbers that ``dtype`` does not have: tables of positions;
    - what a model of transformers keeps in fp32 under ``from_pretrained(dtype=)``;
    - what ``keep_fp32`` names.

    Parameters stay the same objects and ``state_dict`` keys do not change. The model then expects
    inputs of ``dtype``.

    Args:
        model: any module.
        dtype: ``torch.float16``, ``torch.bfloat16``, or ``torch.float32`` to go back.
        fuse: make linear layers and activations (also transformers') modules of fastmp, which
            compute the same, share a pass in the backward and keep less for it; see
            ``fastmp.amp.fusion.fuse_linear``. False: make them torch's again.
        keep_fp32: what else stays fp32: names or globs of modules, parameters and buffers, such as
            "codebook.*" or "*.wo", and classes of modules. The forward has to bring the dtypes
            together itself.

    Returns:
        The same module.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another dtype, or an entry of ``keep_fp32`` that fits nothing; the model is then
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if dtype not in _DTYPES:
        expected = ", ".join(map(str, _DTYPES))
        raise ValueError(f"expected dtype to be one of {expected}, got {dtype}")
    kept = {id(t) for t in _named_exceptions(model, keep_fp32)}
    for module in model.modules():
        kept |= {id(t) for t in _stays_fp32(module, dtype)}
        kept |= {id(t) for t in _transformers_exceptions(module, dtype)}

    def cast(tensor: Tensor) -> Tensor:
        target = torch.float32 if id(tensor) in kept else dtype
        return tensor.to(target) if tensor.is_floating_point() else tensor

    for module in model.modules():
        module._apply(cast, recurse=False)
        for theirs, ours in _IN_FP32.items():
            if type(module) in (theirs, ours) and is_fp32_norm(module):
                module.__class__ = theirs if dtype == torch.float32 else ours  # the same object
    return fuse_linear(model) if fuse else unfuse_linear(model)


def is_fp32_norm(module: nn.Module) -> bool:
    """Whether ``convert`` keeps a module in fp32: a batch norm, or one with running statistics."""
    norms = nn.modules.batchnorm
    if isinstance(module, norms._BatchNorm):
        return True
    return isinstance(module, norms._NormBase) and module.running_mean is not None


def _stays_fp32(module: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """The module's own tensors that a cast to ``dtype`` would spoil."""
    if is_fp32_norm(module):
        yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return
    for name, buffer in module.named_buffers(recurse=False):
        computed = name in module._non_persistent_buffers_set
        if (
            buffer.dim() == 0
            or "freq" in name
            or (buffer.dim() == 1 and computed)
            or (_is_count(buffer, dtype) and not name.endswith(_SPECTRAL))
        ):
            yield buffer


def _is_count(buffer: Tensor, dtype: torch.dtype) -> bool:
    """Whether a buffer holds one whole number, or whole numbers that ``dtype`` does not have."""
    if buffer.is_meta or not buffer.is_floating_point() or buffer.numel() == 0:
        return False
    exact = bool((buffer.to(dtype) == buffer).all())
    if exact and buffer.numel() > 1:
        return False
    return bool((buffer == buffer.trunc()).all()) and bool(buffer.isfinite().all())


def _transformers_exceptions(module: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """What the class of a model names, by parts of names: in fp16, or "strict", in bf16 too."""
    attributes = ["_keep_in_fp32_modules_strict"]
    if dtype == torch.float16:
        attributes.append("_keep_in_fp32_modules")
    named = [getattr(module, attribute, None) for attribute in attributes]
    parts = [part for entry in named if isinstance(entry, list | set | tuple) for part in entry]
    if parts:
        pattern = re.compile("|".join(parts).replace("*", ".*"))
        tensors = (*module.named_parameters(), *module.named_buffers())
        yield from (tensor for name, tensor in tensors if pattern.search(name))


def _named_exceptions(
    model: nn.Module, keep_fp32: Iterable[str | type[nn.Module]]
) -> Iterator[Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for entry in [keep_fp32] if isinstance(keep_fp32, str | type) else keep_fp32:
        if isinstance(entry, str):
            found = [t for n, t in tensors if fnmatchcase(n, entry) or fnmatchcase(n, f"{entry}.*")]
        else:
            modules = [m for m in model.modules() if isinstance(m, entry)]
            found = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        if not found:
            raise ValueError(f"keep_fp32 has {entry!r}, which fits no tensor of the model")
        yield from found
