"""Gradients averaged over the ranks while the backward still runs.

torch's DistributedDataParallel does the all-reduce; its communication hook here adds a mean that
fits in 16 bits and accumulation in fp32.

Overflow needs no message of its own. An infinity or a NaN on one rank is one in the sum on all
ranks, with the same bits on all of them: every rank skips the step, or none does.
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
    """``model`` in DistributedDataParallel, gradients averaged in their own dtype.

    Args:
        model: on this rank's device; rank 0's weights are broadcast.
        accumulator: gradients of the step's earlier backward passes, added before the all-reduce.
        static: every backward all-reduces. DDP then skips its search for unused parameters; with
            ``unsynchronised`` passes before the first all-reduce it fails (torch 2.13).
    """
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static)
    wrapped.register_comm_hook(accumulator, _average)
    return wrapped


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to every rank."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _average(
    accumulator: Accumulator,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean over the ranks: divided in part before the sum, in part after it.

    Division before the sum alone rounds small fp16 gradients to zero, division after it alone lets
    the sum of large ones overflow. Both divisors are about the square root of the number of ranks;
    the first is a power of two, exact but for subnormals.
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
    """Backward passes in the block do not all-reduce their gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
