"""Data parallel training on two ranks."""

import pytest
import torch

from fastmp import checkpoint
from fastmp.checkpoint.manager import Checkpoints
from fastmp.distributed import data_parallel
from tests.distributed import ranks


def test_two_ranks_equal_one_with_twice_the_batch(results):
    one, two = (part["twice"] for part in results[:2])
    assert one["digests"] == two["digests"]  # bitwise, after every step
    assert len(set(one["digests"])) == ranks.STEPS
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, one["alone"][name], rtol=1e-5, atol=1e-6)
    assert one["losses"][0] == two["losses"][0] == pytest.approx(one["losses"][1], rel=1e-5)


def test_muon_is_equal_on_both_ranks(results):
    one, two = (part["muon"] for part in results[:2])
    assert one == two
    assert len(set(one["digests"])) == 6
    assert one["rules"] == ["muon", "adamw", "adamw"]


@pytest.mark.parametrize(
    ("case", "name", "dtype"),
    [("bf16", "exp_avg_sq", torch.bfloat16), ("8-bit", "exp_avg_sq_8bit", torch.uint8)],
)
def test_narrow_moments_and_averages_are_equal_on_both_ranks(results, case, name, dtype):
    one, two = (part[f"{case} moments"] for part in results[:2])
    assert one["digests"] == two["digests"]
    assert len(set(one["digests"])) == 6
    torch.testing.assert_close(one["averages"], two["averages"], rtol=0, atol=0)
    moments = [part["state"]["state"][0][name] for part in (one, two)]
    assert moments[0].dtype == dtype
    assert torch.equal(*moments)


def test_an_overflow_on_one_rank_skips_the_step_on_both(results):
    one, two = (part["overflow"] for part in results[:2])
    assert one == two
    assert [step["unchanged"] for step in one] == [False, False, True, False, False]
    assert [step["scale"] for step in one] == [256.0, 256.0, 128.0, 128.0, 128.0]
    assert (one[-1]["skipped"], one[-1]["applied"]) == (1, 4)
    assert one[-1]["first_nonfinite"] == "1.weight"


def test_gradients_are_accumulated_before_the_all_reduce(results):
    one, two = (part["accumulation"] for part in results[:2])
    assert one["digest"] == two["digest"]
    for name, value in one["weights"].items():
        # the all-reduced mean is rounded to bf16 once more
        torch.testing.assert_close(value, one["alone"][name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("case", "rtol"), [("unequal", 1e-5), ("unequal fp16", 3e-3), ("unequal shards", 1e-5)]
)
def test_unequal_parts_on_the_ranks_train_as_one_batch(results, case, rtol):
    for part in (results[0][case], results[1][case]):
        assert part["losses"][0] == pytest.approx(part["losses"][1], rel=rtol)
        assert part["norms"][0] == pytest.approx(part["norms"][1], rel=rtol)
        for name, value in part["weights"].items():
            torch.testing.assert_close(value, part["alone"][name], rtol=rtol, atol=rtol)


def test_evaluation_covers_the_batches_of_all_ranks(results):
    for part in results[:2]:
        result = part["evaluation"]
        assert result["together"].loss == pytest.approx(result["alone"].loss, rel=1e-6)
        assert result["together"].accuracy == pytest.approx(result["alone"].accuracy)


def test_sigterm_on_one_rank_stops_both_at_the_same_step(results):
    one, two = (part["terminated"] for part in results[:2])
    assert one == two
    assert one["kind"] == "Terminated"
    assert f"terminated at step {one['step']}; the state is saved in" in one["message"]
    newest = Checkpoints(results[2] / "run" / "checkpoints").newest()
    state = checkpoint.load(newest)
    assert state["progress"]["step"] == one["step"] < 10
    assert len(state["ranks"]) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16, 96, 1024])
def test_the_mean_is_divided_by_about_the_square_root_twice(size):
    before, after = data_parallel._divisors(size)
    assert before * after == size
    assert before & (before - 1) == 0  # exact
    assert size == 1 or size**0.5 / 2 <= after <= 2 * size**0.5
