"""HMC and random-walk Metropolis."""

import math

import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning

from skebm.samplers import hmc, independence, mala, random_walk, run

KERNELS = [(hmc, {"n_leapfrog_steps": 4}, 0.3), (random_walk, {}, 0.7)]
kernels = pytest.mark.parametrize(
    ("kernel", "options", "step_size"), KERNELS, ids=["hmc", "random_walk"]
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
        return -torch.log1p(-torch.rand(n, 1, generator=generator, dtype=torch.float64))

    def uniforms(self, x):
        return -torch.expm1(-x)


def normal(x):
    return -0.5 * (x**2).sum(1)


def p_values(law, x):
    u = law.uniforms(x).numpy()
    return [stats.kstest(column, "uniform").pvalue for column in u.T]


@kernels
@pytest.mark.parametrize("law", [Banana(), Exponential()], ids=lambda law: type(law).__name__)
def test_the_law_is_stationary(law, kernel, options, step_size):
    p = []
    for seed in range(8):
        g = generator(seed)
        x = law.sample(2000, g)
        state = kernel.init(x, law)
        for _ in range(20):
            state, _ = kernel.step(state, law, g, step_size=step_size, **options)
        assert not torch.equal(state.position, x)
        p += p_values(law, state.position)
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_without_the_correction_the_law_would_change():
    """The test above has the power to see an unadjusted trajectory."""
    law, g = Banana(), generator()
    state = hmc.init(law.sample(2000, g), law)
    for _ in range(20):
        momentum = torch.randn(state.position.shape, generator=g, dtype=torch.float64)
        state, _ = hmc.leapfrog(state, momentum, law, step_size=0.3, scale=1.0, n_leapfrog_steps=4)
    assert not min(p_values(law, state.position)) > 1e-4


@kernels
def test_chains_find_the_law_from_afar(kernel, options, step_size):
    law, g = Banana(), generator()
    x = torch.full((1000, 2), 4.0, dtype=torch.float64)
    result = run(kernel, x, law, g, n_steps=200, n_burn_in=200, step_size=step_size, **options)
    assert min(p_values(law, result.samples[-1])) > 1e-4
    assert result.acceptance_rate == pytest.approx(kernel.TARGET_ACCEPTANCE, abs=0.06)


def test_leapfrog_is_reversible_and_keeps_volume():
    law, g = Banana(), generator()
    x, m = law.sample(20, g), torch.randn(20, 2, generator=g, dtype=torch.float64)
    options = dict(
        step_size=0.2, scale=torch.tensor([1.0, 0.5], dtype=torch.float64), n_leapfrog_steps=7
    )

    def flow(x, m):
        end, last = hmc.leapfrog(hmc.init(x, law), m, law, **options)
        return end.position, last

    there, momentum = flow(x, m)
    assert (there - x).abs().mean() > 0.1
    back, momentum = flow(there, -momentum)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(-momentum, m)

    h = 1e-5  # Jacobian of the map (x, m) -> (x', m') by central differences
    start = torch.cat([x[:1], m[:1]], 1)
    rows = torch.cat([start + h * torch.eye(4), start - h * torch.eye(4)])
    ends = torch.cat(flow(rows[:, :2], rows[:, 2:]), 1)
    jacobian = (ends[:4] - ends[4:]) / (2 * h)
    assert torch.linalg.det(jacobian).abs().item() == pytest.approx(1.0, abs=1e-6)


def test_energy_error_falls_with_the_square_of_the_step():
    law = Banana()
    x = law.sample(500, generator())
    errors = []
    for n in (8, 16):  # a trajectory of one length
        state, g = hmc.init(x, law), generator(1)
        _, info = hmc.step(state, law, g, step_size=0.8 / n, n_leapfrog_steps=n)
        errors.append(info.energy_error.abs().median().item())
        expected = (-info.energy_error).exp().clamp_max(1.0)
        torch.testing.assert_close(info.acceptance_probability, expected)
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)


def test_one_leapfrog_step_is_mala():
    law, x = Banana(), Banana().sample(50, generator())
    a, info_a = hmc.step(hmc.init(x, law), law, generator(1), step_size=0.5, n_leapfrog_steps=1)
    b, info_b = mala.step(mala.init(x, law), law, generator(1), step_size=0.5)
    torch.testing.assert_close(tuple(a), tuple(b))
    torch.testing.assert_close(info_a.energy_error, info_b.energy_error)


def test_cost():
    calls = []

    def counted(x):
        calls.append(x.requires_grad)
        return normal(x)

    x = torch.randn(10, 3, generator=generator())
    state, g = hmc.init(x, counted), generator()
    for _ in range(5):
        state, _ = hmc.step(state, counted, g, step_size=0.3, n_leapfrog_steps=6)
    assert calls == [True] * (1 + 5 * 6)
    calls.clear()
    run(random_walk, x, counted, generator(), n_steps=50, n_burn_in=50, step_size=1.0)
    assert calls == [False] * 101


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_reproducibility(kernel, options, step_size, dtype):
    x = torch.randn(50, 3, generator=generator(), dtype=dtype)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    arguments = dict(n_steps=20, n_burn_in=100, n_keep=5, step_size=step_size, **options)
    a = run(kernel, x, normal, generator(3), **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.samples.dtype == a.state.log_density.dtype == dtype
    assert torch.equal(a.samples, run(kernel, x, normal, generator(3), **arguments).samples)
    assert not torch.equal(a.samples, run(kernel, x, normal, generator(4), **arguments).samples)


@kernels
def test_scale_is_a_change_of_units(kernel, options, step_size):
    scale = torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64)
    x = torch.randn(30, 3, generator=generator(), dtype=torch.float64)
    a, _ = kernel.step(kernel.init(x, normal), normal, generator(1), step_size=0.7, **options)
    wide = kernel.init(x * scale, lambda y: normal(y / scale))
    b, _ = kernel.step(
        wide, lambda y: normal(y / scale), generator(1), step_size=0.7, scale=scale, **options
    )
    torch.testing.assert_close(a.position * scale, b.position)


def test_a_law_without_gradient():
    def steps(x):  # 1, 2, 3 or 4 units of mass on quarters of the interval
        inside = ((x > 0) & (x < 1)).all(1)
        return torch.where(inside, (1 + (4 * x[:, 0]).floor()).clamp_min(1).log(), -torch.inf)

    x = torch.rand(4000, 1, generator=generator(), dtype=torch.float64)
    result = run(random_walk, x, steps, generator(), n_steps=50, n_burn_in=50, step_size=0.3)
    counts = torch.histc(result.samples[-1], 4, 0, 1).numpy()
    assert stats.chisquare(counts, [400, 800, 1200, 1600]).pvalue > 1e-3


def test_divergence_is_told():
    def quartic(x):
        return -(x**4).sum(1)

    x = torch.full((5, 1), 10.0, dtype=torch.float64)
    for kernel in (hmc, mala, random_walk):
        state = kernel.init(x, quartic)
        new, info = kernel.step(state, quartic, generator(), step_size=1e3)
        assert info.diverged.all()
        assert torch.equal(new.position, x)
        assert not info.accepted.any()
        _, info = kernel.step(state, quartic, generator(), step_size=1e-6)
        assert not info.diverged.any()
        assert info.energy_error.abs().max() < 1
    start = independence.init(x, quartic)
    _, info = independence.step(
        start, quartic, generator(), propose=lambda n, g: torch.full((n, 1), 20.0).double()
    )
    assert info.energy_error[0].item() == 20**4 - 10**4
    assert info.diverged.all()
    outside = Exponential()
    state = random_walk.init(torch.full((5, 1), 1.0).double(), outside)
    _, info = random_walk.step(state, outside, generator(), step_size=1e6)
    assert (info.energy_error == math.inf).any()


def test_bad_arguments():
    x = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="n_leapfrog_steps=0"):
        hmc.step(hmc.init(x, normal), normal, generator(), step_size=1.0, n_leapfrog_steps=0)
    with pytest.warns(ConvergenceWarning, match="accept 0% .* the target is 65%"):
        run(hmc, x, normal, generator(), n_steps=5, step_size=100.0)
