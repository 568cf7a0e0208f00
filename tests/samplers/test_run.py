"""The loop: burn-in, thinning, adaptation, what it reports and what it warns of."""

import sys
import warnings

import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning

from skebm.samplers import ParallelTempering, State, hmc, mala, random_walk, run, ula
from skebm.samplers._run import Moments


def test_what_is_kept_is_every_so_manieth_state(laws):
    law, x = laws.Banana(), laws.Banana().sample(20, laws.rng())
    options = dict(n_steps=12, n_burn_in=7, step_size=0.5)
    every = run(mala, x, law, laws.rng(1), n_keep=12, **options)
    some = run(mala, x, law, laws.rng(1), n_keep=3, **options)
    assert torch.equal(some.samples, every.samples[3::4])
    assert torch.equal(some.samples[-1], some.state.position)
    # from the state left another run goes on
    g = laws.rng(1)
    half = run(mala, x, law, g, **{**options, "n_steps": 6})
    rest = run(mala, half.state.position, law, g, n_steps=6, step_size=half.step_size)
    torch.testing.assert_close(rest.samples[-1], every.samples[-1])


def test_what_is_counted(laws):
    """A chain far out on a steep law diverges, one at its centre does not."""

    def quartic(x):
        return -(x**4).sum(1)

    x = torch.tensor([[0.0], [1e3], [0.1]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="33% of the proposals diverged"):
        result = run(mala, x, quartic, laws.rng(), n_steps=10, step_size=0.5)
    assert result.n_diverged.tolist() == [0, 10, 0]
    assert result.acceptance_rates[1] == 0
    assert (result.acceptance_rates[[0, 2]] > 0.5).all()
    assert result.acceptance_rate == pytest.approx(result.acceptance_rates.mean().item())
    assert result.swap_rates is None


@pytest.mark.parametrize("step_size", [1e-2, 0.5, 50.0])
def test_step_size_is_adapted(laws, step_size):
    law, g = laws.Gaussian(), laws.rng()
    scale = torch.tensor([1.0, 1.0, 3.6], dtype=torch.float64)
    result = run(
        mala, law.sample(200, g), law, g,
        n_steps=100, n_burn_in=200, step_size=step_size, scale=scale,
    )  # fmt: skip
    assert result.acceptance_rate == pytest.approx(mala.TARGET_ACCEPTANCE, abs=0.06)
    assert 0.3 < result.step_size < 2.0
    assert torch.equal(result.scale, scale)


def test_a_tensor_of_step_sizes_is_adapted_by_one_factor(laws):
    g = laws.rng()
    x = torch.randn(200, 2, generator=g, dtype=torch.float64)
    steps = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(100)[:, None]
    result = run(mala, x, laws.normal, g, n_steps=50, n_burn_in=100, step_size=0.01 * steps)
    factors = result.step_size / steps
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    assert result.acceptance_rate == pytest.approx(mala.TARGET_ACCEPTANCE, abs=0.08)


@pytest.mark.filterwarnings("ignore:the acceptance rate")
@pytest.mark.parametrize(
    ("kernel", "options"),
    [(mala, {}), (hmc, {"n_leapfrog_steps": 2}), (random_walk, {}), (ParallelTempering(), {})],
    ids=["mala", "hmc", "random_walk", "tempered"],
)
def test_an_adapted_scale_cures_a_badly_scaled_law(laws, kernel, options):
    deviations = torch.tensor([0.1, 10.0], dtype=torch.float64)

    def law(x):
        return laws.normal(x / deviations)

    p = {}
    for adapt_scale in (False, True):
        g = laws.rng()
        x = torch.randn(1000, 2, generator=g, dtype=torch.float64)
        result = run(
            kernel, x, law, g,
            n_steps=60, n_burn_in=300, step_size=0.5, adapt_scale=adapt_scale, **options,
        )  # fmt: skip
        end = (result.samples[-1] / deviations).numpy()
        p[adapt_scale] = min(stats.kstest(column, "norm").pvalue for column in end.T)
    assert p[True] > 1e-3
    if not isinstance(kernel, ParallelTempering):  # whose hot replicas take long steps
        assert p[False] < 1e-6
    torch.testing.assert_close(result.scale, deviations, rtol=0.1, atol=0)


def test_moments_against_all_rows_at_once(laws):
    x = 1e4 + torch.randn(7, 5, 3, generator=laws.rng(), dtype=torch.float64)
    moments = Moments()
    for rows in x:
        moments.update(rows)
    torch.testing.assert_close(moments.standard_deviation, x.flatten(0, 1).std(0))


def test_a_column_that_has_not_moved_keeps_its_scale(laws):
    def walled(x):  # any move of the second column leaves the support
        return torch.where(x[:, 1] == 3.0, -0.5 * x[:, 0] ** 2, -torch.inf)

    class Frozen:
        TARGET_ACCEPTANCE = random_walk.TARGET_ACCEPTANCE
        init = staticmethod(random_walk.init)

        @staticmethod
        def step(state, log_density, rng, *, step_size, scale):
            scale = scale * torch.tensor([1.0, 0.0])
            return random_walk.step(state, log_density, rng, step_size=step_size, scale=scale)

    g = laws.rng()
    x = torch.tensor([[0.0, 3.0]]).repeat(100, 1)
    result = run(
        Frozen, x, walled, g,
        n_steps=20, n_burn_in=100, step_size=1.0, scale=2.0, adapt_scale=True,
    )  # fmt: skip
    assert result.scale[1] == 2.0
    assert result.scale[0].item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.filterwarnings("ignore:.* of the proposals diverged")
def test_bad_steps_are_warned_of(laws):
    law, g = laws.Gaussian(), laws.rng()
    x = law.sample(100, g)
    with pytest.warns(ConvergenceWarning, match="rate is 0% at step size 100; the target is 57%"):
        run(mala, x, law, g, n_steps=5, step_size=100.0)
    with pytest.warns(ConvergenceWarning, match="rate is 0% at step size 1e.04; .* 23%"):
        run(random_walk, x, law, g, n_steps=5, step_size=1e4)
    with pytest.warns(ConvergenceWarning, match=r"rate is \d\d% at step size 1; .* 98%"):
        run(ula, x, law, g, n_steps=5, step_size=1.0)
    with pytest.warns(ConvergenceWarning, match="rate is 100% at step size 0.001; .* 57%"):
        run(mala, x, law, g, n_steps=5, step_size=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ula, x, law, g, n_steps=5, step_size=1e-3)  # the smaller, the better
        run(mala, x, law, g, n_steps=20, n_burn_in=100, step_size=100.0)
        run(ula, x, law, g, n_steps=20, n_burn_in=100, step_size=100.0)


def test_exchanges_that_are_too_rare_are_warned_of(laws):
    x = torch.randn(50, 10, generator=laws.rng())
    with pytest.warns(ConvergenceWarning, match="temperatures 1 and 0.001 exchange .* in between"):
        run(
            ParallelTempering(inverse_temperatures=[1.0, 1e-3]), x, laws.normal, laws.rng(),
            n_steps=50, n_burn_in=100, step_size=0.5,
        )  # fmt: skip


def test_bad_arguments_are_named(laws):
    law, g = laws.Gaussian(), laws.rng()
    x = law.sample(10, g)
    with pytest.raises(ValueError, match="n_keep=2 must divide n_steps=5"):
        run(mala, x, law, g, n_steps=5, n_keep=2, step_size=1.0)
    with pytest.raises(ValueError, match="n_burn_in=-1"):
        run(mala, x, law, g, n_steps=5, n_burn_in=-1, step_size=1.0)
    with pytest.raises(ValueError, match="step_size"):
        run(mala, x, law, g, n_steps=5)
    with pytest.raises(ValueError, match="adapt_scale=True needs .* at least 10"):
        run(mala, x, law, g, n_steps=5, step_size=1.0, adapt_scale=True)
    with pytest.raises(ValueError, match=r"x must have the shape \(n_chains, d\), got \(3,\)"):
        run(mala, x[0], law, g, n_steps=5, step_size=1.0)
    with pytest.raises(ValueError, match=r"shape \(10,\), got \(10, 1\)"):
        run(mala, x, lambda x: law(x)[:, None], g, n_steps=5, step_size=1.0)
    start = torch.ones(10, 1, dtype=torch.float64)
    start[:3] = -1
    with pytest.raises(ValueError, match="3 of 10 chains start"):
        run(mala, start, laws.Exponential(), g, n_steps=5, step_size=0.1)


@pytest.mark.filterwarnings("ignore:the acceptance rate")
def test_progress(laws, capsys, monkeypatch):
    class Slow:
        """A kernel whose clock the bar can see move."""

        TARGET_ACCEPTANCE = None
        init = staticmethod(lambda x, f: State(x, f(x)))

        @staticmethod
        def step(state, f, rng):
            clock.append(clock[-1] + 1.0)
            return random_walk.step(state, f, rng, step_size=1.0)

    import tqdm.std

    clock = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[-1])
    x = torch.zeros(3, 1)
    run(Slow, x, laws.normal, laws.rng(), n_steps=5, n_burn_in=5, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err
    monkeypatch.undo()
    fast = dict(n_steps=2, step_size=1.0)
    run(random_walk, x, laws.normal, laws.rng(), progress=True, **fast)
    assert capsys.readouterr().err == ""  # over before a bar is worth it
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        run(random_walk, x, laws.normal, laws.rng(), progress=True, **fast)
    run(random_walk, x, laws.normal, laws.rng(), **fast)
