"""``fastmp doctor --model``: bytes of weights, gradients and state for every choice of dtypes."""

import pytest
from torch import nn

from fastmp.cli import doctor
from fastmp.models import ModelError

HIDDEN = 8192


def layer():
    return nn.Linear(HIDDEN, 128, bias=False)


def test_the_bytes_of_a_model(capsys):
    doctor.main(["--model", f"{__name__}:layer"])
    first, *_, heading = capsys.readouterr().out.splitlines()[:3]
    assert first.startswith(f"{HIDDEN * 128:,} parameters")  # 1 MiB for a byte of each
    assert heading.split() == [
        "weights", "moments", "|", "weights", "gradients", "masters", "moments", "total", "|",
        "ema", "adds",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "bytes_each"),
    [("fp32", (4, 4, 0)), ("fp16", (2, 2, 4)), ("fp16 split", (2, 2, 2)), ("bf16", (2, 2, 2))],
)
@pytest.mark.parametrize(("moments", "state_bytes"), [("fp32", 8), ("bf16", 4), ("8bit", 2.0625)])
def test_a_row(weights, bytes_each, moments, state_bytes):
    rows = [line.split("|") for line in doctor.memory_page(layer()).splitlines()[3:]]
    (found,) = (row for row in rows if row[0].rsplit(maxsplit=1) == [f"{weights:>10}", moments])
    sizes = [*bytes_each, state_bytes]
    assert found[1].split() == [f"{size:.1f}" for size in [*sizes, sum(sizes)]]
    assert found[2].split() == ["4.0"]


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ModelError, match="expected parameters to train"):
        doctor.main(["--model", "torch.nn:Identity"])
