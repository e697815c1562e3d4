"""The registry: missing and unsupported backends, their warnings, errors and report."""

import pytest
import torch

from fastmp import backends
from fastmp.backends import cpu, registry, triton


def served(op, device):
    (row,) = [row for row in backends.report() if (row.op, row.device) == (op, device)]
    return row


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(cpu, "_library_path", lambda: tmp_path / "libfastmp_cpu.so")
    return cpu.load.__wrapped__  # past the cache: the rest of the suite keeps its library


def test_a_missing_library_warns_once(no_library):
    with pytest.warns(RuntimeWarning, match=r"slow reference backend.*apt install g\+\+"):
        library, reason = no_library()
    assert library is None
    assert "libfastmp_cpu.so" in reason


def test_a_forced_library_that_is_missing_is_an_error(no_library, monkeypatch):
    monkeypatch.setenv("FASTMP_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="FASTMP_BACKEND=cpu, but no usable"):
        no_library()


def test_a_file_that_is_no_library_is_not_loaded(no_library, tmp_path):
    (tmp_path / "libfastmp_cpu.so").write_bytes(b"not an ELF file")
    with pytest.warns(RuntimeWarning, match="slow reference backend"):
        assert no_library()[0] is None


def test_unavailable_triton_is_reported(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    version, reason = triton.load.__wrapped__()
    assert version is None
    assert reason == "this PyTorch is built without CUDA"
    monkeypatch.setenv("FASTMP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="FASTMP_BACKEND=triton, but this PyTorch is built"):
        triton.load.__wrapped__()


def test_a_gpu_that_is_too_old_gets_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.mark_available("triton", "Triton")
    assert served("loss", "cuda").backend == "triton"
    supports_device = triton.supports_device.__wrapped__
    with pytest.warns(RuntimeWarning, match="Tesla T4 has compute capability 7.5, the kernels"):
        assert "7.5" in supports_device(torch.device("cuda", 0))
    row = served("loss", "cuda")
    assert row.backend == "reference"
    assert "7.5" in row.reason
    monkeypatch.setenv("FASTMP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="Tesla T4"):
        supports_device(torch.device("cuda", 0))


def test_a_narrow_kernel_is_asked_first():
    def supports(logits, *_):
        return None if logits.shape[1] > 4 else "short rows"

    narrow = registry._Kernel("dummy", lambda *_: "narrow", supports, "long rows")
    unavailable = narrow._replace(call=None)
    spec = (torch.zeros(2, dtype=torch.int64), None, None, None, -100, 1, 0.0)
    for kernel, classes, expected in (
        (narrow, 5, "narrow"),
        (narrow, 4, "general"),
        (unavailable, 5, "general"),
        (None, 5, "general"),
    ):
        call = registry.serve("loss_forward", lambda *_: "general", lambda *_: None, kernel)
        assert call(torch.zeros(2, classes), None, True, *spec) == expected


def test_the_report_names_a_narrow_kernel(monkeypatch):
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.mark_available("triton", "Triton")
    assert served("loss", "cuda").reason == "Triton"
    registry.mark_available("cuda", "NVRTC")
    narrow = registry._narrow_kernels["loss_forward", "cuda"]._replace(call=lambda *_: None)
    monkeypatch.setitem(registry._narrow_kernels, ("loss_forward", "cuda"), narrow)
    row = served("loss", "cuda")
    assert row.backend == "triton"
    assert row.reason.startswith("Triton; rows of more than 4,096 classes")
    assert row.reason.endswith(": cuda")
