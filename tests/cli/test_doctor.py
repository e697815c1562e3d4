"""``fastmp doctor --model``: bytes of weights, gradients and state for every choice of dtypes."""

import pytest
from torch import nn

from fastmp import cli, optim
from fastmp.bench import memory
from fastmp.cli import doctor
from fastmp.models import ModelError


def layer():
    return nn.Linear(8192, 128, bias=False)  # 1 MiB for a byte of each weight


def test_doctor_counts_the_bytes_of_a_model(monkeypatch, tmp_path, capsys):
    (tmp_path / "given.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128))\n"
        "def other(size):\n    return nn.Linear(size, size)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--model", "given:net"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "|" in line]
    (bits,) = (row for row in rows if row[:2] == ["bf16", "8bit"])
    assert bits[-1] == f"{(64 * 128 + 3 * 128) * 4 / 2**20:.1f}"
    memories = {(m.name, m.state_dtype): m for m in memory.table(given_model(), optim.AdamW)}
    assert memories["bf16", "8bit"] == (
        "bf16", "8bit",
        2 * 64 * 128 + 2 * 128 + 4 * (4 * 128) + 8,  # the batch norm's buffers too
        2 * 64 * 128 + 2 * 128 + 4 * (2 * 128),
        2 * 64 * 128 + 2 * 128,
        2 * 64 * 128 + 2 * 256 + 8 * 3 * 128,  # one scale for 32; vectors in fp32
        4 * (64 * 128 + 3 * 128),
    )  # fmt: skip
    assert cli.main(["doctor", "--model", "given:other"]) != 0
    assert "to be a function of (), found one that takes other arguments" in capsys.readouterr().err


def given_model():
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128))


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
