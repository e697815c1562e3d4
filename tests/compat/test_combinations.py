"""Combinations of torch.compile, autocast, channels_last, DDP and FSDP2; CUDA graphs.

Each combination trains as the plain loop does, or is refused with an error.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

import fastmp.distributed
import fastmp.distributed.fsdp
import fastmp.distributed.rendezvous
import fastmp.training.cuda_graph

STEPS, LR, CLIP = 6, 0.5, 0.1


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4),
        )  # fmt: skip


def batch(dtype, *, channels_last=False):
    """One batch for all steps: the loss falls, and a missing step or clip changes it."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(8, 3, 6, 6, generator=generator).to(dtype)
    labels = torch.randint(4, (8,), generator=generator)
    return images.to(memory_format=kind), fastmp.data.MixedTarget(labels, labels.flip(0), 0.7)


def net(dtype, *, channels_last=False):
    torch.manual_seed(0)
    model = Net()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model if dtype == torch.float32 else fastmp.convert(model, dtype)


def losses(model, dtype, *, shards=None, step=None, autocast=False, channels_last=False):
    """Losses of a plain loop: our loss, scaler in fp16, clipping inside the step."""
    trained = shards or model
    optimizer = fastmp.optim.SGD(trained.named_parameters(), LR, momentum=0.9, max_grad_norm=CLIP)
    if shards:
        shards.attach(optimizer)
    criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = fastmp.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**8)

    def loss_of(images, target):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return criterion(model(images), target)

    forward = step(loss_of) if step else loss_of
    values = []
    images, target = batch(dtype, channels_last=channels_last)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = forward(images, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
    assert int(optimizer.applied_steps) == STEPS
    return values


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    where = f"file://{tmp_path}/store"
    with fastmp.distributed.rendezvous.group(torch.device("cpu"), 0, 1, init_method=where):
        yield


KINDS = ("compile", "autocast", "channels_last", "ddp", "fsdp2")
CELLS = [
    pytest.param(dtype, kinds, id=f"{str(dtype)[6:]}-{'+'.join(kinds) or 'plain'}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for count in range(len(KINDS))
    for kinds in itertools.combinations(KINDS, count)
    if count < 2 or dtype == torch.bfloat16  # combinations of two and more in one dtype
    if not {"ddp", "fsdp2"} <= {*kinds}
]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("dtype", "kinds"), CELLS)
def test_cell(dtype, kinds):
    torch.compiler.reset()  # the ninth recompilation would fall back to eager mode
    expected = losses(net(dtype), dtype)
    last, split = "channels_last" in kinds, "fsdp2" in kinds
    model = net(torch.float32 if split else dtype, channels_last=last)
    found = losses(
        nn.parallel.DistributedDataParallel(model) if "ddp" in kinds else model,
        dtype,
        shards=fastmp.distributed.fsdp.shard(model, dtype) if split else None,
        channels_last=last,
        autocast="autocast" in kinds,
        step=torch.compile if "compile" in kinds else None,
    )
    assert found == pytest.approx(expected, rel=1e-3)
    if not split:  # shards are flat
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels/gpu/test_trainer.py records and replays steps"
)
def test_graphs_without_a_gpu():
    with pytest.raises(
        fastmp.training.cuda_graph.Unsupported, match="CUDA graphs need a CUDA device"
    ):
        fastmp.training.cuda_graph.CudaRecorder(torch.device("cpu"))


@pytest.mark.usefixtures("group")
def test_fsdp2():
    """torch's own fully_shard: the optimizer's error names ours, fsdp.shard."""
    from torch.distributed.fsdp import fully_shard

    model = net(torch.float32)
    fully_shard(model)
    with pytest.raises((TypeError, ValueError), match=r"DTensor.*fsdp\.shard"):
        losses(model, torch.float32)


def test_deepcopied_converted_models_train_alike():
    model = net(torch.bfloat16)
    twin = copy.deepcopy(model)
    a = losses(model, torch.bfloat16)
    assert losses(twin, torch.bfloat16) == a
