"""--dtype auto: by what the machine is, or measured once and kept."""

import json

import pytest
import torch

from fastmp import data, files, recipe
from fastmp.backends import cpu
from fastmp.backends.cpu import gemm_choice
from fastmp.distributed.rendezvous import World
from fastmp.recipe import TrainConfig, dtype_choice

CPU = torch.device("cpu")


def processor(monkeypatch, *features):
    cpu = gemm_choice.Processor("a processor", "", frozenset(features))
    monkeypatch.setattr(gemm_choice, "processor", lambda: cpu)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path))
    return tmp_path / dtype_choice.FILE


def chosen(**settings):
    digits = data.load("digits")
    config = TrainConfig(model="mlp", **settings).resolved()
    return recipe.choose_dtype(config, digits, recipe.build_model(config, digits), CPU, World())


def test_a_processor_without_bf16_products_is_not_measured(monkeypatch, cache, capsys):
    processor(monkeypatch, "avx2", "avx512f", "avx512_fp16")
    assert chosen() == "fp32"
    assert capsys.readouterr().out == "dtype: fp32, no bf16 products here\n"
    assert not cache.exists()


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "bf16"])
def test_one_measurement_is_kept_and_said(monkeypatch, cache, capsys, feature):
    processor(monkeypatch, feature)
    first = chosen()
    assert f"kept in {cache}" in capsys.readouterr().out
    ((key, kept),) = json.loads(cache.read_text()).items()
    assert kept["dtype"] == first
    kernels = cpu.instruction_set(cpu.load()[0])
    for part in ("a processor", "threads", "torch", kernels, "mlp of 85002", "64 images of 1x8x8"):
        assert part in key
    other = {"fp32": "bf16", "bf16": "fp32"}[first]
    cache.write_text(json.dumps({key: {"dtype": other}}))
    assert chosen() == other  # not measured again
    assert capsys.readouterr().out == f"dtype: {other}, as measured before: {cache}\n"
    chosen(batch_size=8)
    assert len(json.loads(cache.read_text())) == 2
    monkeypatch.setattr(cpu, "instruction_set", lambda library: "reference")
    chosen()  # before a compiler was there
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.parametrize("content", [b"", b"\x80", b"[1]", b'{"a": 1}', b"{"])
def test_a_damaged_file_is_measured_again(monkeypatch, cache, content):
    cache.write_bytes(content)
    assert files.recall(cache.name, "key") is None
    assert files.remember(cache.name, "key", {"dtype": "bf16"})
    assert files.recall(cache.name, "key") == {"dtype": "bf16"}


@pytest.mark.parametrize("kept", [{"dtype": "fp8"}, {}, [], "bf16"])
def test_a_kept_answer_that_is_none_is_measured_again(monkeypatch, cache, kept):
    processor(monkeypatch, "avx512_bf16")
    assert chosen() in ("fp32", "bf16")
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: kept}))
    chosen()
    assert json.loads(cache.read_text())[key]["dtype"] in ("fp32", "bf16")


def test_a_cache_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setenv("FASTMP_CACHE", "/proc/cache")
    processor(monkeypatch, "avx512_bf16")
    assert chosen() in ("fp32", "bf16")
    assert "; not kept: /proc/cache cannot be written" in capsys.readouterr().out


def test_a_named_type_is_taken(cache):
    assert chosen(dtype="fp16") == "fp16"
    assert not cache.exists()
