"""Equal runs end with equal bits."""

import pytest

from fastmp.training import log
from tests.robustness.processes import at_once


@pytest.mark.slow
@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_three_runs_end_with_the_same_bits(tmp_path, dtype):
    """At the same time, with mixup, cutmix and averaged weights: every tensor and every loss."""
    flags = ["--epochs", "1", "--mixup", "0.2", "--cutmix", "1.0", "--ema", "0.99"]
    runs = [tmp_path / str(n) for n in range(3)]
    at_once(*(["train", "--dtype", dtype, *flags, "--out", str(out)] for out in runs))
    ends = []
    for out in runs:
        newest = max((out / "checkpoints").iterdir())
        tensors = {p.name: p.read_bytes() for p in newest.rglob("*.safetensors")}
        rows = log.read(out / log.FILE)
        losses = [{k: v for k, v in row.items() if "loss" in k or "acc" in k} for row in rows]
        assert tensors
        assert any(losses)
        ends.append((tensors, losses))
    assert ends[0] == ends[1] == ends[2]
