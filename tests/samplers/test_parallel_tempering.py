"""Replica exchange."""

import math

import pytest
import torch
from scipy import stats

from skebm.samplers import ParallelTempering, hmc, independence, mala, random_walk, run


class FarModes:
    """.2 N((-8, 0), I) + .8 N((8, 0), .5^2 I)."""

    def __call__(self, x):
        shift = torch.tensor([8.0, 0.0], dtype=x.dtype)
        left = math.log(0.2) - 0.5 * (x + shift).square().sum(1)
        right = math.log(0.8 / 0.25) - 0.5 * ((x - shift) / 0.5).square().sum(1)
        return torch.logaddexp(left, right)


def wide(x):
    """N(0, 8^2 I)."""
    return -0.5 * (x / 8).square().sum(1)


INNER = {"mala": (mala, {}), "hmc": (hmc, {"n_leapfrog_steps": 3}), "rw": (random_walk, {})}
inner = pytest.mark.parametrize(("kernel", "options"), INNER.values(), ids=INNER)


@pytest.mark.filterwarnings("ignore:the acceptance rate")
@pytest.mark.parametrize("reference", [None, wide])
@inner
def test_weights_of_far_modes(laws, kernel, options, reference):
    x = torch.tensor([[-8.0, 0.0], [8.0, 0.0]], dtype=torch.float64).repeat(150, 1)
    arguments = dict(n_steps=600, n_burn_in=600, n_keep=100, step_size=0.5, **options)
    tempering = ParallelTempering(kernel, log_reference=reference)
    result = run(tempering, x, FarModes(), laws.rng(), **arguments)
    share = (result.samples[:, :, 0] > 0).double().mean(0)  # of each chain
    standard_error = share.std() / math.sqrt(len(share))
    assert standard_error < 0.02
    assert abs(share.mean() - 0.8) < 4 * standard_error
    assert result.swap_rates.shape == (7,)
    assert result.swap_rates.min() > 0.1
    # the kernel alone stays in the mode where it started
    alone = run(kernel, x, FarModes(), laws.rng(), **arguments)
    assert (alone.samples[..., 0] * x[:, 0] > 0).all()


@inner
def test_nothing_is_evaluated_for_an_exchange(laws, kernel, options):
    """The cached parts, log-densities and gradients are those at the positions."""
    law, calls = FarModes(), []

    def counted(x):
        calls.append(len(x))
        return law(x)

    g = laws.rng()
    tempering = ParallelTempering(kernel, [1.0, 0.5, 0.2, 0.0], wide)
    x = 4 * torch.randn(4, 30, 2, generator=g, dtype=torch.float64)
    state = tempering.init(x, counted)
    for _ in range(6):
        state, info = tempering.step(state, counted, g, step_size=0.7, **options)
    per_step = options.get("n_leapfrog_steps", 1)
    assert calls == [120] * (1 + 6 * per_step)
    assert 0 < info.swap_probability.mean() < 1
    positions = state.replicas.position.view(4, 30, 2)
    assert not torch.equal(positions, x)
    assert torch.equal(positions[0], state.position)
    fresh = tempering.init(positions, law)
    for found, expected in ((state[:4], fresh[:4]), (state.parts, fresh.parts)):
        torch.testing.assert_close(found, tuple(expected))


def test_swap_probability_by_hand(laws):
    law, b = FarModes(), torch.tensor([1.0, 0.4, 0.1], dtype=torch.float64)
    tempering = ParallelTempering(inverse_temperatures=b, log_reference=wide)
    g = laws.rng()
    x = 4 * torch.randn(3, 500, 2, generator=g, dtype=torch.float64)
    state = tempering.init(x, law)
    # with steps that small only exchanges move
    new, info = tempering.step(state, law, g, step_size=1e-9)

    def log_pi(i, x):
        return b[i] * law(x) + (1 - b[i]) * wide(x)

    for i in range(2):
        there = log_pi(i, x[i + 1]) + log_pi(i + 1, x[i])
        here = log_pi(i, x[i]) + log_pi(i + 1, x[i + 1])
        expected = (there - here).exp().clamp_max(1)
        torch.testing.assert_close(info.swap_probability[i], expected, rtol=1e-4, atol=1e-6)
    # the pair (0, 1) takes its turn first, then (1, 2)
    moved = new.replicas.position.view(3, 500, 2)
    swapped = (moved[0] - x[1]).abs().amax(1) < 1e-6
    torch.testing.assert_close(moved[1][swapped], x[0][swapped], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[0][~swapped], x[0][~swapped], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[2], x[2], atol=1e-6, rtol=0)
    p = info.swap_probability[0]
    assert abs((swapped.double() - p).sum() / (p * (1 - p)).sum().sqrt()) < 4
    last, info = tempering.step(new, law, g, step_size=1e-9)
    assert not last.odd
    after = last.replicas.position.view(3, 500, 2)
    torch.testing.assert_close(after[0], moved[0], atol=1e-6, rtol=0)
    assert ((after[2] - moved[1]).abs().amax(1) < 1e-6).any()


def test_every_replica_keeps_its_law(laws):
    """N(0, I) to the power b is N(0, I / b): started there, each stays there."""
    b = torch.tensor([1.0, 0.5, 0.2, 0.05], dtype=torch.float64)
    tempering, p = ParallelTempering(mala, b), []
    for seed in range(6):
        g = laws.rng(seed)
        x = torch.randn(4, 2000, 2, generator=g, dtype=torch.float64) / b[:, None, None].sqrt()
        state = tempering.init(x, laws.normal)
        for _ in range(20):
            state, _ = tempering.step(state, laws.normal, g, step_size=1.0)
        z = state.replicas.position.view(4, 2000, 2) * b[:, None, None].sqrt()
        p += [stats.kstest(z[i, :, j], "norm").pvalue for i in range(4) for j in range(2)]
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_each_replica_gets_its_step_size(laws):
    g = laws.rng()
    x = torch.randn(200, 2, generator=g, dtype=torch.float64)
    tempering = ParallelTempering(inverse_temperatures=[1.0, 0.1, 0.0], log_reference=wide)
    result = run(tempering, x, laws.normal, g, n_steps=50, n_burn_in=200, step_size=1.0)
    assert result.step_size.shape == (3, 1, 1)
    _, info = tempering.step(result.state, laws.normal, g, step_size=result.step_size)
    torch.testing.assert_close(
        info.rate.flatten(), torch.full((3,), 0.574, dtype=torch.float64), atol=0.1, rtol=0
    )
    # N(0, 8^2) takes steps eight times as long as N(0, 1)
    assert result.step_size[2].item() / result.step_size[0].item() == pytest.approx(8, rel=0.3)


def test_the_hottest_may_leave_the_support(laws):
    """Where p is zero the hottest replica goes on, and the others reject."""
    law, g = laws.Exponential(), laws.rng()
    tempering = ParallelTempering(mala, [1.0, 0.5, 0.0], lambda x: -0.5 * x[:, 0] ** 2 / 4)
    state = tempering.init(law.sample(2000, g), law)
    for _ in range(60):
        state, _ = tempering.step(state, law, g, step_size=0.7)
    positions = state.replicas.position.view(3, 2000)
    assert (positions[:2] > 0).all()
    assert 0.3 < (positions[2] > 0).double().mean() < 0.7
    assert state.log_density.isfinite().all()
    assert state.replicas.log_density.isfinite().all()
    assert min(laws.p_values(law, state.position)) > 1e-4


def test_ladders():
    def ladder(*args):
        return ParallelTempering(mala, *args).inverse_temperatures

    b = ladder(5)
    torch.testing.assert_close(b[1:] / b[:-1], torch.full((4,), 0.01**0.25, dtype=torch.float64))
    assert b[0] == 1
    torch.testing.assert_close(ladder(6, wide)[:5], b)
    assert ladder(6, wide)[5] == 0
    for bad in ([1.0], [1.0, 0.0], [0.9, 0.5], [1.0, 0.5, 0.6], [1.0, -0.1], 1):
        with pytest.raises(ValueError, match="inverse_temperatures"):
            ladder(bad)
    with pytest.raises(ValueError, match="inverse_temperatures"):
        ladder(1, wide)
    with pytest.raises(ValueError, match="kernel must have a step size"):
        ParallelTempering(independence)
