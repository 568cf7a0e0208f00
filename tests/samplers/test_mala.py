import warnings

import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning

from skebm.samplers import independence, mala, run


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussian:
    """Correlated, with different scales."""

    chol = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 2.0, 3.0]], dtype=torch.float64)

    def __call__(self, x):
        return -0.5 * torch.linalg.solve_triangular(self.chol, x.T, upper=False).square().sum(0)

    def sample(self, n, generator):
        return torch.randn(n, 3, generator=generator, dtype=torch.float64) @ self.chol.T

    def uniforms(self, x):
        return torch.special.ndtr(torch.linalg.solve_triangular(self.chol, x.T, upper=False)).T


class Banana:
    """x1 normal, x2 | x1 normal around x1^2."""

    def __call__(self, x):
        return -0.5 * (x[:, 0] ** 2 + ((x[:, 1] - x[:, 0] ** 2) / 0.5) ** 2)

    def sample(self, n, generator):
        u = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return torch.stack([u[:, 0], u[:, 0] ** 2 + 0.5 * u[:, 1]], 1)

    def uniforms(self, x):
        return torch.special.ndtr(torch.stack([x[:, 0], (x[:, 1] - x[:, 0] ** 2) / 0.5], 1))


class Exponential:
    """On a half-line: proposals may leave the support."""

    def __call__(self, x):
        return torch.where(x[:, 0] > 0, -x[:, 0], -torch.inf)

    def sample(self, n, generator):
        u = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        return -torch.log1p(-u)

    def uniforms(self, x):
        return -torch.expm1(-x)


LAWS = [Gaussian(), Banana(), Exponential()]


def p_values(law, x):
    u = law.uniforms(x).numpy()
    return [stats.kstest(column, "uniform").pvalue for column in u.T]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_the_law_is_stationary(law):
    p = []
    for seed in range(8):
        g = generator(seed)
        x = law.sample(2000, g)
        state = mala.init(x, law)
        for _ in range(25):
            state, _ = mala.step(state, law, g, step_size=0.7)
        assert not torch.equal(state.position, x)
        p += p_values(law, state.position)
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_without_the_correction_the_law_would_change():
    """The test above has the power to see an unadjusted sampler."""
    law, g = Gaussian(), generator()
    state = mala.init(law.sample(2000, g), law)
    for _ in range(25):
        x = state.position + 0.5 * 0.7**2 * state.gradient
        x = x + 0.7 * torch.randn(x.shape, generator=g, dtype=x.dtype)
        state = mala.init(x, law)
    assert min(p_values(law, state.position)) < 1e-4


def test_independence_metropolis_is_stationary_and_mixes():
    law = Banana()

    def propose(n, generator):
        return 2.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_weight(x):
        return law(x) + 0.5 * (x / 2.5).square().sum(1)

    p = []
    for seed in range(6):
        g = generator(seed)
        options = dict(n_steps=20, propose=propose)
        stationary = run(independence, law.sample(2000, g), log_weight, g, **options)
        p += p_values(law, stationary.samples[-1])
    assert min(p) > 1e-4
    mixed = run(independence, propose(2000, g), log_weight, g, n_steps=200, propose=propose)
    assert min(p_values(law, mixed.samples[-1])) > 1e-4
    assert 0.02 < mixed.acceptance_rate < 0.5


def test_one_gradient_per_step_and_state_is_consistent():
    law, calls = Gaussian(), []

    def counted(x):
        calls.append(len(x))
        return law(x)

    g = generator()
    x = law.sample(50, g)
    state = mala.init(x, counted)
    for _ in range(10):
        before = state
        state, info = mala.step(state, counted, g, step_size=0.8)
        moved = (state.position != before.position).any(1)
        assert torch.equal(moved, info.accepted)
    assert calls == [50] * 11
    assert not state.position.requires_grad
    again = mala.init(state.position, law)
    torch.testing.assert_close(tuple(again), tuple(state))
    result = run(mala, x, counted, g, n_steps=4, n_burn_in=3, step_size=0.8)
    assert len(calls) == 11 + 1 + 7
    assert result.samples.shape == (1, 50, 3)


def test_reproducible_from_the_generator_alone():
    law = Banana()
    x = law.sample(20, generator())
    options = dict(n_steps=10, n_burn_in=10, n_keep=5, step_size=0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = run(mala, x, law, generator(3), **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = run(mala, x, law, generator(3), **options)
    assert torch.equal(a.samples, b.samples)
    assert a.step_size == b.step_size
    assert torch.equal(a.samples[-1], a.state.position)
    assert not torch.equal(a.samples, run(mala, x, law, generator(4), **options).samples)


@pytest.mark.parametrize("step_size", [1e-2, 0.5, 50.0])
def test_step_size_is_adapted(step_size):
    law, g = Gaussian(), generator()
    scale = torch.tensor([1.0, 1.0, 3.6], dtype=torch.float64)
    result = run(
        mala, law.sample(200, g), law, g,
        n_steps=100, n_burn_in=200, step_size=step_size, scale=scale,
    )  # fmt: skip
    assert result.acceptance_rate == pytest.approx(mala.TARGET_ACCEPTANCE, abs=0.06)
    assert 0.3 < result.step_size < 2.0


def test_scale_is_a_change_of_units():
    law, scale = Gaussian(), torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64)
    x = law.sample(30, generator())
    a = run(mala, x, law, generator(1), n_steps=5, step_size=0.7)
    b = run(
        mala, x * scale, lambda y: law(y / scale), generator(1),
        n_steps=5, step_size=0.7, scale=scale,
    )  # fmt: skip
    torch.testing.assert_close(a.samples * scale, b.samples)


def test_chains_find_the_law_from_afar():
    law, g = Gaussian(), generator()
    x = torch.full((1000, 3), 8.0, dtype=torch.float64)
    result = run(mala, x, law, g, n_steps=100, n_burn_in=150, step_size=0.1)
    assert min(p_values(law, result.samples[-1])) > 1e-4


def test_bad_acceptance_warns_and_bad_arguments_are_named():
    law, g = Gaussian(), generator()
    x = law.sample(100, g)
    with pytest.warns(ConvergenceWarning, match="accept 0% .* step size 100"):
        run(mala, x, law, g, n_steps=5, step_size=100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(mala, x, law, g, n_steps=20, n_burn_in=100, step_size=100.0)
    with pytest.raises(ValueError, match="n_keep=2 must divide n_steps=5"):
        run(mala, x, law, g, n_steps=5, n_keep=2, step_size=1.0)
    with pytest.raises(ValueError, match="step_size"):
        run(mala, x, law, g, n_steps=5)
    start = torch.ones(10, 1, dtype=torch.float64)
    start[:3] = -1
    with pytest.raises(ValueError, match="3 of 10 chains start"):
        run(mala, start, Exponential(), g, n_steps=5, step_size=0.1)


def test_an_overflowing_proposal_is_rejected():
    def quartic(x):
        return -(x**4).sum(1)

    x = torch.full((5, 1), 1e3, dtype=torch.float64)
    state, info = mala.step(mala.init(x, quartic), quartic, generator(), step_size=1e60)
    assert torch.equal(state.position, x)
    assert not info.accepted.any()
    assert state.log_density.isfinite().all()
    assert (info.acceptance_probability == 0).all()
