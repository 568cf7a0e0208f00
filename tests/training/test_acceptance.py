"""Whether a tilt is kept: two standard errors, recalibration, and a guard, by closed forms."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

from skebm.bases import GaussianMixtureBase, KernelDensityBase, StackedBase
from skebm.partition import ess
from skebm.training import Trained
from skebm.training import tilted_task as task_module
from skebm.training.acceptance import MIN_ESS, accept, gain_and_error, guard, recalibrate
from skebm.training.marginals import misplaced_bin
from skebm.training.tilted_task import POOL_SIZE


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean=0.0, std=1.0, d=1):
    return GaussianMixtureBase([1.0], torch.full((1, d), mean), std**2 * torch.eye(d)[None])


def normal(n, mean=0.0, seed=0, d=1):
    return torch.as_tensor(np.random.default_rng(seed).normal(mean, 1.0, (n, d)))


def values(task, f):
    """f at the held-out rows and at the pool."""
    return [f(task.x[held]) for held in task.held], torch.stack([f(rows) for rows in task.pool])


def bump(x):
    return 0.4 * x[:, 0] - 0.2 * x[:, 1].square()


def zero(x):
    return torch.zeros(len(x), dtype=torch.float64)


def least_ess(task, pool):
    """Smallest effective share of the pool among the members."""
    return (ess(pool + task.pool_log_ratio) / POOL_SIZE).min()


# ---------------------------------------------------------------- acceptance


def literal_standard_error(m, held, pool):
    gain, weight = m.gain(held, pool).numpy(), m.held_weight.numpy()
    share = weight / weight.sum()
    variance = np.sum(share**2 * (gain - share @ gain) ** 2)
    for k, (_, rows) in enumerate(m.splits):
        w = (pool[k] + m.pool_log_ratio[k]).exp().numpy()
        # delta method: var(log mean w) = var(w) / mean(w)^2 / m
        mass = m.weight[rows].sum().item() / weight.sum()
        variance += mass**2 * w.var() / w.mean() ** 2 / len(w)
    return share @ gain, math.sqrt(variance)


def accepts(m, f):
    held, pool = values(m, f)
    mean, error = gain_and_error(m, m.gain(held, pool), pool)
    return mean > 2.0 * error


@pytest.mark.parametrize("pool_size", [20, POOL_SIZE])
def test_acceptance_at_two_standard_errors(pool_size, monkeypatch, tilted):
    # of the rows and, where the pool is small, of log Z
    monkeypatch.setattr(task_module, "POOL_SIZE", pool_size)
    m = tilted(
        normal(50, 0.3, d=2),
        [gaussian(0.1 * k, 1.0 + 0.1 * k, 2) for k in range(3)],
        [gaussian(0.0, 1.5, 2) for _ in range(3)],
        weight=torch.as_tensor(np.random.default_rng(1).uniform(0.2, 2.0, 50)),
    )
    held, pool = values(m, bump)
    mean, error = literal_standard_error(m, held, pool)
    for n_errors in (1.98, 2.02):
        shift = n_errors * error - mean  # of the gain: f moves at the rows, not at the pool
        gain, gain_error = gain_and_error(m, m.gain([h + shift for h in held], pool), pool)
        assert gain / gain_error == pytest.approx(n_errors, rel=5e-3)


def test_a_useless_tilt_is_rejected(tilted):
    torch.manual_seed(0)
    m = tilted(normal(400, d=2), [gaussian(d=2)] * 4)
    for seed in range(20):
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=rng(seed)))
            assert not accepts(m, lambda x, net=net: net(x)[:, 0])


def test_no_tilt_is_rejected(tilted):
    m = tilted(normal(40), [gaussian()] * 2)
    assert not accepts(m, zero)


def test_false_acceptances_are_as_rare_as_two_standard_errors_say(tilted):
    # a tiny tilt that is nothing but noise: its gain is normal around nearly zero
    accepted = 0
    for seed in range(200):
        m = tilted(normal(300, seed=seed), [gaussian()] * 2, seed=1000 + seed)
        accepted += accepts(m, lambda x: 0.003 * x[:, 0])
    assert 0 < accepted < 13  # 4.6 expected; 13 or more have a chance of 1 in 2,000


def test_a_real_tilt_is_accepted(tilted):
    m = tilted(normal(600, 0.4), [gaussian()] * 4)
    assert accepts(m, lambda x: 0.4 * x[:, 0])
    # but not on too few rows
    few = tilted(torch.linspace(-1.6, 2.8, 8).double()[:, None], [gaussian()] * 4)
    assert few.mean_gain(*values(few, lambda x: 0.4 * x[:, 0])) > 0.1
    assert not accepts(few, lambda x: 0.4 * x[:, 0])


def test_acceptance_minds_the_weights(tilted):
    x = torch.cat([normal(300, 0.5), normal(300, -0.5, seed=1)])
    for sign in (1.0, -1.0):
        weight = torch.where(sign * torch.arange(600).sub(299.5) < 0, 1.0, 1e-3).double()
        m = tilted(x, [gaussian()] * 2, weight=weight)
        assert accepts(m, lambda x, s=sign: 0.5 * s * x[:, 0])
        assert not accepts(m, lambda x, s=sign: -0.5 * s * x[:, 0])


# ---------------------------------------------------------------- recalibration


def test_recovers_an_inverse_temperature(tilted):
    # data N(.8, 1), base N(0, 1): the best tilt is .8 x, and f is .4 x
    n = 4000
    m = tilted(normal(n, 0.8), [gaussian()] * 2)
    power, mode_weights, _ = recalibrate(
        m, *values(m, lambda x: 0.4 * x[:, 0]), m.responsibilities()
    )
    # closed form, with the ridge r = .01 towards 1: argmax of t a mean(x) - (t a)^2 / 2 - r (t-1)^2
    expected = (0.4 * m.x.mean().item() + 0.02) / (0.4**2 + 0.02)
    assert power == pytest.approx(expected, abs=0.06)
    assert len(mode_weights) == 0


def test_one_member_may_be_cooled_down_and_several_not(tilted):
    def f(x):
        return 1.2 * x[:, 0]

    m = tilted(normal(4000, 0.6), [gaussian()])
    held = m.x[m.splits[0][1]].mean().item()
    power, *_ = recalibrate(m, *values(m, f), m.responsibilities())
    assert power == pytest.approx((1.2 * held + 0.02) / (1.2**2 + 0.02), abs=0.05)
    m = tilted(normal(4000, 0.6), [gaussian()] * 2)
    assert recalibrate(m, *values(m, f), m.responsibilities())[0] == 1.0


def far_modes(share):
    return GaussianMixtureBase(
        [share, 1 - share], [[-6.0, 0.0], [6.0, 1.0]], torch.eye(2).double().repeat(2, 1, 1)
    )


@pytest.mark.parametrize("kind", ["mixture", "stack"])
def test_recovers_mode_weights(kind, tilted):
    x = far_modes(0.8).sample(3000, rng(7))
    if kind == "mixture":
        base = far_modes(0.5)
        bases = [base, base]
    else:  # the components of a stack mean the same in every member
        bases = [
            StackedBase([gaussian(-6.0, 1.5, 2), gaussian(6.0, 1.5 + 0.1 * k, 2)], [0.5, 0.5])
            for k in range(2)
        ]
    m = tilted(x, bases)
    power, mode_weights, _ = recalibrate(m, *values(m, zero), m.responsibilities())
    assert len(mode_weights) == 2
    weights = np.array([0.5, 0.5]) * np.exp(mode_weights.numpy())
    np.testing.assert_allclose(weights / weights.sum(), [0.8, 0.2], atol=0.03)
    assert power == 1.0  # f = 0 has none


def test_mode_weights_that_are_right_stay(tilted):
    x = far_modes(0.8).sample(3000, rng(7))
    base = far_modes(0.8)
    _, mode_weights, _ = recalibrate(
        m := tilted(x, [base, base]), *values(m, zero), m.responsibilities()
    )
    if len(mode_weights):
        assert (mode_weights[0] - mode_weights[1]).abs() < 0.1


def test_mixtures_that_differ_have_no_common_modes(tilted):
    x = far_modes(0.8).sample(200, rng(7))
    m = tilted(x, [far_modes(0.5), far_modes(0.5)])
    assert m.responsibilities() is None
    assert tilted(x, [gaussian(d=2)] * 2).responsibilities() is None
    assert tilted(x, [KernelDensityBase(x[:20], 1.0)] * 2).responsibilities() is None
    base = far_modes(0.5)
    held, pool = tilted(x, [base, base]).responsibilities()
    assert [tuple(h.shape) for h in held] == [(100, 2), (100, 2)]
    assert pool.shape == (2, POOL_SIZE, 2)


def test_solution_of_the_convex_problem(tilted):
    # the same objective, written down again and solved by scipy from two far starts
    x = far_modes(0.7).sample(1000, rng(3))
    base = far_modes(0.5)
    weight = torch.as_tensor(np.random.default_rng(0).uniform(0.5, 2.0, len(x)))
    x[:, 1] += 0.3
    m = tilted(x, [base, base], weight=weight)

    def f(x):
        return 0.15 * x[:, 1]

    held_f, pool_f = values(m, f)
    power, mode_weights, _ = recalibrate(m, held_f, pool_f, m.responsibilities())
    shares = m.responsibilities()
    held = [np.column_stack([a, b]) for a, b in zip(held_f, shares[0], strict=True)]
    pool = np.concatenate([pool_f[..., None], shares[1]], axis=2)
    row_weight = m.held_weight.numpy()
    row_weight = row_weight / row_weight.sum()

    def objective(theta):
        log_z = np.log(np.exp(pool @ theta).mean(1))
        gain = np.concatenate([h @ theta - z for h, z in zip(held, log_z, strict=True)])
        return -row_weight @ gain + [1e-2, 1e-3, 1e-3] @ np.square(theta - [1.0, 0.0, 0.0])

    found = [
        optimize.minimize(objective, start, method="BFGS", options={"gtol": 1e-8}).x
        for start in ([3.0, 2.0, -2.0], [-2.0, -1.0, 3.0])
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert found[0][0] > 1.0  # where nothing is cut off
    np.testing.assert_allclose([power, *mode_weights], found[0], atol=2e-3)


def test_kept_only_if_it_helps(tilted):
    # with a true tilt there is nothing to gain but noise; what is kept must not hurt on new rows
    kept = 0
    for seed in range(12):
        m = tilted(normal(400, 0.5, seed=seed), [gaussian()], seed=seed)
        power, *_ = recalibrate(m, *values(m, lambda x: 0.5 * x[:, 0]), m.responsibilities())
        kept += power != 1.0
        # exact gain over the power 1 on N(.5, 1): -(t - 1)^2 / 8
        assert (power - 1.0) ** 2 / 8 < 0.02
    assert kept < 12


# ---------------------------------------------------------------- guard


@pytest.mark.parametrize("own_proposal", [True, False])
def test_guard(own_proposal, tilted):
    proposals = None if own_proposal else [gaussian(0.0, 1.3, 2), gaussian(0.0, 1.3, 2)]
    m = tilted(normal(40, d=2), [gaussian(d=2), gaussian(0.1, d=2)], proposals)
    _, pool = values(m, bump)
    assert guard(m, pool) == 1.0
    assert least_ess(m, 20 * pool) < MIN_ESS
    factor = guard(m, 20 * pool)
    assert 0.0 < factor < 1.0
    assert least_ess(m, 20 * factor * pool) >= MIN_ESS
    assert least_ess(m, 20 * 1.01 * factor * pool) < MIN_ESS  # no smaller than needed


def test_guard_of_an_absurd_tilt(tilted):
    m = tilted(normal(40, d=2), [gaussian(d=2)])
    _, pool = values(m, bump)
    factor = guard(m, 1e9 * pool)
    assert least_ess(m, 1e9 * factor * pool) >= MIN_ESS


# ---------------------------------------------------------------- marginal masses


class Given(nn.Module):
    """An energy that is known: f of the features."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, z):
        return torch.stack([self.f(rows) for rows in z])


def accepted(task, f, **options):
    held, pool = values(task, f)
    trained = Trained(Given(f), held, pool, 1, {})
    options = {"recalibrates": True} | options
    model, decision = accept(task, trained, always=False, **options)
    return model, decision.is_tilted


def draining(x):
    """Much likelihood at a needle around 1, and none of it paid by the rows below -1."""
    return 4.0 * ((x[:, 0] - 1.0).abs() < 0.01).to(x) - 1.5 * (x[:, 0] < -1.0).to(x)


def needle(n, seed=0):
    """N(0, 1), with a fifth of the rows at 1."""
    generator = np.random.default_rng(seed)
    x = np.where(generator.random((n, 1)) < 0.2, 1.0 + 0.005 * generator.uniform(-1, 1, (n, 1)),
                 generator.normal(size=(n, 1)))  # fmt: skip
    return torch.as_tensor(x)


def mass_below(model, bound):
    """Probability of x < bound, by quadrature."""
    grid = torch.linspace(-9.0, 9.0, 360_001, dtype=torch.float64)[:, None]
    density = model.log_members(grid).exp()  # log Z is not measured yet
    share = density / density.sum(1, keepdim=True)
    return share[:, grid[:, 0] < bound].sum(1).mean().item()


def test_a_tilt_that_drains_a_bin_gets_its_mass_back(tilted):
    task = tilted(needle(2000), [gaussian()] * 2)
    model, kept = accepted(task, draining)
    assert kept
    share = (task.x < -1.0).double().mean().item()
    # of the tilt alone about a quarter is left there
    assert 0.85 * share < mass_below(model, -1.0) < 1.15 * share
    held, pool = values(task, draining)
    found = misplaced_bin(task, pool)
    assert found is not None
    assert found.column == 0


def test_without_recalibration_bins_alone_are_matched(tilted):
    task = tilted(needle(2000), [gaussian()] * 2)
    model, kept = accepted(task, draining, recalibrates=False)
    assert kept
    assert model.inverse_temperature == 1.0
    assert mass_below(model, -1.0) > 0.8 * (task.x < -1.0).double().mean().item()


def test_right_masses_are_left_alone(tilted):
    wrong = 0
    for seed in range(20):
        x = normal(400, seed=seed, d=3)
        task = tilted(x, [gaussian(d=3)] * 2, seed=seed)
        _, pool = values(task, zero)
        wrong += misplaced_bin(task, pool) is not None
    assert wrong <= 2  # .2 expected


def test_a_base_in_the_wrong_place_is_found(tilted):
    x = normal(400, d=3)
    x[:, 1] += 0.4
    task = tilted(x, [gaussian(d=3)] * 2)
    _, pool = values(task, zero)
    assert misplaced_bin(task, pool).column == 1


FIT = """
import sys
from skebm import Boosting, NCEDensity
from skebm.datasets import make_two_moons
density = NCEDensity(
    base="gaussian", energy_model=Boosting(max_iter=20), n_members=1, n_partition_samples=1000,
    random_state=0,
).fit(make_two_moons(200, random_state=0))
assert "+-" in density.summary()  # trained, recalibrated and judged
sys.exit("torch._dynamo" in sys.modules)
"""


def test_a_fit_of_trees_does_not_wait_for_the_compiler_of_torch():
    # which all its optimizers import, for two to three seconds
    subprocess.run([sys.executable, "-W", "ignore", "-c", FIT], check=True, timeout=120)
