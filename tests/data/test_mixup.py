"""fastmp.data.Mixup: distributions, results, resuming."""

import math

import pytest
import torch

from fastmp.data.mixup import Mixup
from fastmp.functional import MixedTarget, cross_entropy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_mixup_agrees_with_its_target(per_sample, n):
    x, y = torch.randn(n, 3, 6, 5), torch.arange(n)
    for _ in range(5):
        out, target = Mixup(1.0, per_sample=per_sample, generator=generator())(x, y)
        assert isinstance(target, MixedTarget)
        assert target.lam.shape == ((n,) if per_sample else ())
        assert torch.equal(target.a, y)
        assert sorted(target.b.tolist()) == y.tolist()
        lam = target.lam.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(out, lam * x + (1 - lam) * x[target.b])


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutmix_lam_is_the_area_outside_the_clipped_box(per_sample):
    n, height, width = 9, 8, 11
    x = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 2, height, width)
    mixup = Mixup(0.0, cutmix_alpha=1.0, per_sample=per_sample, generator=generator())
    lams = set()
    for _ in range(40):
        out, (a, b, lam) = mixup(x, torch.arange(n))
        assert torch.equal((out == a[:, None, None, None]) | (out == b[:, None, None, None]),
                           torch.ones_like(out, dtype=torch.bool))  # fmt: skip
        moved = a != b
        own = (out == a[:, None, None, None])[:, 0].flatten(1).float().mean(1)
        torch.testing.assert_close(own[moved], lam.expand(n)[moved])
        lams.update(lam.reshape(-1).tolist())
    assert len(lams) > 10


@pytest.mark.parametrize("alpha", [0.001, 0.2, 1.0, 8.0])
def test_lam_follows_the_beta_distribution(alpha):
    lam = Mixup(alpha, generator=generator())._beta(alpha, 400_000)
    assert ((lam >= 0) & (lam <= 1)).all()
    assert abs(lam.mean() - 0.5) < 0.004
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert abs(lam.var() / variance - 1) < 0.01
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))  # its fourth central moment
    assert abs((lam - 0.5).pow(4).mean() / fourth - 1) < 0.015


@pytest.mark.parametrize("alpha", [5e-324, 1e-320, 1e-30])
def test_lam_of_the_smallest_alphas_is_0_or_1(alpha):
    lam = Mixup(alpha, per_sample=True)._beta(alpha, 1000)
    assert set(lam.tolist()) == {0.0, 1.0}
    assert 400 < lam.sum() < 600


def test_prob_and_switch_prob():
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    out, target = Mixup(prob=0.0, generator=generator())(x, y)
    assert torch.equal(out, x)
    assert torch.equal(target.b, y)
    assert target.lam == 1
    mixup = Mixup(1.0, cutmix_alpha=1.0, switch_prob=0.25, generator=generator())
    sources = [
        torch.isin(mixup(x, y)[0], x).all().item() for _ in range(400)
    ]  # cut pixels are copies
    assert 0.2 < sum(sources) / 400 < 0.35
    per_sample = Mixup(1.0, prob=0.3, per_sample=True, generator=generator())
    lam = torch.cat([per_sample(torch.zeros(50, 1), torch.zeros(50))[1].lam for _ in range(40)])
    assert 0.64 < (lam == 1).float().mean() < 0.76


def test_normalises_and_casts_in_the_same_pass():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    mixup = Mixup(1.0, generator=generator(), mean=mean, std=std, dtype=torch.float16)
    norm = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(mixup.plain(x), norm.half(), rtol=1e-3, atol=1e-3)
    out, (_, b, lam) = mixup(x, torch.arange(5))
    expected = (lam * norm + (1 - lam) * norm[b]).half()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_the_global_seed_makes_it_reproducible():
    def draws():
        torch.manual_seed(3)
        mixup = Mixup(1.0)
        torch.rand(5)  # other users of the global generator
        return [mixup(torch.randn(4, 2), torch.arange(4))[1] for _ in range(3)]

    for first, second in zip(draws(), draws(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_a_run_can_be_resumed():
    x, y = torch.randn(6, 1, 5, 5), torch.arange(6)
    mixup = Mixup(0.4, cutmix_alpha=1.0, prob=0.8, per_sample=True)
    for _ in range(3):
        mixup(x, y)
    state = mixup.state_dict()
    expected = [mixup(x, y) for _ in range(5)]
    other = Mixup(0.4, cutmix_alpha=1.0, prob=0.8, per_sample=True)
    other.load_state_dict(state)
    for out, target in expected:
        again, target_again = other(x, y)
        assert torch.equal(out, again)
        assert all(torch.equal(p, q) for p, q in zip(target, target_again, strict=True))


def test_the_target_is_accepted_by_the_loss():
    x, target = Mixup(1.0, per_sample=True)(torch.randn(8, 4), torch.arange(8) % 4)
    loss = cross_entropy(x, target, label_smoothing=0.1)
    assert math.isfinite(loss)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha"),
        ({"prob": 1.5}, "prob"),
        ({"switch_prob": -0.5}, "switch_prob"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=f"^{text} must"):
        Mixup(**options)


def test_bad_batches_and_states_are_refused():
    with pytest.raises(ValueError, match="batch size"):
        Mixup()(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="N, C, H, W"):
        Mixup(cutmix_alpha=1.0)(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="generator"):
        Mixup().load_state_dict({"seed": 1})


# ---- targets of every pixel, and targets that are no indices ----

WAYS = {
    "mixup": {"alpha": 1.0},
    "cutmix": {"alpha": 0.0, "cutmix_alpha": 1.0},
    "both": {"alpha": 1.0, "cutmix_alpha": 1.0},
}


def onehot_images(y, classes=5):
    """Images that show the class of each pixel: as logits they are right everywhere."""
    return torch.nn.functional.one_hot(y, classes).movedim(-1, 1).float()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_cutmix_pastes_a_map_with_the_box_of_the_image(dtype, per_sample):
    y = torch.randint(5, (6, 8, 7), generator=generator())
    y[0, :2] = 255 if dtype == torch.uint8 else -100
    x = onehot_images(y.clamp(0, 4))
    mixup = Mixup(0.0, 1.0, per_sample=per_sample, generator=generator())
    for _ in range(20):
        out, target = mixup(x, y.to(dtype))
        valid = (target.a != 255) & (target.a != -100)
        assert torch.equal(out.argmax(1)[valid], target.a[valid].long())
        loss = cross_entropy(100 * out, target, ignore_index=255 if dtype == torch.uint8 else -100)
        assert loss < 1e-6
        assert target.lam.shape == ((6,) if per_sample else ())


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 8, 7)])
def test_class_probabilities_are_mixed_themselves(shape, way, per_sample):
    """The loss is that of the mixed pair, for an image's probabilities and for each pixel's."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 8, 7), torch.randn(shape).softmax(1)
    mixup = Mixup(per_sample=per_sample, generator=generator(), **WAYS[way])
    for _ in range(5):
        params = mixup.draw(x)
        _, target = mixup.apply(x, y, params)
        assert target.a is target.b
        lam = params.lam.reshape(-1, *[1] * (y.dim() - 1))
        if params.box is not None and y.dim() == 4:
            lam = torch.ones(6, 1, 8, 7)
            for row, (top, bottom, left, right) in zip(lam, params.box.expand(6, 4), strict=True):
                row[:, top:bottom, left:right] = 0
        expected = lam * y + (1 - lam) * y[params.partner]
        torch.testing.assert_close(target.a, expected)
        logits = torch.randn(shape)
        torch.testing.assert_close(
            cross_entropy(logits, target), torch.nn.functional.cross_entropy(logits, expected)
        )


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_of_a_map_is_a_pair_of_every_pixel(per_sample):
    y = torch.randint(5, (6, 8, 7))
    mixup = Mixup(1.0, per_sample=per_sample, generator=generator())
    _, (a, b, lam) = mixup(onehot_images(y), y)
    logits = torch.randn(6, 5, 8, 7)
    rows = [torch.nn.functional.cross_entropy(logits, t, reduction="none") for t in (a, b)]
    lam_of = lam.reshape(-1, 1, 1)
    expected = (lam_of * rows[0] + (1 - lam_of) * rows[1]).mean()
    torch.testing.assert_close(cross_entropy(logits, MixedTarget(a, b, lam)), expected)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(6, 4, 4).long(), ValueError, r"\(N, ..., 8, 7\), got \(6, 4, 4\); resize"),
        (torch.zeros(6, 56).long(), ValueError, r"got \(6, 56\); resize the map"),
        (torch.zeros(6, 5, 4, 4), ValueError, r"got \(6, 5, 4, 4\); resize the map"),
        ({"labels": torch.zeros(6)}, TypeError, "y must be a tensor of targets, got dict"),
    ],
)
def test_targets_that_cannot_be_pasted(y, error, message):
    mixup = Mixup(1.0, 1.0, generator=generator())
    before = mixup.state_dict()["generator"]
    for call in (mixup, lambda x, y: mixup.apply(x, y, None)):
        with pytest.raises(error, match=message):
            call(torch.zeros(6, 3, 8, 7), y)
    assert torch.equal(mixup.state_dict()["generator"], before)
    if isinstance(y, torch.Tensor) and y.dim() > 2:
        Mixup(1.0)(torch.zeros(6, 3, 8, 7), y)  # mixup takes maps of any size
