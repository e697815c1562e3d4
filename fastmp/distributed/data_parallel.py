"""Gradients averaged over the ranks while the backward still runs.

torch's DistributedDataParallel does the exchange. Here is what it lacks: a mean that 16 bits can
hold, and accumulation in fp32.

Overflow needs no message of its own. An infinity or a NaN on one rank is one in the sum on all
ranks, and all ranks hold the same bits of it: all of them skip, or none.
"""
# Annotations are evaluated here: DistributedDataParallel compares those of a hook with its types.

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmp.amp.accumulation import Accumulator


def parallel(
    model: nn.Module, accumulator: Accumulator, *, static: bool
) -> DistributedDataParallel:
    """``model`` on every rank, with gradients averaged in their own dtype.

    Args:
        model: on this rank's device; the first rank's weights go to all.
        accumulator: what earlier backward passes of the step gave, added before the exchange.
        static: every backward exchanges gradients. DDP then need not look for parameters that took
            no part; with ``unsynchronised`` passes before the first exchange it fails (torch 2.13).
    """
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static)
    wrapped.register_comm_hook(accumulator, _average)
    return wrapped


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _average(
    accumulator: Accumulator,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean over the ranks: part of the division before the sum, the rest after it.

    All of it before would push small fp16 gradients into zero, all of it after would let the sum of
    large ones overflow. Both divisors are about the root of the number of ranks; the first is a
    power of two, exact but for subnormals.
    """
    accumulator.add_to(bucket.parameters(), bucket.gradients())
    buffer = bucket.buffer()
    before, after = _divisors(dist.get_world_size())
    buffer.div_(before)
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None

    def divided(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        (total,) = future.value()
        return total if after == 1 else total.div_(after)

    mean: torch.futures.Future[Tensor] = work.get_future().then(divided)
    return mean


def _divisors(size: int) -> tuple[int, float]:
    before = 1 << (size.bit_length() // 2)
    return before, size / before


def unsynchronised(model: nn.Module) -> Any:
    """In the block backward passes keep their gradients to themselves."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
