"""Whose matrix product runs: a table by the processor, else one measurement that is kept."""

import json

import pytest
import torch

from fastmp.backends.cpu import gemm_choice
from fastmp.backends.cpu.gemm_choice import Processor, from_table
from tests.native import needs_native

FP32, BF16, FP16 = gemm_choice.DTYPES
AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw"
ZEN4 = Processor("AMD EPYC 9R14", "AuthenticAMD", frozenset(f"{AVX512} avx512_bf16".split()))
SAPPHIRE_RAPIDS = Processor(
    "Intel Xeon Platinum 8488C",
    "GenuineIntel",
    frozenset(f"{AVX512} avx512_bf16 avx512_fp16 amx_tile amx_bf16".split()),
)
HASWELL = Processor("Intel Core i7", "GenuineIntel", frozenset(AVX2.split()))
ICE_LAKE = Processor("Intel Xeon Gold", "GenuineIntel", frozenset(AVX512.split()))
GRAVITON = Processor("Neoverse-V1", "", frozenset())


@pytest.mark.parametrize(
    ("processor", "own"),
    [
        (ZEN4, {FP32: True, BF16: True, FP16: True}),
        (SAPPHIRE_RAPIDS, {FP32: False, BF16: False, FP16: False}),
        (HASWELL, {FP32: False, BF16: False, FP16: True}),
        (ICE_LAKE, {FP32: False, BF16: None, FP16: None}),
        (GRAVITON, {FP32: None, BF16: None, FP16: None}),
    ],
    ids=lambda value: value.name if isinstance(value, Processor) else "",
)
def test_the_table(processor, own):
    assert {dtype: from_table(processor, dtype) for dtype in gemm_choice.DTYPES} == own


def test_the_report_says_whose_product_runs():
    ours = "products of its own in float16, torch's in float32, bfloat16"
    assert gemm_choice.describe(HASWELL) == ours
    unknown = "products torch's in float32, measured at first use in bfloat16, float16"
    assert gemm_choice.describe(ICE_LAKE) == unknown


@pytest.fixture
def unknown_processor(monkeypatch, tmp_path):
    """A processor of no row, an empty cache folder; returns the file and the measured dtypes."""
    measured = []

    def gain(dtype):
        measured.append(dtype)
        return 1.5 if dtype == FP16 else 1.0

    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gemm_choice, "processor", lambda: GRAVITON)
    monkeypatch.setattr(gemm_choice, "_gain", gain)
    gemm_choice.prefers_own.cache_clear()
    yield tmp_path / "cache" / "gemm-choice.json", measured
    gemm_choice.prefers_own.cache_clear()


def test_an_unknown_processor_is_measured_once(unknown_processor):
    path, measured = unknown_processor
    for _ in range(2):  # the second as in another process
        assert [gemm_choice.prefers_own(dtype) for dtype in (FP16, BF16)] == [True, False]
        gemm_choice.prefers_own.cache_clear()
    assert measured == [FP16, BF16]
    ((key, kept),) = json.loads(path.read_text()).items()
    assert key.startswith(f"Neoverse-V1, {torch.get_num_threads()} threads, torch ")
    assert kept == {"torch.float16": True, "torch.bfloat16": False}


@pytest.mark.parametrize("content", ["", "[1]", '{"Neoverse-V1": 3}', "{"])
def test_a_damaged_cache_is_measured_again(unknown_processor, content):
    path, measured = unknown_processor
    path.parent.mkdir()
    path.write_text(content)
    assert gemm_choice.prefers_own(FP16)
    assert measured == [FP16]
    assert json.loads(path.read_text())  # whole again


def test_a_cache_that_cannot_be_written_is_no_error(unknown_processor):
    path, measured = unknown_processor
    path.parent.write_text("a file where the folder should be")
    assert gemm_choice.prefers_own(FP16)
    assert measured == [FP16]


@needs_native
def test_both_products_are_measured():
    """A ratio of two times of the same product: more than a hundredth, less than a hundred."""
    for dtype in gemm_choice.DTYPES:
        assert 0.01 < gemm_choice._gain(dtype) < 100
