"""Parameters that FSDP1 and ZeroRedundancyOptimizer split over the ranks: clip and overflow."""

import pytest
import torch

from tests.distributed import split_ranks
from tests.distributed.launcher import torchrun


def run(folder, processes):
    done = torchrun(split_ranks.__file__, folder, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"split-{r}.pt", weights_only=False) for r in range(processes)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("split"), 2)


def check_trains_as_the_whole_model(found, rtol):
    """Norms of the whole gradient, and weights clipped by them: the schedule's column counts."""
    assert found["norms"] == pytest.approx(found["expected norms"], rel=rtol)
    assert found["applied"] == split_ranks.STEPS
    assert max(split_ranks.CLIPS) < min(found["norms"])
    torch.testing.assert_close(found["weights"], found["expected weights"], rtol=rtol, atol=rtol)


CASES = [f"{s} {o}" for s in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD") for o in (True, False)]
CASES += [f"{kind} {name}" for kind in ("fsdp", "zero") for name in split_ranks.OPTIMIZERS[1:]]
CASES += ["zero SGD", "mixed", "made before", "fsdp torch.float16", "fsdp torch.bfloat16"]


@pytest.mark.parametrize("case", CASES)
def test_split_parameters_are_clipped_to_the_norm_of_all_ranks(results, case):
    one, two = (part["splits"][case] for part in results)
    rtol = {"fsdp torch.float16": 5e-3, "fsdp torch.bfloat16": 2e-2}.get(case, 1e-5)
    check_trains_as_the_whole_model(one, rtol)
    assert one["norms"] == two["norms"]  # bitwise
    assert torch.equal(one["weights"], two["weights"])


@pytest.mark.slow
def test_replicas_of_shards_count_once(tmp_path):
    for part in run(tmp_path, 4):
        for found in part["splits"].values():
            check_trains_as_the_whole_model(found, 1e-5)


@pytest.mark.parametrize(
    ("case", "applied", "scales"),
    [
        ("fsdp no scaler", [1, 1, 2], [None] * 3),
        ("fsdp ShardedGradScaler", [1, 1, 2], [8.0, 4.0, 4.0]),
        ("fsdp GradScaler", [1, 1, 2], [8.0, 4.0, 4.0]),
        ("zero", [1, 1, 2], [None] * 3),
    ],
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(results, case, applied, scales):
    one, two = (part["overflows"][case] for part in results)
    assert one == two
    assert [step["unchanged"] for step in one] == [False, True, False]
    assert [step["applied"] for step in one] == applied
    assert [step["scale"] for step in one] == scales


def test_a_rank_without_parameters_steps_along(results):
    for part in results:
        # each rank's gradient of the only weight is 2, so is their mean
        assert part["without"] == {"fsdp": (2.0, 1, 4.0), "zero": (2.0, 1)}


def test_what_no_rank_can_know_is_refused(results):
    for part in results:
        (scaler, lost, trainer), unchanged = part["refusals"]
        assert "Use fastmp.amp.GradScaler, or torch's ShardedGradScaler" in scaler
        assert "Give the optimizer the parameters of the FSDP module that is trained" in lost
        assert "expected the model itself, got it in FullyShardedDataParallel" in trainer
        assert unchanged
