"""``fastmp verify`` and ``fastmp doctor``: that they pass here, and that they notice."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no command line")

import fastmp
from fastmp import backends, cli, doctor, functional, optim, verification
from fastmp.backends import cpu
from fastmp.cli import doctor as doctor_command
from fastmp.cli import verify as verify_command
from fastmp.verification import Check

SMALL = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shapes that take a tenth of the time."""
    monkeypatch.setattr(verification, "LINEAR", ((64, 256, 128), (5, 13, 7)))
    monkeypatch.setattr(verification, "LOSS", ((16, 10), (4, 1001)))


def failed(**options):
    return {(c.op, c.value) for c in fastmp.verify(**options) if not c.passed}


def test_everything_passes_here():
    checks = fastmp.verify(model="mlp")
    assert [c for c in checks if not c.passed] == []
    ops = {c.op for c in checks}
    for part in ("linear + gelu", "loss", "mixup", "AdamW", "SGD", "overflow", "model mlp"):
        assert any(part in op for op in ops)
    assert {c.dtype for c in checks} == set(verification.DTYPES)


def test_the_same_seed_gives_the_same_checks_and_leaves_the_generator():
    before = torch.get_rng_state()
    assert fastmp.verify(dtypes=SMALL, model="mlp") == fastmp.verify(dtypes=SMALL, model="mlp")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_of_ones_own():
    def factory(in_shape, classes):
        flat = torch.nn.Flatten()
        return torch.nn.Sequential(flat, torch.nn.Linear(math.prod(in_shape), classes))

    checks = fastmp.verify(dtypes=SMALL, model=factory, in_shape=(2, 3, 4), classes=5)
    assert {c.shape for c in checks if c.op == "model Sequential"} == {(16, 2, 3, 4)}


def off_by(real, factor):
    return lambda *args, **options: real(*args, **options) * factor


@pytest.mark.parametrize(
    ("name", "op"),
    [("linear", "linear + gelu"), ("cross_entropy", "mixup + smoothing loss")],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, name, op):
    monkeypatch.setattr(functional, name, off_by(getattr(functional, name), 1 + 1e-5))
    assert any(found == op for found, _ in failed(dtypes=(torch.float32,)))


def test_a_gradient_rounded_before_the_difference_is_noticed(monkeypatch):
    torchs = torch.nn.functional.cross_entropy

    def rounded(logits, *targets, target_b=None, lam=None, grad_scale=None, **options):
        return torchs(logits, *targets, **options)

    monkeypatch.setattr(functional, "cross_entropy", rounded)
    halves = (torch.bfloat16, torch.float16)
    assert ("confident loss", "gradient of the true class") in failed(dtypes=halves)


def test_a_wrong_mix_is_noticed(monkeypatch):
    monkeypatch.setattr(functional, "mix", off_by(functional.mix, 1.01))
    assert ("mixup + normalise", "images") in failed(dtypes=SMALL)


def test_a_wrong_step_is_noticed(monkeypatch):
    class Hasty(optim.AdamW):
        def __init__(self, params, **options):
            super().__init__(params, **{**options, "lr": options["lr"] * (1 + 1e-4)})

    monkeypatch.setattr(optim, "AdamW", Hasty)
    assert failed(dtypes=SMALL) == {("AdamW, 20 steps, clip", "masters")}


def test_a_step_taken_in_spite_of_an_overflow_is_noticed(monkeypatch):
    class Reckless(optim.AdamW):
        def __init__(self, params, **options):
            super().__init__(params, **options, skip_nonfinite=False)

    monkeypatch.setattr(optim, "AdamW", Reckless)
    assert ("an overflow changes nothing", "count") in failed(dtypes=SMALL)


def test_an_error_that_is_no_number_fails():
    assert not Check("op", "y", (1,), torch.float32, math.nan, 1e-7, 1.0).passed
    assert Check("op", "y", (1,), torch.float32, 1e-8, 1e-7, 1e-6).ratio == pytest.approx(0.1)
    assert Check("op", "y", (1,), torch.float32, 0.0, 0.0, 1e-6).ratio is None


# ---- on the command line ----


def test_the_command_prints_the_worst_value_of_each(capsys):
    assert cli.main(["verify", "--dtypes", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("linear + gelu") == 2  # shapes, not values
    assert "checks passed" in shown
    assert "FAILED" not in shown
    assert cli.main(["verify", "--dtypes", "bf16", "--every"]) == 0
    assert capsys.readouterr().out.count("linear + gelu") == 8


def test_the_command_fails_when_a_check_does(capsys, monkeypatch):
    monkeypatch.setattr(functional, "mix", off_by(functional.mix, math.nan))
    assert cli.main(["verify", "--dtypes", "fp32"]) == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert "mixup + normalise, images, torch.float32" in shown.err


def test_the_nearest_to_its_limit_is_shown():
    checks = [
        Check("op", value, (1,), torch.float32, error, 1.0, 2.0)
        for value, error in (("a", 0.1), ("b", math.nan), ("c", 1.9))
    ]
    assert [c.value for c in verify_command.closest(checks)] == ["b"]
    assert [c.value for c in verify_command.closest(checks[::2])] == ["c"]


def test_a_model_that_does_not_exist_is_bad_input(capsys):
    assert cli.main(["verify", "--model", "nowhere:net"]) == 2
    assert "there is no module 'nowhere'" in capsys.readouterr().err


# ---- doctor ----


def test_doctor_says_what_serves_each_operation(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for topic in ("versions", "devices", "operations", "tools", "folders"):
        assert f"{topic}\n" in shown
    for op in ("linear", "loss", "mix", "update"):
        assert f"{op} on cpu" in shown


def test_doctor_names_the_fix_for_a_missing_library(monkeypatch, tmp_path):
    reason = "libfastmp_cpu.so is not there"
    served = backends.OpBackend("loss", "cpu", "reference", reason)
    monkeypatch.setattr(cpu, "load", lambda: (None, reason))
    monkeypatch.setattr(backends, "report", lambda: [served])
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    findings = {finding.name: finding for finding in doctor.examine()}
    assert "pip install" in findings["loss on cpu"].fix
    assert findings["C++ compiler"].problem == "the native library cannot be built here"
    page = doctor_command.page(list(findings.values()))
    assert "! loss on cpu" in page
    assert page.index("folders") < page.index("loss on cpu: runs in plain PyTorch")
    assert "nothing to fix" not in page


def test_doctor_creates_no_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path / "kernels"))
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["compiled CUDA kernels"].found == f"{tmp_path / 'kernels'}, not there yet"
    assert findings["compiled CUDA kernels"].problem is None
    assert not (tmp_path / "kernels").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path / "file" / "kernels"))
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["compiled CUDA kernels"].fix == "export FASTMP_CACHE=/a/folder/of/yours"
