"""Hugging Face accelerate: its loop with our model, optimizer, loss and schedule."""

import pytest
import torch

import fastmp
from fastmp.optim import state_kinds
from tests.compat.conftest import accuracy, assert_learnt_over_overflows

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
    assert float(optimizer.grad_norm) <= 0.5 * 1.01  # our clipping follows theirs
    assert accuracy(model, points) > 0.95


@pytest.fixture
def runner(scaler):
    """fp16 as on a GPU, with our scaler; the state shared by all Accelerators is reset."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    made = accelerate.Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=2)
    made.native_amp, made.scaler = True, scaler
    yield made
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_fp16_with_our_scaler(runner, model, optimizer, points, scaler, tmp_path):
    """accelerate does not see skipped steps of a fused optimizer; our schedule does."""
    loader = torch.utils.data.DataLoader(points, 24, shuffle=True)
    plan = fastmp.schedule.OneCycle(0.01, 30)
    schedule = fastmp.optim.lr_scheduler.LRScheduler(optimizer, plan)
    prepared, wrapped, loader, schedule = runner.prepare(model, optimizer, loader, schedule)
    for _ in range(6):
        for x, y in loader:
            with runner.accumulate(prepared):
                wrapped.zero_grad()
                runner.backward(fastmp.functional.cross_entropy(prepared(x), y))
                wrapped.step()
                schedule.step()
    assert_learnt_over_overflows(model, optimizer, points)
    assert schedule.get_last_lr() == [plan(int(optimizer.applied_steps))[0]]
    runner.save_state(tmp_path / "state")
    scaler.update(1.0)
    assert scaler.get_scale() == 1.0
    runner.load_state(tmp_path / "state")
    assert scaler.get_scale() > 1.0


@pytest.mark.parametrize("dtype", [torch.float16])
def test_its_clipping_of_fp16_gradients(runner, model, optimizer, points):
    """torch's scaler refuses to unscale them; ours warns of the lost precision."""
    loader = torch.utils.data.DataLoader(points, 24, shuffle=True)
    prepared, wrapped, loader = runner.prepare(model, optimizer, loader)

    def epoch():
        for x, y in loader:
            wrapped.zero_grad()
            runner.backward(fastmp.functional.cross_entropy(prepared(x), y))
            runner.clip_grad_norm_(prepared.parameters(), 0.25)
            wrapped.step()

    with pytest.warns(UserWarning, match="pass max_grad_norm to the optimizer"):
        epoch()
    for _ in range(3):
        epoch()
    assert int(optimizer.applied_steps) > 20
    assert 0 < float(optimizer.grad_norm) <= 0.25 * 1.01
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


def test_narrow_moments_and_averages_are_saved_and_loaded(model, points, tmp_path, monkeypatch):
    monkeypatch.setattr(state_kinds, "MIN_8BIT_NUMEL", 64)
    runner = accelerate.Accelerator(cpu=True)
    options = {"state_dtype": "8bit", "ema": 0.9}
    optimizer = fastmp.optim.AdamW(model.parameters(), lr=0.01, **options)
    prepared, wrapped = runner.prepare(model, optimizer)

    def step():
        wrapped.zero_grad()
        runner.backward(fastmp.functional.cross_entropy(prepared(points.points), points.labels))
        wrapped.step()
        return [*optimizer.masters(), *optimizer.averages()]

    for _ in range(3):
        step()
    runner.save_state(tmp_path / "state")
    expected = step()
    runner.load_state(tmp_path / "state")
    assert int(optimizer.applied_steps) == 3
    assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
