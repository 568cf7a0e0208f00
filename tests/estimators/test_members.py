import math
import pickle

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from skebm.bases import (
    AffineTransform,
    GaussianMixtureBase,
    KernelDensityBase,
    StackedBase,
)
from skebm.estimators import _members
from skebm.estimators._members import (
    MIN_ESS,
    POOL_SIZE,
    Members,
    Trained,
    guard,
    make_splits,
    recalibrate,
)
from skebm.estimators._model import CLIP, FeatureMap, TiltedMixture, log_ratio


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def identity(d):
    return FeatureMap(AffineTransform(torch.zeros(d), torch.ones(d)))


def gaussian(mean=0.0, std=1.0, d=1):
    return GaussianMixtureBase(
        [1.0], torch.full((1, d), mean), std**2 * torch.eye(d).double()[None]
    )


def normal(n, mean=0.0, std=1.0, seed=0, d=1):
    return torch.as_tensor(np.random.default_rng(seed).normal(mean, std, (n, d)))


def members(x, bases, proposals=None, weight=None, seed=0, fraction=0.5):
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight
    splits = make_splits(len(x), len(bases), fraction, generator(seed))
    return Members(
        x, weight, splits, bases, proposals or bases, identity(x.shape[1]), generator(seed + 1)
    )


def values(m, f):
    """f at the held-out rows and at the pool."""
    return [f(m.x[held]) for _, held in m.splits], torch.stack([f(rows) for rows in m.pool])


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(("n", "k"), [(100, 4), (101, 4), (7, 3), (5, 5), (3, 8), (2, 4)])
def test_folds(n, k):
    splits = make_splits(n, k, 0.1, generator())
    assert len(splits) == min(n, k)
    held = torch.cat([h for _, h in splits])
    assert sorted(held.tolist()) == list(range(n))  # every row is held out once
    sizes = [len(h) for _, h in splits]
    assert max(sizes) - min(sizes) <= 1
    for train, h in splits:
        assert sorted(torch.cat([train, h]).tolist()) == list(range(n))
        assert (train.diff() > 0).all()
        assert (h.diff() > 0).all()


@pytest.mark.parametrize(
    ("n", "fraction", "n_held"),
    [(100, 0.1, 10), (100, 0.25, 25), (3, 0.1, 1), (2, 0.9, 1), (50, 0.999, 49)],
)
def test_one_member_has_a_validation_split(n, fraction, n_held):
    ((train, held),) = make_splits(n, 1, fraction, generator())
    assert len(held) == n_held
    assert sorted(torch.cat([train, held]).tolist()) == list(range(n))


def test_splits_are_random_and_reproducible():
    a, b, c = (make_splits(60, 3, 0.1, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(s[1], t[1]) for s, t in zip(a, b, strict=True))
    assert not all(torch.equal(s[1], t[1]) for s, t in zip(a, c, strict=True))
    assert not torch.equal(a[0][1], torch.arange(20))


# ---------------------------------------------------------------- gain, ess


def uneven():
    """Three members of different bases and proposals, weighted rows."""
    x = normal(50, 0.3, d=2)
    weight = torch.as_tensor(np.random.default_rng(1).uniform(0.2, 2.0, 50))
    bases = [gaussian(0.1 * k, 1.0 + 0.1 * k, 2) for k in range(3)]
    proposals = [gaussian(0.0, 1.5, 2) for _ in range(3)]
    return members(x, bases, proposals, weight)


def bump(x):
    return 0.4 * x[:, 0] - 0.2 * x[:, 1].square()


def test_pool_comes_from_the_proposals():
    m = uneven()
    assert m.pool.shape == (3, POOL_SIZE, 2)
    for rows, q, p, ratio in zip(m.pool, m.bases, m.proposals, m.pool_log_ratio, strict=True):
        assert stats.kstest(rows[:, 0] / 1.5, "norm").pvalue > 1e-3
        torch.testing.assert_close(ratio, q.log_prob(rows) - p.log_prob(rows))
    assert not m.tilts_its_proposal
    torch.testing.assert_close(m.z, m.x.clamp(-CLIP, CLIP))
    torch.testing.assert_close(m.pool_z, m.pool.clamp(-CLIP, CLIP))
    own = members(m.x, m.bases)
    assert own.tilts_its_proposal
    assert (own.pool_log_ratio == 0).all()


def test_gain_against_a_literal_formula():
    m = uneven()
    held, pool = values(m, bump)
    expected, masses = [], []
    for k, (_, rows) in enumerate(m.splits):
        y, x = m.pool[k], m.x[rows]
        weights = (m.bases[k].log_prob(y) - m.proposals[k].log_prob(y) + bump(y)).exp()
        expected.append((bump(x) - weights.mean().log()).numpy())
        masses.append(m.weight[rows].numpy())
    expected, masses = np.concatenate(expected), np.concatenate(masses)
    np.testing.assert_allclose(m.gain(held, pool), expected)
    assert m.mean_gain(held, pool).item() == pytest.approx(np.average(expected, weights=masses))
    np.testing.assert_allclose(torch.cat(m.held_weights), masses)


def test_gain_of_several_candidates_at_once():
    m = uneven()
    held, pool = values(m, bump)
    factors = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    many = m.mean_gain([h * factors[:, None] for h in held], pool * factors[:, None, None])
    single = [m.mean_gain([a * h for h in held], a * pool) for a in factors]
    torch.testing.assert_close(many, torch.stack(single))


def test_constants_do_not_count():
    m = uneven()
    held, pool = values(m, bump)
    shift = torch.tensor([3.0, -7.0, 500.0], dtype=torch.float64)
    moved = [h + c for h, c in zip(held, shift, strict=True)]
    torch.testing.assert_close(m.gain(moved, pool + shift[:, None]), m.gain(held, pool))
    torch.testing.assert_close(m.ess(pool + shift[:, None]), m.ess(pool))


def test_ess_against_a_literal_formula():
    m = uneven()
    _, pool = values(m, bump)
    w = (pool + m.pool_log_ratio).exp()
    torch.testing.assert_close(m.ess(pool), w.sum(1) ** 2 / w.square().sum(1) / POOL_SIZE)


def test_log_partition_of_a_known_tilt():
    # q = N(0, 1), f = a x: log Z = a^2 / 2
    m = members(normal(40), [gaussian()] * 2)
    _, pool = values(m, lambda x: 0.7 * x[:, 0])
    np.testing.assert_allclose(m.log_partition(pool), 0.7**2 / 2, atol=0.03)


# ---------------------------------------------------------------- acceptance


def literal_standard_error(m, held, pool):
    gain, weight = m.gain(held, pool).numpy(), torch.cat(m.held_weights).numpy()
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
    return m.accepts(m.gain(held, pool), pool)


@pytest.mark.parametrize("pool_size", [20, POOL_SIZE])
def test_acceptance_at_two_standard_errors(pool_size, monkeypatch):
    # of the rows and, where the pool is small, of log Z
    monkeypatch.setattr(_members, "POOL_SIZE", pool_size)
    m = uneven()
    held, pool = values(m, bump)
    mean, error = literal_standard_error(m, held, pool)
    for n_errors, expected in ((1.98, False), (2.02, True)):
        shift = n_errors * error - mean  # of the gain: f moves at the rows, not at the pool
        assert m.accepts(m.gain([h + shift for h in held], pool), pool) is expected


def test_a_useless_tilt_is_rejected():
    torch.manual_seed(0)
    m = members(normal(400, d=2), [gaussian(d=2)] * 4)
    for seed in range(20):
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator(seed)))
            assert not accepts(m, lambda x, net=net: net(x)[:, 0])


def test_no_tilt_is_rejected():
    m = members(normal(40), [gaussian()] * 2)
    assert not accepts(m, lambda x: torch.zeros(len(x), dtype=torch.float64))


def test_false_acceptances_are_as_rare_as_two_standard_errors_say():
    # a tiny tilt that is nothing but noise: its gain is normal around nearly zero
    accepted = 0
    for seed in range(200):
        m = members(normal(300, seed=seed), [gaussian()] * 2, seed=1000 + seed)
        accepted += accepts(m, lambda x: 0.003 * x[:, 0])
    assert 0 < accepted < 13  # 4.6 expected; 13 or more have a chance of 1 in 2,000


def test_a_real_tilt_is_accepted():
    m = members(normal(600, 0.4), [gaussian()] * 4)
    assert accepts(m, lambda x: 0.4 * x[:, 0])
    # but not on too few rows
    few = members(torch.linspace(-1.6, 2.8, 8).double()[:, None], [gaussian()] * 4)
    assert few.mean_gain(*values(few, lambda x: 0.4 * x[:, 0])) > 0.1
    assert not accepts(few, lambda x: 0.4 * x[:, 0])


def test_acceptance_minds_the_weights():
    x = torch.cat([normal(300, 0.5), normal(300, -0.5, seed=1)])
    for sign in (1.0, -1.0):
        weight = torch.where(sign * torch.arange(600).sub(299.5) < 0, 1.0, 1e-3).double()
        m = members(x, [gaussian()] * 2, weight=weight)
        assert accepts(m, lambda x, s=sign: 0.5 * s * x[:, 0])
        assert not accepts(m, lambda x, s=sign: -0.5 * s * x[:, 0])


# ---------------------------------------------------------------- recalibration


def test_recovers_a_temperature():
    # data N(.8, 1), base N(0, 1): the best tilt is .8 x, and f is .4 x
    n = 4000
    m = members(normal(n, 0.8), [gaussian()] * 2)
    temperature, mode_weights, _ = recalibrate(m, *values(m, lambda x: 0.4 * x[:, 0]))
    # closed form, with the ridge r = .01 towards 1: argmax of t a mean(x) - (t a)^2 / 2 - r (t-1)^2
    expected = (0.4 * m.x.mean().item() + 0.02) / (0.4**2 + 0.02)
    assert temperature == pytest.approx(expected, abs=0.06)
    assert len(mode_weights) == 0


def test_one_member_may_be_cooled_down_and_several_not():
    def f(x):
        return 1.2 * x[:, 0]

    m = members(normal(4000, 0.6), [gaussian()])
    held = m.x[m.splits[0][1]].mean().item()
    temperature, *_ = recalibrate(m, *values(m, f))
    assert temperature == pytest.approx((1.2 * held + 0.02) / (1.2**2 + 0.02), abs=0.05)
    m = members(normal(4000, 0.6), [gaussian()] * 2)
    assert recalibrate(m, *values(m, f))[0] == 1.0


def far_modes(share):
    return GaussianMixtureBase(
        [share, 1 - share], [[-6.0, 0.0], [6.0, 1.0]], torch.eye(2).double().repeat(2, 1, 1)
    )


def zero(x):
    return torch.zeros(len(x), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["mixture", "stack"])
def test_recovers_mode_weights(kind):
    x = far_modes(0.8).sample(3000, generator(7))
    if kind == "mixture":
        base = far_modes(0.5)
        bases = [base, base]
    else:  # the components of a stack mean the same in every member
        bases = [
            StackedBase([gaussian(-6.0, 1.5, 2), gaussian(6.0, 1.5 + 0.1 * k, 2)], [0.5, 0.5])
            for k in range(2)
        ]
    m = members(x, bases)
    temperature, mode_weights, _ = recalibrate(m, *values(m, zero))
    assert len(mode_weights) == 2
    weights = np.array([0.5, 0.5]) * np.exp(mode_weights.numpy())
    np.testing.assert_allclose(weights / weights.sum(), [0.8, 0.2], atol=0.03)
    assert temperature == 1.0  # f = 0 has none


def test_mode_weights_that_are_right_stay():
    x = far_modes(0.8).sample(3000, generator(7))
    base = far_modes(0.8)
    _, mode_weights, _ = recalibrate(m := members(x, [base, base]), *values(m, zero))
    if len(mode_weights):
        assert (mode_weights[0] - mode_weights[1]).abs() < 0.1


def test_mixtures_that_differ_have_no_common_modes():
    x = far_modes(0.8).sample(200, generator(7))
    m = members(x, [far_modes(0.5), far_modes(0.5)])
    assert m.responsibilities() is None
    assert members(x, [gaussian(d=2)] * 2).responsibilities() is None
    assert members(x, [KernelDensityBase(x[:20], 1.0)] * 2).responsibilities() is None
    base = far_modes(0.5)
    held, pool = members(x, [base, base]).responsibilities()
    assert [tuple(h.shape) for h in held] == [(100, 2), (100, 2)]
    assert pool.shape == (2, POOL_SIZE, 2)


def test_solution_of_the_convex_problem():
    # the same objective, written down again and solved by scipy from two far starts
    x = far_modes(0.7).sample(1000, generator(3))
    base = far_modes(0.5)
    weight = torch.as_tensor(np.random.default_rng(0).uniform(0.5, 2.0, len(x)))
    x[:, 1] += 0.3
    m = members(x, [base, base], weight=weight)

    def f(x):
        return 0.15 * x[:, 1]

    held_f, pool_f = values(m, f)
    temperature, mode_weights, _ = recalibrate(m, held_f, pool_f)
    shares = m.responsibilities()
    held = [np.column_stack([a, b]) for a, b in zip(held_f, shares[0], strict=True)]
    pool = np.concatenate([pool_f[..., None], shares[1]], axis=2)
    row_weight = torch.cat(m.held_weights).numpy()
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
    np.testing.assert_allclose([temperature, *mode_weights], found[0], atol=2e-3)


def test_kept_only_if_it_helps():
    # with a true tilt there is nothing to gain but noise; what is kept must not hurt on new rows
    kept = 0
    for seed in range(12):
        m = members(normal(400, 0.5, seed=seed), [gaussian()], seed=seed)
        temperature, *_ = recalibrate(m, *values(m, lambda x: 0.5 * x[:, 0]))
        kept += temperature != 1.0
        # exact gain over temperature 1 on N(.5, 1): -(t - 1)^2 / 8
        assert (temperature - 1.0) ** 2 / 8 < 0.02
    assert kept < 12


# ---------------------------------------------------------------- guard


@pytest.mark.parametrize("own_proposal", [True, False])
def test_guard(own_proposal):
    proposals = None if own_proposal else [gaussian(0.0, 1.3, 2), gaussian(0.0, 1.3, 2)]
    m = members(normal(40, d=2), [gaussian(d=2), gaussian(0.1, d=2)], proposals)
    _, pool = values(m, bump)
    assert guard(m, pool) == 1.0
    assert m.ess(20 * pool).min() < MIN_ESS
    factor = guard(m, 20 * pool)
    assert 0.0 < factor < 1.0
    assert m.ess(20 * factor * pool).min() >= MIN_ESS
    assert m.ess(20 * 1.01 * factor * pool).min() < MIN_ESS  # no smaller than needed


def test_guard_of_an_absurd_tilt():
    m = members(normal(40, d=2), [gaussian(d=2)])
    _, pool = values(m, bump)
    factor = guard(m, 1e9 * pool)
    assert m.ess(1e9 * factor * pool).min() >= MIN_ESS


def test_nothing_trained():
    own = members(normal(50, d=2), [gaussian(0.1 * k, d=2) for k in range(3)])
    trained = Trained.nothing(own)
    assert own.mean_gain(trained.held, trained.pool).item() == pytest.approx(0.0, abs=1e-12)
    assert (trained.n_iter, trained.energy) == (0, None)


# ---------------------------------------------------------------- the model


class Bumps(nn.Module):
    """Member k: (.4 + .1 k) sin(2 z_1) - .1 |z|^2; (K, n, d) -> (K, n)."""

    def forward(self, z):
        k = torch.arange(len(z), dtype=z.dtype)[:, None]
        return (0.4 + 0.1 * k) * (2 * z[..., 0]).sin() - 0.1 * z.square().sum(-1)


def model(d=1, n_members=3, tilted=True):
    bases = [
        GaussianMixtureBase(
            [0.3, 0.7],
            [[-1.0 - 0.1 * k] * d, [1.5] * d],
            torch.eye(d).double().repeat(2, 1, 1) * (0.8 + 0.1 * k),
        )
        for k in range(n_members)
    ]
    out = TiltedMixture(bases, bases, identity(d), Bumps() if tilted else None)
    if tilted:
        out.calibrate(1.3, torch.tensor([0.5, -0.2], dtype=torch.float64), bases)
        out.log_partition = torch.linspace(-0.2, 0.3, n_members, dtype=torch.float64)
        out.log_partition_std_error = torch.linspace(0.02, 0.1, n_members, dtype=torch.float64)
    return out


def literal_members(m, x):
    """Unnormalised densities of all members, from the formula."""
    rows = []
    for k, q in enumerate(m.bases):
        z = x.clamp(-CLIP, CLIP)
        f = (0.4 + 0.1 * k) * (2 * z[:, 0]).sin() - 0.1 * z.square().sum(1)
        joint = q.weights * torch.stack(
            [
                torch.as_tensor(
                    stats.multivariate_normal(
                        q.means[j].numpy(), (q.scale_tril[j] @ q.scale_tril[j].mT).numpy()
                    ).pdf(x.numpy())
                ).reshape(len(x))
                for j in range(2)
            ],
            dim=1,
        )
        density = joint.sum(1)
        share = joint / density[:, None]
        rows.append(density * (1.3 * f + 0.5 * share[:, 0] - 0.2 * share[:, 1]).exp())
    return torch.stack(rows)


@pytest.mark.parametrize("d", [1, 2])
def test_log_prob_against_a_literal_formula(d):
    m, x = model(d), normal(60, std=3.0, d=d)
    expected = literal_members(m, x) / m.log_partition.exp()[:, None]
    torch.testing.assert_close(m.log_members(x), expected.log())
    torch.testing.assert_close(m.log_prob(x), expected.mean(0).log())
    base = torch.stack([q.log_prob(x).exp() for q in m.bases]).mean(0).log()
    torch.testing.assert_close(m.base_log_prob(x), base)


def test_integrates_to_one():
    m = model()
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    m.log_partition = torch.trapezoid(literal_members(m, x[:, None]), x).log()
    total = torch.trapezoid(m.log_prob(x[:, None]).exp(), x)
    assert total.item() == pytest.approx(1.0, abs=1e-9)


def test_untilted_is_its_bases():
    m, x = model(2, tilted=False), normal(50, d=2)
    assert m.is_untilted
    assert torch.equal(m.log_prob(x), m.base_log_prob(x))
    assert (m.log_prob_std(x) == 0).all()
    assert m.n_members == 3
    assert m.n_features == 2


def test_standard_error_by_simulation():
    m, x = model(), normal(6, std=2.0)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4000, 3)) * m.log_partition_std_error.numpy()
    logs = m.log_members(x).numpy()
    simulated = np.log(np.exp(logs - noise[:, :, None]).mean(1)).std(0)
    np.testing.assert_allclose(m.log_prob_std(x), simulated, rtol=0.06)


def test_score_against_finite_differences():
    m, x, h = model(2), normal(30, std=2.0, d=2), 1e-5
    steps = torch.eye(2, dtype=torch.float64) * h
    expected = torch.stack([(m.log_prob(x + s) - m.log_prob(x - s)) / (2 * h) for s in steps], 1)
    torch.testing.assert_close(m.score(x), expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(m.score(x), expected, atol=1e-6, rtol=1e-6)


def test_tails_fall_back_to_the_base():
    m = model()
    x = torch.tensor([[40.0], [60.0]], dtype=torch.float64)
    difference = m.log_members(x) - torch.stack([q.log_prob(x) for q in m.bases])
    torch.testing.assert_close(difference[:, 0], difference[:, 1])


def test_chunks_do_not_matter(monkeypatch):
    from skebm.estimators import _model

    m, x = model(2), normal(100, d=2)
    whole = m.log_prob(x), m.log_prob_std(x), m.score(x), m.log_weights(x.expand(3, -1, -1))
    monkeypatch.setattr(_model, "_CHUNK", 7)
    parts = m.log_prob(x), m.log_prob_std(x), m.score(x), m.log_weights(x.expand(3, -1, -1))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_log_weights_measure_log_z():
    m = model()
    grid = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    exact = torch.trapezoid(literal_members(m, grid[:, None]), grid).log()
    x, log_weights = m.draw(40_000, generator())
    assert x.shape == (3, 40_000, 1)
    estimate = log_weights.exp().mean(1).log()
    error = log_weights.exp().std(1) / log_weights.exp().mean(1) / 200
    assert ((estimate - exact).abs() < 4 * error).all()
    # another proposal changes weights, not log Z
    m.proposals = nn.ModuleList([gaussian(0.5, 2.5) for _ in range(3)])
    x, log_weights = m.draw(40_000, generator())
    error = log_weights.exp().std(1) / log_weights.exp().mean(1) / 200
    assert ((log_weights.exp().mean(1).log() - exact).abs() < 4 * error).all()
    expected = literal_members(m, x[1])[1].log() - m.proposals[1].log_prob(x[1])
    torch.testing.assert_close(log_weights[1], expected)


def test_log_ratio_of_one_law_is_exactly_zero():
    q, p, x = gaussian(), gaussian(0.5), normal(9).expand(2, -1, -1)
    ratio = log_ratio([q, q], [q, p], x)
    assert (ratio[0] == 0).all()
    torch.testing.assert_close(ratio[1], q.log_prob(x[1]) - p.log_prob(x[1]))


def test_pickle():
    m, x = model(2), normal(20, d=2)
    assert torch.equal(pickle.loads(pickle.dumps(m)).log_prob(x), m.log_prob(x))
