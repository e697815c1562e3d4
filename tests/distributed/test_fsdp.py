"""Training with the model in shards (FSDP2) on two ranks."""

import re

import pytest
import torch

from fastmp import optim
from fastmp.checkpoint.manager import Checkpoints
from fastmp.distributed import fsdp
from fastmp.recipe import ConfigError, TrainConfig
from tests.distributed.launcher import torchrun

SHARDED = ["sharded", "sharded accumulation", "sharded norm", "sharded bf16 norm"]


@pytest.mark.parametrize("case", SHARDED)
def test_shards_train_as_the_whole_model(results, case):
    one, two = (part[case] for part in results[:2])
    total = sum(value.numel() for value in one["weights"].values() if value.is_floating_point())
    statistics = 32 if "norm" in case else 0  # buffers are not split
    assert one["own"] + two["own"] == total - statistics
    assert max(one["own"], two["own"]) < 0.6 * total
    assert one["activations"] == [torch.bfloat16 if "bf16" in case else torch.float32]
    rtol = 2e-2 if "bf16" in case else 1e-5  # bf16 gradients, and Adam divides by them
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name])
        expected = one["alone"][name].double()
        assert (value - expected).norm() <= rtol * expected.norm()
    for (split, alone), (other, _) in zip(one["norms"], two["norms"], strict=True):
        assert split == other
        assert split == pytest.approx(alone, rel=rtol)
    assert one["losses"][0] == pytest.approx(one["losses"][1], rel=rtol)


@pytest.mark.parametrize("case", SHARDED)
def test_shards_are_evaluated_with_unequal_numbers_of_batches(results, case):
    for part in results[:2]:
        found, expected = part[case]["evaluation"], part[case]["expected"]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.accuracy == pytest.approx(expected.accuracy)


def test_an_overflow_on_one_rank_skips_the_step_on_all(results):
    one, two = (part["sharded overflow"] for part in results[:2])
    assert one == two
    assert [step["unchanged"] for step in one] == [False, False, True, False, False]
    assert [step["scale"] for step in one] == [256.0, 256.0, 128.0, 128.0, 128.0]
    assert one[-1]["skipped"] == 1
    assert one[-1]["first_nonfinite"] == "1.weight"


@pytest.mark.parametrize("case", ["sharded resumes", "sharded bf16 moments"])
def test_shards_resume_bitwise_and_without_shards(results, case):
    one, two = (part[case] for part in results[:2])
    torch.testing.assert_close(one["states"][0], one["states"][1], rtol=0, atol=0)
    torch.testing.assert_close(one["states"], two["states"], rtol=0, atol=0)
    assert one["step"] == 5
    moment = one["whole"][0]["exp_avg"]
    assert moment.shape == (16, 12)
    assert moment.dtype == (torch.bfloat16 if "moments" in case else torch.float32)


def test_shards_have_averages_that_are_evaluated_saved_and_resumed(results):
    one, two = (part["sharded average"] for part in results[:2])
    torch.testing.assert_close(one["states"], two["states"], rtol=0, atol=0)
    split, again, whole, alone = one["states"]
    torch.testing.assert_close(again, split, rtol=0, atol=0)
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split, alone, rtol=1e-5, atol=1e-6)
    for found, expected in one["evaluations"]:
        assert found == pytest.approx(expected, rel=1e-5)
    assert all(one["unchanged"] + two["unchanged"])
    assert "average" not in one["optimizer"]  # it is saved once, by its name
    torch.testing.assert_close(one["loose"][0]["average"], split[1]["body.1.weight"])


def test_shards_need_several_processes():
    with pytest.raises(RuntimeError, match="start with torchrun"):
        fsdp.shard(torch.nn.Linear(2, 2), torch.bfloat16)
    with pytest.raises(ConfigError, match="shard: expected several processes"):
        TrainConfig(shard=True).resolved()
    for other in ("cuda_graph", "telemetry", "unfreeze_every"):
        with pytest.raises(ConfigError, match=f"shard: expected none of .*{other}"):
            TrainConfig(shard=True, **{other: True})


@pytest.mark.slow
def test_the_command_line_trains_in_shards(tmp_path):
    flags = ["--model", "convnet", "--epochs", "2", "--dtype", "bf16", "--threads", "1", "--shard"]
    flags += ["--ema", "0.9"]
    where = ["--out", tmp_path / "run"]
    done = torchrun("-m", "fastmp", "train", *flags, *where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"val accuracy +([\d.]+)%", done.stdout)[1]) > 80
    state = Checkpoints(tmp_path / "run" / "checkpoints").load_newest()
    assert state["model"]["0.weight"].shape == (32, 1, 3, 3)
    again = torchrun("-m", "fastmp", "train", *where, "--resume", "--epochs", "3")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step" in again.stdout


def test_muon_refuses_parts_of_matrices():
    (matrix,) = torch.nn.Linear(3, 4, bias=False).parameters()
    optimizer = optim.Muon([matrix])
    with pytest.raises(ValueError, match="Muon needs whole matrices, and a rank has some rows"):
        fsdp.Shards(torch.nn.ReLU()).attach(optimizer)
    part = torch.zeros(2, 4)
    part.device_mesh = "as of a DTensor"
    with pytest.raises(ValueError, match="got a DTensor, of which this rank has a part"):
        optimizer.add_param_group({"params": [part]})
    with pytest.raises(ConfigError, match="another optimizer than muon"):
        TrainConfig(shard=True, optimizer="muon")
