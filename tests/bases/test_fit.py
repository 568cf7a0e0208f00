import pickle

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.mixture import GaussianMixture

from skebm._engine import Budget
from skebm.bases import (
    CANDIDATES,
    FlowBase,
    GaussianMixtureBase,
    SklearnDensity,
    StackedBase,
    _candidates,
    _flow_training,
    auto_candidates,
    auto_flows,
    fit_bases,
    stacking_weights,
)
from skebm.bases._stacking import MAX_ADDED_WEIGHT, added, is_worth_it

SINGLE = ["gaussian", "gmm", "gaussianized_gmm", "gaussianized_gmm_narrow", "kde",
          "gaussianized_kde", "uniform"]  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=360, d=2, seed=0):
    """Two clusters with skewed columns."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=(n, d)) + 6.0 * (rng.random((n, 1)) < 0.4)
    x[:, 1:] += 0.5 * x[:, :1]
    return torch.as_tensor((x - x.mean(0)) / x.std(0))


def folds(n, k=3):
    order = torch.arange(n)
    return [(order[order % k != j], order[order % k == j]) for j in range(k)]


def fit(names, x, splits=None, seed=0, weight=None):
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight
    chosen = {name: CANDIDATES[name] for name in names}
    return fit_bases(x, weight, splits or folds(len(x)), chosen, rng(seed))


def held_out(bases, x, splits):
    return torch.cat([q.log_prob(x[held]) for q, (_, held) in zip(bases, splits, strict=True)])


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", SINGLE)
def test_one_candidate(name, d):
    x = rows(240, 2)[:, :d].contiguous()
    splits = folds(len(x))
    bases = fit([name], x, splits)
    assert len(bases) == 3
    for base in bases:
        assert base.n_features == d
        assert not isinstance(base, StackedBase)
        assert base.log_prob(x).isfinite().all()
        assert base.log_prob(x).dtype == torch.float64
        sample = base.sample(2000, rng())
        assert (sample.mean(0).abs() < 0.9).all()
        assert (sample.std(0) < 1.6).all()
        assert (sample.std(0) > 0.8).all()
    grid = torch.linspace(-10, 10, 401, dtype=torch.float64)
    points = grid[:, None] if d == 1 else torch.cartesian_prod(grid, grid)
    total = base.log_prob(points).exp().sum() * (grid[1] - grid[0]) ** d
    assert total.item() == pytest.approx(1.0, abs=0.03)
    # members are fitted on their own rows
    assert not torch.equal(bases[0].log_prob(x), bases[1].log_prob(x)) or name == "uniform"


@pytest.mark.parametrize("name", ["gmm", "gaussianized_gmm", "kde", "gaussianized_kde"])
def test_flexible_candidates_beat_the_gaussian(name):
    x, splits = rows(), folds(360)
    value = held_out(fit([name], x, splits), x, splits).mean()
    assert value > held_out(fit(["gaussian"], x, splits), x, splits).mean() + 0.1


def test_gaussian_is_mean_and_covariance_of_its_rows():
    x, splits = rows(), folds(360)
    for base, (train, _) in zip(fit(["gaussian"], x, splits), splits, strict=True):
        torch.testing.assert_close(base.means[0], x[train].mean(0))
        covariance = torch.cov(x[train].mT, correction=0)
        torch.testing.assert_close(base.scale_tril[0] @ base.scale_tril[0].mT, covariance,
                                   atol=1e-5, rtol=0)  # fmt: skip


def test_held_out_rows_are_not_seen():
    x = rows()
    x[::3] += 0.01 * torch.randn(120, 2, dtype=torch.float64, generator=rng())
    moved = x.clone()
    moved[::3] = 0.9 * moved[::3] + 0.01  # the rows held out by the first member
    for name in ("gaussian", "gaussianized_gmm", "kde"):
        # the settings may be chosen on them, in the same way for every member; a Gaussian has none
        a, b = fit([name], x)[0], fit([name], moved)[0]
        same = torch.allclose(a.log_prob(x), b.log_prob(x))
        assert same or name != "gaussian"
    assert not torch.allclose(fit(["gaussian"], x)[1].means, fit(["gaussian"], moved)[1].means)


def test_uniform_covers_all_rows():
    x = rows()
    x[7] = 40.0
    for base in fit(["uniform"], x):
        assert base.log_prob(x).isfinite().all()
        torch.testing.assert_close(base.high, x.amax(0) + 0.05 * (x.amax(0) - x.amin(0)))


def test_uniform_covers_all_of_many_rows():
    x = rows(40_000, 1, seed=1)
    x[-1], x[-2] = -40.0, 40.0
    splits = folds(len(x), 2)
    for base in fit(["uniform"], x, splits):
        assert base.log_prob(x).isfinite().all()


def test_unfitted_sklearn_density():
    x, splits = rows(), folds(360)
    estimator = GaussianMixture(2, random_state=0)
    weight = torch.ones(360, dtype=torch.float64)
    bases = fit_bases(x, weight, splits, {"own": SklearnDensity(estimator)}, rng())
    assert not hasattr(estimator, "means_")
    for base, (train, _) in zip(bases, splits, strict=True):
        expected = GaussianMixture(2, random_state=0).fit(x[train].numpy()).score_samples(x)
        # the order of the rows is another one
        np.testing.assert_allclose(base.log_prob(x), expected, atol=0.02)


@pytest.mark.parametrize("name", ["flow", "autoregressive", "gaussianized_autoregressive"])
def test_flow(name, monkeypatch):
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(30, 100, patience_steps=300))
    monkeypatch.setattr(_candidates, "MAX_FIT_ROWS", 200)
    x, splits = rows(), folds(360)
    bases = fit([name], x, splits)
    assert len(bases) == len(splits)
    gaussian = held_out(fit(["gaussian"], x, splits), x, splits).mean()
    assert held_out(bases, x, splits).mean() > gaussian + 0.1
    base = bases[1]
    grid = torch.linspace(-9, 9, 161, dtype=torch.float64)
    total = base.log_prob(torch.cartesian_prod(grid, grid)).exp().sum() * (grid[1] - grid[0]) ** 2
    assert total.item() == pytest.approx(1.0, abs=0.02)
    assert base.sample(5, rng()).shape == (5, 2)


def test_flow_of_a_split_has_not_seen_its_held_out_rows(monkeypatch):
    """Neither has its map; they decide how long it is trained, which is fixed here."""
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(3, 1, patience_steps=300))
    x, other, split = rows(), rows(), folds(360)[:1]
    (train, held) = split[0]
    other[held] = 0.9 * x[held].flip(0)
    (one,), (two,) = fit(["flow"], x, split), fit(["flow"], other, split)
    assert torch.equal(one.log_prob(x), two.log_prob(x))
    other[train[0]] += 0.1
    (three,) = fit(["flow"], other, split)
    assert not torch.equal(one.log_prob(x), three.log_prob(x))


def funnel(n=600):
    x = torch.randn(n, 3, dtype=torch.float64, generator=rng(1))
    x[:, 1:] *= x[:, :1].exp()
    return (x - x.mean(0)) / x.std(0)


def with_a_look(x, splits):
    mixture, weight = {"gmm": CANDIDATES["gmm"]}, torch.ones(len(x), dtype=torch.float64)
    return fit_bases(x, weight, splits, mixture, rng(), flows=auto_flows(*x.shape))


def test_a_flow_joins_where_it_helps():
    x, splits = funnel(), folds(600, 2)
    mixtures, stacks = fit(["gmm"], x, splits), with_a_look(x, splits)
    for mixture, stack in zip(mixtures, stacks, strict=True):
        assert torch.equal(stack.components[0].log_prob(x), mixture.log_prob(x))
        assert isinstance(stack.components[1].base, FlowBase)
        assert torch.equal(stack.weights, stacks[0].weights)
    gain = held_out(stacks, x, splits) - held_out(mixtures, x, splits)
    assert gain.mean() > 0.1
    fresh = funnel(3000)[600:]
    assert (stacks[0].log_prob(fresh) - mixtures[0].log_prob(fresh)).mean() > 0.1


def test_no_flow_joins_where_mixtures_are_right():
    x = torch.randn(600, 3, dtype=torch.float64, generator=rng(3))
    splits = folds(600, 2)
    pairs = zip(with_a_look(x, splits), fit(["gmm"], x, splits), strict=True)
    assert all(torch.equal(one.log_prob(x), two.log_prob(x)) for one, two in pairs)


def test_flows_are_looked_at_in_several_columns_of_some_rows():
    assert auto_flows(300, 2)
    assert not auto_flows(299, 2)
    assert not auto_flows(300, 1)
    assert set(auto_flows(300, 2)) <= set(CANDIDATES)


def test_weight_of_what_is_added():
    logs = torch.randn(500, 2, dtype=torch.float64, generator=rng())
    weight = torch.rand(500, dtype=torch.float64, generator=rng(1))

    first, second = logs.numpy().T

    def loss(own):
        joint = np.logaddexp(np.log1p(-own) + first, np.log(own) + second)
        return -np.average(joint, weights=weight)

    best = optimize.minimize_scalar(loss, bounds=(1e-6, 1 - 1e-6), method="bounded")
    own, gain = added(logs[:, 0], logs[:, 1], weight)
    assert own.item() == pytest.approx(best.x, abs=1e-3)
    mean = np.average(gain, weights=weight)
    assert mean == pytest.approx(-best.fun - np.average(first, weights=weight), abs=1e-6)
    # however much better it is, the stack stays
    own, gain = added(logs[:, 0], logs[:, 0] + 9.0, weight)
    assert own.item() == MAX_ADDED_WEIGHT
    torch.testing.assert_close(gain, torch.full_like(gain, np.log(0.99 * np.exp(9.0) + 0.01)))


def test_worth_it_is_more_than_its_error():
    gain = torch.tensor([0.0, 0.2], dtype=torch.float64).repeat(50)
    weight = torch.ones(100, dtype=torch.float64)  # mean 0.1, error 0.01
    assert is_worth_it(gain, weight, n_errors=9.9)
    assert not is_worth_it(gain, weight, n_errors=10.1)
    assert not is_worth_it(0.02 * gain, weight, n_errors=2.0)
    weight[::2] = 0.0  # nothing but gains of 0.2
    assert is_worth_it(gain, weight, n_errors=1e6)


def test_weights_count(monkeypatch):
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(30, 100, patience_steps=300))
    x = rows()
    light = x[:, 0] < 0
    weight = torch.where(light, 0.05, 1.0).double()
    for name in ("gaussian", "gmm", "gaussianized_gmm", "kde", "flow"):
        q = fit([name], x, weight=weight)[0]
        p = fit([name], x)[0]
        share_q, share_p = ((b.sample(3000, rng())[:, 0] < 0).double().mean() for b in (q, p))
        assert share_q < share_p - 0.2


@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("d", [1, 4])
def test_few_rows(n, d):
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(n, d)))
    for base in fit(auto_candidates(n, d), x, folds(n)):
        assert base.log_prob(x).isfinite().all()
        assert base.sample(3, rng()).isfinite().all()


# ---------------------------------------------------------------- auto


def test_auto_candidates():
    assert set(auto_candidates(10**6, 10)) < set(auto_candidates(500, 10)) < set(CANDIDATES)
    assert "kde" in auto_candidates(500, 10)
    assert "flow" not in auto_candidates(500, 10)  # only when asked for


def test_auto_is_not_worse_than_its_best_candidate():
    x, splits = rows(), folds(360)
    names = auto_candidates(*x.shape)
    value = held_out(fit(names, x, splits), x, splits).mean()
    singles = [held_out(fit([name], x, splits), x, splits).mean() for name in names]
    # a little noise: the candidates meet other random numbers in a stack
    assert value > max(singles) - 0.02
    assert value > np.median(singles) + 0.01


def test_stack_against_its_own_components():
    x, splits = rows(), folds(360)
    bases = fit(["gaussian", "gmm", "gaussianized_kde", "uniform"], x, splits)
    assert all(isinstance(base, StackedBase) for base in bases)
    assert all(torch.equal(base.weights, bases[0].weights) for base in bases)
    value = held_out(bases, x, splits).mean()
    for j in range(bases[0].n_components):
        assert value >= held_out([b.components[j] for b in bases], x, splits).mean() - 1e-6


def test_progress_and_order():
    said = []
    names = {name: CANDIDATES[name] for name in ("uniform", "gaussian")}
    fit_bases(rows(60), torch.ones(60).double(), folds(60), names, rng(), said.append)
    assert said == ["uniform", "gaussian"]


def test_bit_identical_with_one_seed():
    x = rows(200)
    names = auto_candidates(*x.shape)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = fit(names, x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    for a, b in zip(first, fit(names, x, seed=3), strict=True):
        assert torch.equal(a.log_prob(x), b.log_prob(x))
        assert torch.equal(a.sample(50, rng()), b.sample(50, rng()))
        copy = pickle.loads(pickle.dumps(a))
        assert torch.equal(copy.log_prob(x), a.log_prob(x))
    others = fit(names, x, seed=4)
    assert not torch.equal(first[0].log_prob(x), others[0].log_prob(x))


def test_large_data_is_fitted_on_a_subsample(monkeypatch):
    from skebm.bases import _candidates

    monkeypatch.setattr(_candidates, "MAX_FIT_ROWS", 50)
    x = rows(300)
    base = fit(["kde"], x, folds(300)[:1])[0]
    assert len(base.centers) == 50
    train = x[folds(300)[0][0]]
    assert (torch.cdist(base.centers, train).amin(1) < 1e-6).all()  # of its own split
    assert (torch.cdist(base.centers, train[:50]).amin(1) > 1e-6).any()  # not the first rows
    assert not torch.equal(fit(["kde"], x, folds(300)[:1], seed=1)[0].centers, base.centers)


# ---------------------------------------------------------------- stacking weights


def stacking_problem(n=400, k=4, seed=0):
    rng = np.random.default_rng(seed)
    log_prob = torch.as_tensor(-1.0 + rng.normal(size=(n, k)) * [0.5, 1.0, 1.5, 2.0][:k])
    return log_prob, torch.as_tensor(rng.uniform(0.2, 2.0, n))


def likelihood(log_prob, weight, w):
    return (weight @ (log_prob + w.log()).logsumexp(1) / weight.sum()).item()


@pytest.mark.parametrize("seed", range(4))
def test_stacking_weights_against_scipy(seed):
    log_prob, weight = stacking_problem(seed=seed)
    weights = stacking_weights(log_prob, weight)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights >= 0).all()
    density, share = log_prob.exp().numpy(), (weight / weight.sum()).numpy()
    found = optimize.minimize(
        lambda w: -share @ np.log(density @ w),
        np.full(4, 0.25),
        jac=lambda w: -(share / (density @ w)) @ density,
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert likelihood(log_prob, weight, weights) == pytest.approx(-found.fun, abs=1e-5)
    np.testing.assert_allclose(weights, found.x, atol=0.01)
    assert likelihood(log_prob, weight, torch.full((4,), 0.25).double()) < -found.fun - 1e-3


def test_sample_weight_of_the_stack_is_repetition():
    log_prob, _ = stacking_problem()
    times = torch.as_tensor(np.random.default_rng(1).integers(1, 4, len(log_prob)))
    repeated = log_prob.repeat_interleave(times, 0)
    torch.testing.assert_close(
        stacking_weights(log_prob, times.double()),
        stacking_weights(repeated, torch.ones(len(repeated), dtype=torch.float64)),
    )


def test_a_useless_law_is_dropped():
    log_prob, weight = stacking_problem()
    log_prob[:, 2] = log_prob.amin() - 5.0
    weights = stacking_weights(log_prob, weight)
    assert weights[2] == 0
    assert weights.sum().item() == pytest.approx(1.0)


def test_a_single_law():
    log_prob, weight = stacking_problem(k=1)
    assert stacking_weights(log_prob, weight).tolist() == [1.0]


def test_minus_infinity_is_a_law_that_does_not_cover_a_row():
    log_prob, weight = stacking_problem(k=2)
    log_prob[5, 0] = -torch.inf
    weights = stacking_weights(log_prob, weight)
    assert weights.isfinite().all()
    assert weights[1] > 0


def test_stack_is_not_below_a_law_that_alone_covers_one_row():
    # A is better everywhere but at one row in 3,000, which B covers: B then earns less than the
    # weight at which laws are dropped, but all of the likelihood of that row
    log_prob = torch.stack([torch.zeros(3000), torch.full((3000,), -1.0)], dim=1).double()
    log_prob[17, 0] = -6000.0
    weight = torch.ones(3000, dtype=torch.float64)
    value = likelihood(log_prob, weight, stacking_weights(log_prob, weight))
    assert value >= max((weight @ log_prob / weight.sum()).tolist())


def test_one_law_for_all_members_is_taken_as_it_is():
    law = GaussianMixtureBase([1.0], [[0.0]], [[[1.0]]])

    class Fixed:
        def fit_splits(self, rows, splits, rng):
            return [law] * len(splits)

    x = rows(30, 1)
    bases = fit_bases(x, torch.ones(30).double(), folds(30), {"fixed": Fixed()}, rng())
    assert all(base is law for base in bases)


def test_settings_are_chosen_once_and_serve_all_splits():
    law, chosen, fitted = GaussianMixtureBase([1.0], [[0.0]], [[[1.0]]]), [], []

    class Spy(_candidates.BaseCandidate):
        def choose(self, rows, held, rng):
            chosen.append((len(rows.x), len(held.x)))
            return "settings"

        def fit(self, rows, settings, rng):
            fitted.append((len(rows.x), settings))
            return law

    x = rows(30, 1)
    fit_bases(x, torch.ones(30).double(), folds(30), {"spy": Spy()}, rng())
    assert chosen == [(20, 10)]
    assert fitted == [(20, "settings")] * 3
