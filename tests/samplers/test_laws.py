"""What every kernel must obey. A new kernel is one entry of KERNELS."""

import math
from typing import NamedTuple

import pytest
import torch
from scipy import stats

from skebm.samplers import (
    ParallelTempering,
    hmc,
    independence,
    mala,
    random_walk,
    run,
    ula,
)

WIDER = 1.3


class Problem(NamedTuple):
    """A kernel for a law: what is evaluated, the options of a step, and where chains start."""

    kernel: object
    function: object
    options: dict
    start: object = lambda x: x

    def init(self, x):
        return self.kernel.init(self.start(x), self.function)

    def step(self, state, rng, **options):
        return self.kernel.step(state, self.function, rng, **{**self.options, **options})


def with_options(kernel, **options):
    return lambda law: Problem(kernel, law, options)


def independent(law):
    """Proposals from the law itself, made wider."""

    def propose(n, rng):
        return WIDER * law.sample(n, rng)

    return Problem(independence, lambda x: law(x) - law(x / WIDER), {"propose": propose})


def tempered(kernel, **options):
    """Replicas at the law and at a wider one; the hotter starts elsewhere, in its own law."""

    def problem(law):
        tempering = ParallelTempering(kernel, [1.0, 0.0], lambda x: law(x / WIDER))
        return Problem(tempering, law, options, lambda x: torch.stack([x, WIDER * x.flip(0)]))

    return problem


KERNELS = {
    "mala": with_options(mala, step_size=0.7),
    "hmc": with_options(hmc, step_size=0.3, n_leapfrog_steps=4),
    "random_walk": with_options(random_walk, step_size=0.7),
    "independence": independent,
    "tempered_mala": tempered(mala, step_size=0.7),
    "tempered_random_walk": tempered(random_walk, step_size=0.7),
    "ula": with_options(ula, step_size=0.7),
}
EXACT = [name for name in KERNELS if name != "ula"]
# of a single chain: the exchanges of replicas take turns, which is not reversible
REVERSIBLE = [name for name in EXACT if not name.startswith("tempered")]
SCALED = [name for name in KERNELS if KERNELS[name](None).kernel.TARGET_ACCEPTANCE is not None]
DISTRIBUTIONS = ["Gaussian", "Banana", "TwoModes", "StudentT", "Exponential"]


@pytest.mark.parametrize("law_name", DISTRIBUTIONS)
@pytest.mark.parametrize("name", EXACT)
def test_the_law_is_stationary(laws, name, law_name):
    law = getattr(laws, law_name)()
    problem, p = KERNELS[name](law), []
    for seed in range(6):
        g = laws.rng(seed)
        x = law.sample(2000, g)
        state = problem.init(x)
        for _ in range(20):
            state, _ = problem.step(state, g)
        assert not torch.equal(state.position, x)
        p += laws.p_values(law, state.position)
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("law_name", ["Gaussian", "Banana", "TwoModes", "StudentT"])
def test_the_test_above_has_power(laws, law_name):
    """It sees the bias of an unadjusted chain."""
    law, g = getattr(laws, law_name)(), laws.rng()
    problem = KERNELS["ula"](law)
    state = problem.init(law.sample(2000, g))
    for _ in range(20):
        state, _ = problem.step(state, g, step_size=1.0)
    assert not min(laws.p_values(law, state.position)) > 1e-4


def flux_p_value(laws, law, problem, g, n=40_000, n_bins=6):
    """Chi-square test that as many chains go from bin to bin as come back, x of the law."""
    state = problem.init(law.sample(n, g))
    new, _ = problem.step(state, g)
    bins = [(law.uniforms(s.position)[:, 0] * n_bins).long() for s in (state, new)]
    flux = torch.bincount(n_bins * bins[0] + bins[1], minlength=n_bins**2)
    flux = flux.view(n_bins, n_bins).double()
    above = torch.triu(torch.ones(n_bins, n_bins), 1).bool() & (flux + flux.T > 10)
    square = (flux - flux.T)[above].square() / (flux + flux.T)[above]
    return stats.chi2(int(above.sum())).sf(square.sum().item())


@pytest.mark.parametrize("law_name", ["TwoModes", "StudentT", "Exponential"])
@pytest.mark.parametrize("name", REVERSIBLE)
def test_detailed_balance(laws, name, law_name):
    law = getattr(laws, law_name)()
    p = [flux_p_value(laws, law, KERNELS[name](law), laws.rng(s)) for s in range(4)]
    assert min(p) > 1e-3


def test_detailed_balance_is_tested_with_power(laws):
    law = laws.TwoModes()
    assert flux_p_value(laws, law, KERNELS["ula"](law), laws.rng()) < 1e-4


@pytest.mark.parametrize("name", SCALED)
def test_chains_find_the_law_from_afar(laws, name):
    law, g = laws.Gaussian(), laws.rng()
    kernel, _, options, _ = KERNELS[name](law)
    x = torch.full((1000, 3), 8.0, dtype=torch.float64)
    result = run(kernel, x, law, g, n_steps=300, n_burn_in=300, **options)
    assert result.acceptance_rate == pytest.approx(kernel.TARGET_ACCEPTANCE, abs=0.06)
    if name != "ula":
        assert min(laws.p_values(law, result.samples[-1])) > 1e-4


@pytest.mark.parametrize("name", KERNELS)
def test_the_state_is_consistent(laws, name):
    law, g = laws.Gaussian(), laws.rng()
    problem = KERNELS[name](law)
    x = law.sample(50, g)
    state = problem.init(x)
    for _ in range(5):
        before = state
        state, info = problem.step(state, g)
        if not name.startswith("tempered"):  # there, exchanges move positions as well
            moved = (state.position != before.position).any(1)
            assert moved.any()
            assert info.accepted[moved].all()
        torch.testing.assert_close(
            (-info.energy_error).exp().clamp_max(1), info.acceptance_probability
        )
    again = problem.kernel.init(state.position, problem.function)
    for field in ("position", "log_density", "gradient"):
        torch.testing.assert_close(getattr(state, field), getattr(again, field))
    assert not state.position.requires_grad
    assert not state.log_density.requires_grad


@pytest.mark.parametrize("name", KERNELS)
def test_no_chain_depends_on_the_others(laws, name):
    """With the same noise, the first chains go the same way whatever the others do."""
    law = laws.Banana()
    problem, x = KERNELS[name](law), law.sample(12, laws.rng())
    other = x.clone()
    other[5:] = law.sample(7, laws.rng(1))
    other[8:] = 1e200  # the arithmetic of these overflows
    ends = []
    for start in (x, other):
        if name.startswith("tempered"):
            state = problem.kernel.init(torch.stack([start, WIDER * start]), law)
        else:
            state = problem.init(start)
        g = laws.rng(2)
        for _ in range(8):
            state, info = problem.step(state, g)
        ends.append((state.position[:5], state.log_density[:5], info.energy_error[:5]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], x[:5])


@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("tempered")])
def test_the_order_of_the_chains_does_not_matter(laws, name, monkeypatch):
    """Chains in another order, with their noise, go the same ways."""
    law = laws.Banana()
    problem, x = KERNELS[name](law), law.sample(12, laws.rng())
    order = torch.randperm(12, generator=laws.rng(3))

    def end(start):
        state, g = problem.init(start), laws.rng(2)
        for _ in range(8):
            state, _ = problem.step(state, g)
        return state.position

    expected = end(x)[order]
    with monkeypatch.context() as patch:
        for source in ("rand", "randn"):
            draw = getattr(torch, source)
            patch.setattr(
                torch, source, lambda *shape, draw=draw, **kwargs: draw(*shape, **kwargs)[order]
            )
        found = end(x[order])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:the acceptance rate")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCALED)
def test_dtype_device_and_reproducibility(laws, name, dtype, device):
    kernel, _, options, _ = KERNELS[name](laws.normal)
    x = torch.randn(50, 3, generator=laws.rng(0, device), dtype=dtype, device=device)

    def chains(seed):
        return run(
            kernel, x, laws.normal, laws.rng(seed, device),
            n_steps=20, n_burn_in=100, n_keep=5, adapt_scale=True, **options,
        )  # fmt: skip

    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = chains(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.samples.dtype == a.state.log_density.dtype == a.scale.dtype == dtype
    assert a.samples.device.type == device
    torch.manual_seed(2)
    b = chains(3)
    assert torch.equal(a.samples, b.samples)
    assert torch.equal(torch.as_tensor(a.step_size), torch.as_tensor(b.step_size))
    assert torch.equal(a.samples[-1], a.state.position)
    assert not torch.equal(a.samples, chains(4).samples)


@pytest.mark.parametrize("name", SCALED)
def test_scale_is_a_change_of_units(laws, name):
    law, scale = laws.Gaussian(), torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64)
    x = law.sample(30, laws.rng())

    def stretched(y):
        return law(y / scale)

    narrow, wide = KERNELS[name](law), KERNELS[name](stretched)
    a, _ = narrow.step(narrow.init(x), laws.rng(1))
    b, _ = wide.step(wide.init(x * scale), laws.rng(1), scale=scale)
    torch.testing.assert_close(a.position * scale, b.position)


@pytest.mark.parametrize("name", SCALED)
def test_each_chain_may_have_its_own_step_and_scale(laws, name):
    law = laws.Gaussian()
    problem, x = KERNELS[name](law), law.sample(6, laws.rng())

    def end(**options):
        return problem.step(problem.init(x), laws.rng(1), **options)[0].position

    steps = torch.tensor([0.1, 0.2, 0.4, 0.5, 0.7, 1.0], dtype=torch.float64)
    by_step, by_scale = end(step_size=steps[:, None]), end(step_size=1.0, scale=steps[:, None])
    torch.testing.assert_close(by_step, by_scale)
    if not name.startswith("tempered"):  # an exchange compares replicas that moved otherwise
        expected = torch.stack([end(step_size=s.item())[i] for i, s in enumerate(steps)])
        torch.testing.assert_close(by_step, expected)
    per_entry = end(step_size=steps[:, None], scale=torch.ones(6, 3, dtype=torch.float64))
    torch.testing.assert_close(by_step, per_entry)


@pytest.mark.parametrize("name", [name for name in SCALED if "random_walk" not in name])
def test_value_and_gradient_is_asked_where_there_is_one(laws, name):
    """The gradient by hand gives the chain of autograd, and the plain call is not used."""

    class Fast:
        def __call__(self, x):
            raise AssertionError

        def value_and_gradient(self, x):
            assert not x.requires_grad
            return laws.normal(x), -x

    problem = KERNELS[name](laws.normal)
    if name.startswith("tempered"):
        problem = problem._replace(kernel=ParallelTempering(mala, [1.0, 0.3]))
    fast = problem._replace(function=Fast())
    x = torch.randn(2, 20, 3, generator=laws.rng(), dtype=torch.float64)
    x = x if name.startswith("tempered") else x[0]
    a, b = (p.kernel.init(x, p.function) for p in (problem, fast))
    for seed in range(3):
        a, _ = problem.step(a, laws.rng(seed))
        b, _ = fast.step(b, laws.rng(seed))
    torch.testing.assert_close(a.position, b.position)
    torch.testing.assert_close(a.gradient, b.gradient)


@pytest.mark.parametrize("name", SCALED)
def test_cost(laws, name):
    """One evaluation to start, then one per step (HMC: per leapfrog), with or without gradient."""
    calls = []

    def counted(x):
        calls.append((len(x), x.requires_grad))
        return laws.normal(x)

    problem = KERNELS[name](counted)
    if name.startswith("tempered"):
        problem = problem._replace(kernel=ParallelTempering(problem.kernel.kernel, [1.0, 0.3]))
    rows = 20 if name.startswith("tempered") else 10
    x = torch.randn(10, 3, generator=laws.rng())
    run(
        problem.kernel, x, counted, laws.rng(),
        n_steps=50, n_burn_in=50, **problem.options,
    )  # fmt: skip
    per_step = problem.options.get("n_leapfrog_steps", 1)
    assert calls == [(rows, "random_walk" not in name)] * (1 + 100 * per_step)


@pytest.mark.parametrize("name", SCALED)
def test_a_diverging_chain_stays_and_is_told(laws, name):
    def quartic(x):
        return -(x**4).sum(1)

    problem = KERNELS[name](quartic)
    if name.startswith("tempered"):
        problem = problem._replace(kernel=ParallelTempering(problem.kernel.kernel, [1.0, 0.3]))
    x = torch.full((5, 1), 10.0, dtype=torch.float64)
    state = problem.kernel.init(x, quartic)
    new, info = problem.step(state, laws.rng(), step_size=1e60)
    assert info.diverged.all()
    assert torch.equal(new.position, x)
    assert torch.equal(new.log_density, state.log_density)
    assert not info.accepted.any()
    assert (info.acceptance_probability == 0).all()
    _, info = problem.step(state, laws.rng(), step_size=1e-6)
    assert not info.diverged.any()
    assert info.energy_error.abs().max() < 1


@pytest.mark.parametrize("name", ["mala", "hmc", "tempered_mala", "ula"])
def test_a_gradient_that_is_not_finite_does_not_spread(laws, name):
    """sqrt|x| has no gradient at 0, and the law below none beyond 2."""

    def broken(x):
        inside = x.abs().amax(1) < 2
        return torch.where(inside, laws.normal(x), torch.sqrt(-x.abs().sum(1)))

    kernel, _, options, _ = KERNELS[name](laws.normal)
    if name.startswith("tempered"):
        kernel = ParallelTempering(mala, [1.0, 0.3])
    g = laws.rng()
    state = kernel.init(torch.zeros(200, 2, dtype=torch.float64), broken)
    told = 0
    for _ in range(20):
        state, info = kernel.step(state, broken, g, **options)
        told += int(info.diverged.sum())
        assert state.position.abs().max() < 2
        assert state.log_density.isfinite().all()
    assert told > 0
    assert math.isfinite(state.position.sum().item())
