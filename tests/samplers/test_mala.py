"""What is particular to the Langevin kernels, and to those without a gradient."""

import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from skebm.samplers import independence, mala, random_walk, run, ula


def test_the_ratio_against_densities_of_the_proposal(laws):
    """p(x') q(x | x') / (p(x) q(x' | x)), each factor written out."""
    law, seen = laws.Banana(), []

    def watched(x):
        seen.append(x.detach().clone())
        return law(x)

    def mean_and_deviation(x):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(law(x).sum(), x)
        return x.detach() + 0.5 * s**2 * gradient, s.expand_as(x)

    def log_q(y, x):
        return Normal(*mean_and_deviation(x)).log_prob(y).sum(1)

    s = 0.6 * torch.tensor([1.0, 0.4], dtype=torch.float64)
    x = law.sample(200, laws.rng())
    for kernel in (mala, ula):
        _, info = kernel.step(
            kernel.init(x, watched), watched, laws.rng(1), step_size=0.6, scale=s / 0.6
        )
        y = seen[-1]
        log_ratio = law(y) + log_q(x, y) - law(x) - log_q(y, x)
        torch.testing.assert_close(-info.energy_error, log_ratio)
        torch.testing.assert_close(info.acceptance_probability, log_ratio.exp().clamp_max(1))


@pytest.mark.parametrize("step_size", [0.4, 0.8, 1.2])
def test_the_bias_of_ula_on_a_normal_law(laws, step_size):
    """The stationary law is normal with variance 1 / (1 - s^2 / 4)."""
    g = laws.rng()
    deviation = (1 - step_size**2 / 4) ** -0.5
    x = deviation * torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    state = ula.init(x, laws.normal)
    for _ in range(20):
        state, info = ula.step(state, laws.normal, g, step_size=step_size)
        assert info.accepted.all()
    x = state.position[:, 0].numpy()
    assert stats.kstest(x / deviation, "norm").pvalue > 1e-3
    if step_size > 0.5:
        assert stats.kstest(x, "norm").pvalue < 1e-6


@pytest.mark.filterwarnings("ignore:the acceptance rate")
@pytest.mark.parametrize("step_size", [1.0, 0.5, 0.25])
def test_the_bias_of_ula_vanishes_with_the_step_and_mala_has_none(laws, step_size):
    for kernel, expected in ((ula, 1 / (1 - step_size**2 / 4)), (mala, 1.0)):
        g = laws.rng()
        x = torch.randn(4000, 2, generator=g, dtype=torch.float64)
        result = run(
            kernel, x, laws.normal, g, n_steps=600, n_keep=200, step_size=step_size
        )  # fmt: skip
        # the first states still have the law that they were drawn from
        assert result.samples[100:].var().item() == pytest.approx(expected, abs=0.01)


def test_ula_reports_what_mala_would_do(laws):
    law, g = laws.Gaussian(), laws.rng()
    x = law.sample(20, g)
    a, told = ula.step(ula.init(x, law), law, laws.rng(1), step_size=1.0)
    _, done = mala.step(mala.init(x, law), law, laws.rng(1), step_size=1.0)
    assert torch.equal(told.acceptance_probability, done.acceptance_probability)
    assert torch.equal(told.energy_error, done.energy_error)
    assert (a.position != x).all()


def test_random_walk_goes_uphill_always_and_downhill_by_the_ratio(laws):
    law, n, seen = laws.StudentT(), 100_000, []

    def watched(x):
        seen.append(law(x))
        return seen[-1]

    state = random_walk.init(law.sample(n, laws.rng()), watched)
    _, info = random_walk.step(state, watched, laws.rng(1), step_size=1.0)
    gain = seen[1] - seen[0]
    up = gain >= 0
    assert 0.2 < up.double().mean() < 0.8
    assert info.accepted[up].all()
    torch.testing.assert_close(info.acceptance_probability[~up], gain[~up].exp())
    # of those with one probability, that share is accepted
    expected, accepted = info.acceptance_probability[~up], info.accepted[~up]
    for low in (0.0, 0.25, 0.5, 0.75):
        bin_ = (expected >= low) & (expected < low + 0.25)
        p = expected[bin_]
        z = (accepted[bin_].double() - p).sum() / (p * (1 - p)).sum().sqrt()
        assert abs(z) < 4


def test_a_law_without_gradient(laws):
    def steps(x):  # 1, 2, 3 or 4 units of mass on quarters of the interval
        inside = ((x > 0) & (x < 1)).all(1)
        return torch.where(inside, (1 + (4 * x[:, 0]).floor()).clamp_min(1).log(), -torch.inf)

    g = laws.rng()
    x = torch.rand(4000, 1, generator=g, dtype=torch.float64)
    result = run(random_walk, x, steps, g, n_steps=50, n_burn_in=50, step_size=0.3)
    counts = torch.histc(result.samples[-1], 4, 0, 1).numpy()
    assert stats.chisquare(counts, [400, 800, 1200, 1600]).pvalue > 1e-3


def test_independence_metropolis_mixes(laws):
    law = laws.Banana()

    def propose(n, rng):
        return 2.5 * torch.randn(n, 2, generator=rng, dtype=torch.float64)

    def log_weight(x):
        return law(x) + 0.5 * (x / 2.5).square().sum(1)

    g = laws.rng()
    mixed = run(independence, propose(2000, g), log_weight, g, n_steps=200, propose=propose)
    assert min(laws.p_values(law, mixed.samples[-1])) > 1e-4
    assert 0.02 < mixed.acceptance_rate < 0.5


def test_a_proposal_out_of_the_support_has_infinite_energy(laws):
    law = laws.Exponential()
    state = random_walk.init(torch.full((5, 1), 1.0).double(), law)
    _, info = random_walk.step(state, law, laws.rng(), step_size=1e6)
    assert (info.energy_error == torch.inf).any()
    x = torch.full((5, 1), 10.0, dtype=torch.float64)

    def log_weight(x):
        return -(x**4).sum(1)

    _, info = independence.step(
        independence.init(x, log_weight), log_weight, laws.rng(),
        propose=lambda n, g: torch.full((n, 1), 20.0).double(),
    )  # fmt: skip
    assert info.energy_error[0].item() == 20**4 - 10**4
    assert info.diverged.all()
