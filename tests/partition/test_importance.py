import math

import numpy as np
import pytest
import torch

from skebm.partition import adaptive_importance_sampling, importance_sampling


class Tilt:
    """q = N(0, I_d), f = a sum(x) - b |x|^2 / 2, hence Z in closed form."""

    def __init__(self, d, a=0.3, b=0.2):
        self.d, self.a, self.b = d, a, b
        self.log_z = d * (a**2 / (2 * (1 + b)) - 0.5 * math.log1p(b))

    def __call__(self, n, rng):
        x = torch.randn(n, self.d, generator=rng, dtype=torch.float64)
        return (self.a * x - 0.5 * self.b * x**2).sum(1)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("d", [1, 2, 10])
def test_closed_form_and_honest_errors(d):
    tilt = Tilt(d)
    results = [importance_sampling(tilt(2000, rng(seed))) for seed in range(200)]
    z = np.array([(r.value - tilt.log_z) / r.std_error for r in results])
    assert 0.85 < z.std() < 1.15
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) + 0.1
    assert 0.91 < (np.abs(z) < 1.96).mean() < 0.99


@pytest.mark.parametrize("d", [1, 2, 10])
def test_adaptive_errors_are_honest(d):
    tilt, z = Tilt(d), []
    for seed in range(60):
        result = adaptive_importance_sampling(
            tilt, rng(seed), target_std_error=0.02, batch_size=500, max_samples=100_000
        )
        assert result.std_error <= 0.02
        assert result.n_samples < 100_000
        z.append((result.value - tilt.log_z) / result.std_error)
    assert 0.5 < np.std(z) < 1.2
    assert (np.abs(z) < 1.96).mean() >= 0.9


def test_ess_and_error_of_known_weights():
    result = importance_sampling(torch.tensor([0.0, 0.0, -math.inf, -math.inf]))
    assert result.value == pytest.approx(math.log(0.5))
    assert result.ess == pytest.approx(2.0)
    assert result.std_error == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2 / 0.5)
    assert (result.n_samples, result.method) == (4, "importance sampling")
    assert importance_sampling(torch.full((100,), 700.0)).value == pytest.approx(700.0)
    constant = importance_sampling(torch.full((1000,), -3.0))
    assert constant.std_error < 1e-8
    nothing = importance_sampling(torch.full((10,), -math.inf))
    assert (nothing.value, nothing.std_error, nothing.ess) == (-math.inf, math.inf, 0.0)


def test_members_are_measured_separately():
    tilts = [Tilt(3), Tilt(3, a=1.0)]
    weights = torch.stack([tilt(3000, rng(k)) for k, tilt in enumerate(tilts)])
    both = importance_sampling(weights.float())
    assert both.value.dtype == torch.float64
    for k in range(2):
        single = importance_sampling(weights[k].float())
        for name in ("value", "std_error", "ess"):
            assert getattr(both, name)[k].item() == pytest.approx(getattr(single, name))

    def draw(n, rng):
        return torch.stack([tilt(n, rng) for tilt in tilts])

    adaptive = adaptive_importance_sampling(draw, rng(0), target_std_error=0.03)
    assert (adaptive.std_error <= 0.03).all()


def test_batches_merge_to_one():
    tilt, batches = Tilt(2), []

    def draw(n, rng):
        batches.append(tilt(n, rng))
        return batches[-1]

    merged = adaptive_importance_sampling(
        draw, rng(0), target_std_error=0.0, batch_size=1000, max_samples=5500
    )
    whole = importance_sampling(torch.cat(batches))
    assert merged.n_samples == whole.n_samples == 5000
    assert merged.value == pytest.approx(whole.value, abs=1e-12)
    assert merged.ess == pytest.approx(whole.ess)
    means = np.array([b.exp().mean() for b in batches])
    spread = means.std(ddof=1) / math.sqrt(5) / means.mean()
    assert merged.std_error == pytest.approx(max(whole.std_error, spread))


def test_one_large_weight_shows_in_the_spread_and_seeds_reproduce():
    def draw(n, rng):
        return -3 * torch.rand(n, generator=rng, dtype=torch.float64).log()

    runs = [adaptive_importance_sampling(draw, rng(1), max_samples=40_000) for _ in "ab"]
    assert runs[0] == runs[1]
    assert runs[0].std_error > 0.01  # infinite variance: the target is never reached
    assert runs[0].n_samples <= 40_000


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, math.nan], "nan or"),
        ([0.0, math.inf], "nan or"),
        ([0.0], "at least two"),
        ([[[0.0, 1.0]]], "shape"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        importance_sampling(torch.tensor(weights))


def test_cap_must_allow_two_batches():
    with pytest.raises(ValueError, match="two batches"):
        adaptive_importance_sampling(Tilt(1), rng(0), batch_size=100, max_samples=150)
