"""``fastmp.graphed`` on a GPU: replays, and the step as it is, against the loop without it."""

from __future__ import annotations

import pytest
import torch

import fastmp

if not torch.cuda.is_available():
    pytest.skip("a GPU is needed: steps are recorded there", allow_module_level=True)

GPU = torch.device("cuda")


class Loop:
    """Convolutions, a batch norm, dropout; fp16 with a scaler that overflows at first, or bf16."""

    def __init__(self, dtype, kind=lambda step: step, optimizer="AdamW"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Dropout(0.1), torch.nn.Linear(8 * 36, 10),
        )  # fmt: skip
        self.model = fastmp.convert(model.to(GPU), dtype)
        made = getattr(fastmp.optim, optimizer)
        self.optimizer = made(self.model.parameters(), lr=1e-2, max_grad_norm=1.0)
        enabled = dtype == torch.float16
        self.scaler = fastmp.amp.GradScaler("cuda", init_scale=2.0**24, enabled=enabled)
        self.criterion = fastmp.nn.CrossEntropyLoss()
        self.dtype = dtype
        self.step = kind(self.train)

    def train(self, images, labels):
        loss = self.criterion(self.model(images.to(GPU, self.dtype)), labels.to(GPU))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    def weights(self):
        return torch.cat([p.detach().float().flatten() for p in self.model.parameters()])


def batch(size, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_replays_train_as_the_loop(dtype, optimizer, device):
    """Two shapes, an overflow, hyperparameters and weights that change."""
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    loops = [Loop(dtype, kind, optimizer) for kind in (lambda step: step, fastmp.graphed)]
    found = []
    for loop in loops:
        torch.manual_seed(1)
        losses = []
        for seed in range(30):
            if seed == 12:
                loop.optimizer.param_groups[0]["weight_decay"] = 0.3
            if seed == 20:
                with torch.no_grad():
                    loop.model[-1].weight.mul_(0.5)
            losses.append(loop.step(*batch(6 if seed % 5 == 4 else 8, seed, device)).detach())
        found.append((torch.stack(losses), loop.weights(), int(loop.optimizer.skipped_steps)))
    torch.backends.cudnn.deterministic = deterministic
    assert loops[1].step.reason == ""
    (one, first, skipped), (two, second, also) = found
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)
    assert skipped == also


def take_eight(step):
    for seed in range(8):
        step(*batch(8, seed, "cuda"))


def test_a_step_that_waits_runs_as_it_is():
    loop = Loop(torch.float32)

    @fastmp.graphed
    def step(*inputs):
        loss = loop.train(*inputs)
        loss.item()
        return loss

    with pytest.warns(UserWarning, match="the step waits for the device"):
        take_eight(step)
    assert int(loop.optimizer.applied_steps) == 8


def test_a_step_that_draws_on_the_host_runs_as_it_is():
    loop = Loop(torch.float32)

    @fastmp.graphed
    def step(images, labels):
        return loop.train(images * float(torch.rand(())), labels)

    with pytest.warns(UserWarning, match="draws random numbers on the host"):
        take_eight(step)
    assert int(loop.optimizer.applied_steps) == 8


def test_a_capture_that_fails_is_undone():
    loop = Loop(torch.float16)

    @fastmp.graphed
    def step(*inputs):
        loss = loop.train(*inputs)
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss

    with pytest.warns(UserWarning, match="no CUDA graph"):
        take_eight(step)
    optimizer = loop.optimizer
    assert int(optimizer.applied_steps) + int(optimizer.skipped_steps) == 8
    assert all(p.grad is None for p in loop.model.parameters())
    torch.randn(8, device=GPU)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
