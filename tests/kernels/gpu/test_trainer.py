"""The trainer on a GPU: a replayed step is the same step, and data that fits is kept there."""

from __future__ import annotations

import pytest
import torch

from fastmp import amp, data, models, optim
from fastmp.bench import train
from fastmp.data.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.schedule import OneCycle
from fastmp.training.trainer import Trainer
from tests.kernels.gpu.graph_cases import check_process

if not torch.cuda.is_available():
    pytest.skip("a GPU is needed: the step is recorded there", allow_module_level=True)

GPU = torch.device("cuda")


def trained(*, cuda_graph, dtype=torch.float16, accumulate=1, cutmix=0.0):
    torch.manual_seed(0)
    digits = data.load("digits")
    model = amp.convert(models.build("mlp", digits.shape, 10).to(GPU), dtype)
    loader = data.loader(digits.train, 64, shuffle=True, device=GPU)
    epochs = 3
    trainer = Trainer(
        model,
        optim.AdamW(list(model.named_parameters()), lr=2e-3, max_grad_norm=1.0),
        CrossEntropyLoss(label_smoothing=0.1),
        schedule=OneCycle(2e-3, epochs * -(-len(loader) // accumulate)),
        scaler=amp.GradScaler("cuda", init_scale=2.0**20, enabled=dtype == torch.float16),
        mixup=Mixup(
            0.2,
            cutmix,
            generator=torch.Generator().manual_seed(1),
            mean=digits.mean,
            std=digits.std,
            dtype=dtype,
        ),
        accumulate=accumulate,
        cuda_graph=cuda_graph,
        ema=0.99,
        telemetry=True,
        progress=False,
    )
    results = trainer.fit(loader, data.loader(digits.test, 1000, shuffle=False, device=GPU), epochs)
    return trainer, results


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_replayed_step_is_the_same_step(dtype, cutmix, accumulate):
    """With an overflow at the first scale, a schedule, mixup and cutmix, and a short last group."""
    eager, expected = trained(cuda_graph=False, dtype=dtype, cutmix=cutmix, accumulate=accumulate)
    graphed, results = trained(cuda_graph=True, dtype=dtype, cutmix=cutmix, accumulate=accumulate)
    assert graphed._step_fn.uses_graph
    assert int(graphed.optimizer.skipped_steps) == int(eager.optimizer.skipped_steps)
    assert graphed.scaler.get_scale() == eager.scaler.get_scale()
    for one, two in zip(eager.model.parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    assert results[-1].val_accuracy == pytest.approx(expected[-1].val_accuracy, abs=0.02)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(capsys):
    class Peeks(torch.nn.Module):
        def forward(self, x):
            float(x.sum())  # waits for the device
            return x

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), Peeks()).to(GPU)
    batches = [(torch.randn(8, 1, 3, 4), torch.randint(0, 3, (8,))) for _ in range(8)]
    trainer = Trainer(
        model, optim.SGD(model.parameters(), lr=0.1), CrossEntropyLoss(), cuda_graph=True
    )
    trainer.fit(batches, batches, 1)
    assert "no CUDA graph: " in capsys.readouterr().out
    assert trainer.step == int(trainer.optimizer.applied_steps) == 8


class FailsInCapture(torch.nn.Module):
    """Waits for the device, but only while a capture is under way."""

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            float(x.sum())
        return torch.nn.functional.dropout(x, 0.5)


def test_a_capture_that_fails_leaves_the_process_as_it_was(capsys):
    """Random numbers, current stream, allocator; and the step has happened once."""
    batches = [(torch.randn(8, 1, 3, 4), torch.randint(0, 3, (8,))) for _ in range(8)]
    trained = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), FailsInCapture())
        trainer = Trainer(
            model.to(GPU),
            optim.AdamW(model.parameters(), lr=0.1),
            CrossEntropyLoss(),
            scaler=amp.GradScaler("cuda"),
            cuda_graph=cuda_graph,
        )
        trainer.fit(batches, batches, 1)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert trainer.step == int(trainer.optimizer.applied_steps) == 8
    assert "no CUDA graph: " in capsys.readouterr().out
    assert torch.equal(*trained)  # the same dropout: no number was drawn twice
    check_process()


def test_hyperparameters_that_change_are_recorded_again():
    weights = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(12, 3).to(GPU)
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        trainer = Trainer(model, optimizer, CrossEntropyLoss(), cuda_graph=cuda_graph)
        batch = torch.randn(8, 12, device=GPU), torch.randint(0, 3, (8,), device=GPU)
        with trainer._step_fn.run(24):
            for step in range(24):
                if step == 8:
                    optimizer.param_groups[0]["weight_decay"] = 0.5
                if step == 16:
                    with torch.no_grad():
                        model.weight.mul_(0.5)
                trainer.train_step([batch])
        weights.append(model.weight.detach())
        assert trainer._step_fn.uses_graph == cuda_graph
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_data_that_fits_lies_on_the_device():
    digits = data.load("digits")
    images, labels = next(iter(data.loader(digits.train, 8, shuffle=True, device=GPU)))
    assert images.device.type == labels.device.type == "cuda"
    assert images.dtype == torch.uint8


@pytest.mark.slow
def test_a_benchmarked_step_in_every_mode():
    """Eager, compiled and graphed, of fastmp and of AMP: all losses agree before they are timed."""
    work = train.images("mlp", models.mlp, (1, 8, 8), 10, 64, own_mode="graphed")
    (found,) = train.step_case(work, "cuda", torch.float16, 0.1, compiled=True)
    assert {"fastmp", "fastmp, eager", "fastmp, compiled"} <= set(found.timings)
    assert {"reduce-overhead AMP float16", "compiled AMP float16"} <= set(found.timings)
    assert found.notes.startswith("fastmp is graphed; ")
