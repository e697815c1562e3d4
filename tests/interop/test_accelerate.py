"""Hugging Face accelerate: its loop with our model, optimizer, loss and schedule."""

import pytest
import torch

import fastmp
from tests.interop.conftest import accuracy

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: pip install 'fastmp[interop]'"
)


def test_a_loop_with_accumulation_and_clipping(model, optimizer, points):
    runner = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(points, 24, shuffle=True)
    criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    prepared, wrapped, loader, schedule = runner.prepare(model, optimizer, loader, schedule)
    for _ in range(6):
        for x, y in loader:
            with runner.accumulate(prepared):
                wrapped.zero_grad()
                runner.backward(criterion(prepared(x), y))
                if runner.sync_gradients:
                    runner.clip_grad_norm_(prepared.parameters(), 0.5)
                wrapped.step()
                schedule.step()
    assert int(optimizer.applied_steps) == 6 * 10 / 2
    assert float(optimizer.grad_norm) <= 0.5 * 1.01  # ours comes after theirs
    assert accuracy(model, points) > 0.95


def test_state_is_saved_and_loaded(model, optimizer, points, tmp_path):
    runner = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(points, 24)
    model, wrapped, loader = runner.prepare(model, optimizer, loader)

    def epoch():
        for x, y in loader:
            wrapped.zero_grad()
            runner.backward(fastmp.functional.cross_entropy(model(x), y))
            wrapped.step()
        return [p.detach().clone() for p in model.parameters()]

    epoch()
    runner.save_state(str(tmp_path / "state"))
    first = epoch()
    runner.load_state(str(tmp_path / "state"))
    again = epoch()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
