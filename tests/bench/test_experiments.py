"""The parts of the experiments that need neither hours nor a data set."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.experiments import muon, pool, state_kinds


def finish_after(seconds: float) -> tuple[float, int]:
    time.sleep(seconds)
    return seconds, torch.get_num_threads()


@pytest.mark.parametrize("processes", [1, 2])
def test_results_are_in_the_order_of_the_jobs(processes: int, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    with pool(processes) as run_all:
        results = run_all(finish_after, [(0.3,), (0.0,), (0.1,)])
    threads = torch.get_num_threads() if processes == 1 else 3
    assert results == [(0.3, threads), (0.0, threads), (0.1, threads)]


def test_the_length_that_reaches_a_target_is_interpolated():
    def reached(target: float) -> float | None:
        return muon.crossing([100, 200, 400], [0.80, 0.84, 0.90], target)

    assert reached(0.82) == pytest.approx(150)
    assert reached(0.87) == pytest.approx(300)
    assert (reached(0.7), reached(0.91)) == (100, None)


def test_muon_is_compared_at_the_best_rate_of_each():
    best = {"adamw": 2e-3, "muon": 8e-3}

    def run_all(function, jobs):
        """Accuracy grows with the length, twice as fast for Muon; beside the best rate it falls."""
        made = [muon.Run(*job[:-1], accuracy=0.0) for job in jobs]
        slope = {"adamw": 1e-3, "muon": 2e-3}
        return [
            run._replace(
                accuracy=slope[run.optimizer] * run.steps - (run.lr != best[run.optimizer])
            )
            for run in made
        ]

    lrs = {"adamw": (1e-3, 2e-3), "muon": (4e-3, 8e-3)}
    result = muon.compare("vit", muon.Plan(lrs, 100, None), 2, "cpu", run_all)
    assert result["best_lr"] == best
    assert result["steps"] == pytest.approx({"adamw": 100, "muon": 50})
    assert len(result["runs"]) == 2 * (4 + 2 * 5)
    verdict = muon.verdict(result, {"adamw": 1.0, "muon": 2.0})
    assert (
        "0.50x the steps (goal 0.75x: reached), 1.00x the seconds (goal 0.80x: **missed**)"
        in verdict
    )


def test_the_kinds_of_a_seed_are_one_run():
    def run_all(function, jobs):
        return [f"{name} {seed} {steps}" for name, seed, steps in jobs]

    assert state_kinds.by_kind(run_all, None, 2, 7)[1] == {
        "seed": 1, "fp32": "fp32 1 7", "bf16": "bf16 1 7", "8bit": "8bit 1 7",
    }  # fmt: skip
