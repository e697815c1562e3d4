"""The benchmarks: fair baselines, checked results, files and pictures."""

import pytest
import torch

from fastmp import data, models
from fastmp.bench import (
    accuracy,
    harness,
    learners,
    linear,
    loss,
    networks,
    optimizer,
    results,
    rounding,
    scaling,
    subjects,
    third_party,
    train,
)
from fastmp.bench.clocks import Sample, wall_time
from fastmp.bench.harness import Case, Row, Timing
from fastmp.bench.workloads import Text
from tests.bench.bench_cases import row

# ---- rows ----


def test_the_fastest_baseline_is_the_baseline():
    assert row(eager=5.0, compiled=3.0).baseline == "compiled"
    assert row(eager=5.0, compiled=3.0).ratio == 3.0
    slow = row(ours=2.0, eager=1.0)
    assert slow.ratio == 0.5


def test_a_candidate_of_different_work_is_shown_and_not_ranked():
    timings = {k: Timing(v, v, v) for k, v in (("fastmp", 1.0), ("AMP", 4.0), ("8 bits", 2.0))}
    made = Row("optimizer", "case", timings, not_comparable=["8 bits"])
    assert (made.baseline, made.ratio) == ("AMP", 4.0)
    assert "8 bits 2.00x (not ranked)" in results.table([made], 1.0)


def test_a_goal_is_of_its_own_baseline_or_of_the_best():
    timings = {k: Timing(v, v, v) for k, v in (("fastmp", 1.0), ("eager", 4.0), ("compiled", 2.0))}
    made = Row("loss", "case", timings, 10**7, {"eager": 4.5, "best": 2.0}, copy_fraction=0.5)
    found = made.goal_results(copy=10.0)  # it moves 10 MB in 1 ms, 10 GB/s
    assert [(v.goal, v.measured, v.reached) for v in found] == [
        ("4.5x eager", "4.00x", False),
        ("2x compiled", "2.00x", True),
        ("50% of a copy", "100%", True),
    ]
    assert "4.5x eager: 4.00x **missed**, 2x compiled: 2.00x reached" in results.table([made], 10.0)


def test_a_goal_names_its_time_where_there_are_two():
    """Ours is faster on the device and slower on the host: a column and a goal for each."""
    timings = {"fastmp": Timing(1, 1, 1, host=4.0), "eager": Timing(3, 3, 3, host=2.0)}
    goals = {"goals": {"best": 2.0}, "host_goals": {"best": 1.0}}
    made = Row("loss", "case", timings, clock="device", host_limit=4.5, **goals)
    assert [(v.goal, v.measured, v.reached) for v in made.goal_results(copy=1.0)] == [
        ("2x eager, device time", "3.00x", True),
        ("1x eager, host time", "0.50x", False),
        ("at most 4.5 ms of host time", "4 ms", True),
    ]
    on_cpu = row(eager=2.0)
    head, _, first, second = results.table([made, on_cpu], 1.0).splitlines()
    assert head.split(" | ")[4] == "host, ms"
    assert first.split(" | ")[4] == "4, 2 (0.50x)"
    assert second.split(" | ")[4] == "-"
    assert "host" not in results.table([on_cpu], 1.0)


# ---- timing ----


def test_candidates_take_turns_in_changing_order():
    called = []
    runs = {name: (lambda name=name: called.append(name)) for name in "abc"}

    def measure(run):
        run()
        return Sample(float(len(called)))

    timings = harness.interleave(runs, 10, "test", measure)
    rounds = [tuple(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == 12  # two of warm-up
    assert all(set(turn) == set("abc") for turn in rounds)
    assert len(set(rounds)) > 2
    for timing in timings.values():
        assert 6 < timing.p20 < timing.median < timing.p80 <= 36


def test_how_often_depends_on_how_long_it_takes():
    calls = []
    for seconds, rounds in ((0.5, 61), (0.0, 5)):
        calls.clear()
        runs = {"fastmp": lambda: calls.append(torch.randn(10**4))}
        harness.timed(runs, seconds, "test", wall_time)
        assert len(calls) == 2 + 2 + rounds  # to compile, to count the rounds, two of warm-up


def test_compilation_is_announced_once_before_anything_is_timed(monkeypatch):
    order = []
    monkeypatch.setattr(harness, "ON_COMPILED", [lambda: order.append("compiled")])

    def measure(run):
        order.append("timed")
        return wall_time(run)

    for _ in range(2):
        harness.timed({"fastmp": lambda: order.append("run")}, 0.0, "test", measure)
    assert order[:4] == ["run", "compiled", "timed", "run"]
    assert order.count("compiled") == 1


def test_a_copy_has_a_bandwidth():
    assert 1 < harness.copy_bandwidth("cpu") < 1000


# ---- timed results are checked ----


def test_wrong_results_are_not_timed(monkeypatch):
    """Each subject's own check sees an error of a few ulps of the 16-bit type, or less."""
    monkeypatch.setattr(loss, "ours", lambda *inputs: loss.eager_pair(*inputs) * 1.0001)
    with pytest.raises(AssertionError):
        loss.case(64, 100, torch.float32, "cpu", 0.1)
    right = linear.theirs
    monkeypatch.setattr(linear, "ours", lambda x, w, b, act: right(x, w, b, act) * 1.0001)
    with pytest.raises(AssertionError):
        linear.case((64, 64, 64), torch.float32, "gelu", linear.forward, {}, 0.1)
    monkeypatch.setattr(optimizer.FastmpPipeline, "step", lambda self: None)
    with pytest.raises(AssertionError, match="GradScaler"):
        optimizer.whole_step([(100,)], "small", torch.float16, "cpu", 0.1)
    real = learners.torch_amp

    def worse(*arguments, **options):
        learner = real(*arguments, **options)
        learner.optimizer.param_groups[0]["lr"] = -0.01
        return learner

    monkeypatch.setattr(learners, "torch_amp", worse)
    work = train.images("mlp", models.mlp, (1, 8, 8), 10, 32)
    with pytest.raises(AssertionError, match="AMP"):
        train.step_case(work, "cpu", torch.bfloat16, 0.1, compiled=False)


def test_weights_may_differ_by_the_rounding_of_every_step_and_not_by_a_rate():
    """A step of a last place in each of 130 steps; an update that is 0.1% larger."""
    weights = torch.tensor([1.0, -0.3, 1e-3])

    def check(steps, difference):
        other = weights + difference
        rounding.check({"fastmp": [weights], "torch": [other]}, steps)

    check(130, 130 * 2.0**-23 * weights)
    for steps, difference in ((10, 130 * 2.0**-23 * weights), (130, 130 * rounding.LR * 1e-3)):
        with pytest.raises(AssertionError, match="torch: Tensor-likes are not close"):
            check(steps, difference)


def test_a_case_that_fails_does_not_stop_the_others(capsys):
    def broken():
        raise RuntimeError("no such kernel")

    def missing():
        raise data.DataError("there is no such data set")

    cases = [Case("one", broken), Case("two", missing), Case("three", lambda: [row(eager=1.0)])]
    found = dict(subjects.run(cases))
    assert (found["one"], found["two"]) == (None, None)
    assert found["three"][0].case == "a case"
    said = capsys.readouterr().err
    assert "RuntimeError: no such kernel" in said
    assert "two: there is no such data set\n" in said
    assert "DataError" not in said  # a user error: one line, no traceback


# ---- the subjects ----


def test_the_networks_are_the_common_ones():
    """He et al. 2015 and Dosovitskiy et al. 2021; the ViT without class token and its position."""
    shape = (3, 224, 224)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in make(shape, 1000).parameters())
                  for make in (networks.resnet50, networks.vit_b16, networks.resnet18)]  # fmt: skip
    assert counts == [25_557_032, 86_567_656 - 2 * 768, 11_689_512]
    assert (len(optimizer.resnet50()), optimizer.size_of(optimizer.resnet50())) == (161, counts[0])
    small = networks.resnet50((3, 32, 32), 7)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("is_ours", [True, False])
def test_the_forward_on_a_gpu_is_measured_against_the_other_route(monkeypatch, is_ours):
    """Never against itself: whichever product is selected, the other one is the baseline."""
    pytest.importorskip("triton", reason="Triton is not installed: no kernel to select")
    from fastmp.backends.triton import linear as policy
    from fastmp.backends.triton.kernels import linear as kernels

    def reference(x, w, b, activation, save):
        return linear.theirs(x, w, b, activation), None

    real = linear.tensors
    monkeypatch.setattr(linear, "tensors", lambda shape, dtype, device: real(shape, dtype, "cpu"))
    monkeypatch.setattr(linear, "kernel_clock", lambda device: wall_time)
    monkeypatch.setitem(linear.SECONDS, "cuda", 0.01)
    monkeypatch.setattr(kernels, "linear", reference)
    monkeypatch.setattr(policy, "fused_is_faster", lambda k, activation: is_ours)
    (made,) = linear.forward_case((8, 16, 24))
    routes = [linear.OWN_PRODUCT, linear.TORCH]
    selected, other = routes if is_ours else reversed(routes)
    assert set(made.timings) == {"fastmp", other}
    assert made.goals == {other: 1.0}
    assert made.notes.endswith(f"selected: {selected}")


@pytest.mark.slow
def test_a_step_of_a_language_model():
    """Three losses that agree, of GPT-2's interface at a thousandth of its size."""
    pytest.importorskip("transformers", reason="transformers is not installed: no GPT-2")
    make = networks.gpt2(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=16)
    work = Text(name="GPT-2", make=make, vocabulary=97, batch=4, length=16)
    (found,) = train.step_case(work, "cpu", torch.bfloat16, 0.1, compiled=False)
    assert set(found.timings) == {"fastmp", "AMP bfloat16", "fp32"}
    assert found.case == "GPT-2 step, bfloat16, 4 x 16 tokens"


def test_the_candidates_on_a_gpu():
    """fastmp's headline is the workload's own mode; the other two are shown and not ranked."""
    work = train.images("mlp", models.mlp, (1, 8, 8), 10, 32, own_mode="graphed",
                        goals={"AMP": 5.0, "reduce-overhead AMP": 1.3})  # fmt: skip
    assert learners.own_modes(work, "cuda", learners.MODES) == {
        "fastmp": "graphed",
        "fastmp, eager": "eager",
        "fastmp, compiled": "compiled",
    }
    assert learners.own_modes(work, "cpu", learners.MODES) == {"fastmp": "eager"}
    without_graphs = {"fastmp": "eager", "fastmp, compiled": "compiled"}
    assert learners.own_modes(work, "cuda", ("eager", "compiled")) == without_graphs
    names = ["fastmp", "AMP float16", "compiled AMP float16", "reduce-overhead AMP float16"]
    goals = {"AMP float16": 5.0, "reduce-overhead AMP float16": 1.3}
    assert train._goals(work, names) == goals


def test_a_step_that_is_no_graph_is_not_timed_as_one():
    work = train.images("mlp", models.mlp, (1, 8, 8), 10, 8)
    learner = learners.ours(work, work.make(), "cpu", torch.bfloat16, mode="graphed")
    with (
        pytest.warns(UserWarning, match="no CUDA graph"),
        pytest.raises(RuntimeError, match="no CUDA graph: "),
    ):
        learner.step(*work.inputs("cpu"))


def test_time_to_an_accuracy():
    """A curve for every candidate, the seconds where it crosses the target; or an error."""
    digits = data.load("digits")
    work = train.images("mlp", models.mlp, digits.shape, 10, 64)
    target = accuracy.Target(60, 0.5, 3e-3)
    (found,) = accuracy.accuracy_case(work, digits, "cpu", torch.bfloat16, target)
    assert set(found.curves) == {"fastmp", "AMP bfloat16", "fp32", "compiled AMP bfloat16"}
    for name, curve in found.curves.items():
        seconds = [point[0] for point in curve]
        assert seconds == sorted(seconds)
        assert len(curve) == 6
        assert found.timings[name].median / 1e3 in seconds
    assert "to 50.0% of digits" in found.case
    with pytest.raises(AssertionError, match=r"fp32 ended at 40.00%, target 50.0%"):
        accuracy._seconds_to(0.5, [(1.0, 0.3), (2.0, 0.4)], "fp32")


@pytest.mark.slow
def test_scaling_compares_two_processes_with_one():
    one, two = scaling.case("mlp", [1, 2], "cpu", 3)
    assert (one.case, two.case) == (
        "mlp, 1 x 256 images, 1 process",
        "mlp, 2 x 256 images, 2 processes",
    )
    assert set(two.timings) == {"fastmp", "DDP + AMP", "DDP, fp32"}
    assert "fastmp 100%" in one.notes


# ---- third party ----


def test_a_library_that_is_not_installed_is_passed_over(capsys):
    assert third_party.find("no_such_package.optim") is None
    assert capsys.readouterr().err == ""


def test_a_library_that_is_broken_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_library.py").write_text("import a_library_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert third_party.find("broken_library") is None
    assert (
        "broken_library is installed, but cannot be imported: No module" in capsys.readouterr().err
    )


def test_a_candidate_that_does_not_run_is_left_out(capsys):
    def broken():
        raise ValueError("unsupported")

    assert list(third_party.working({"broken": broken, "sound": lambda: 1})) == ["sound"]
    assert capsys.readouterr().err == "broken does not run: ValueError: unsupported\n"


def test_timms_loss_is_the_same_function():
    pytest.importorskip("timm", reason="timm is not installed: pip install 'fastmp[third-party]'")
    library = third_party.losses("cpu")["timm"]
    assert library.comparable
    logits, a = torch.randn(64, 10, dtype=torch.float64), torch.randint(10, (64,))
    value = library.call(logits, a, a.flip(0), lam=loss.LAM)
    torch.testing.assert_close(value, loss.eager_pair(logits, a, a.flip(0)))
