"""What happens without the native library, and what is said about it."""

import pytest

from fastmp.backends import cpu


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_library_path", lambda: tmp_path / "libfastmp_cpu.so")
    return cpu.load.__wrapped__  # past the cache: the rest of the suite keeps its library


def test_a_missing_library_is_said_once_and_loudly(no_library):
    with pytest.warns(RuntimeWarning, match=r"slow reference backend.*apt install g\+\+"):
        library, reason = no_library()
    assert library is None
    assert "libfastmp_cpu.so" in reason


def test_a_demanded_library_that_is_missing_is_an_error(no_library, monkeypatch):
    monkeypatch.setenv("FASTMP_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="FASTMP_BACKEND=cpu, but there is no usable"):
        no_library()


def test_a_file_that_is_no_library_is_not_loaded(no_library, tmp_path):
    (tmp_path / "libfastmp_cpu.so").write_bytes(b"not an ELF file")
    with pytest.warns(RuntimeWarning, match="slow reference backend"):
        assert no_library()[0] is None
