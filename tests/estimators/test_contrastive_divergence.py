"""ContrastiveDivergenceEBM: what the chains do, what is learned from them, and what is kept."""

import copy
import math
import pickle
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from skorch.callbacks import Callback
from torch import nn

from skebm import ContrastiveDivergenceEBM, Network
from skebm.datasets import TwoMoons
from skebm.estimators import contrastive_divergence
from skebm.estimators._tilted import TiltedDensity
from skebm.training import chains
from skebm.training.chains import SAMPLERS

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)

NETWORK = {"hidden_layer_sizes": (16,), "learning_rate": 0.03, "max_epochs": 30, "batch_size": 125,
           "patience": 1000}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of log Z")

DIAGNOSED_MOVES = chains.DIAGNOSED_MOVES


@pytest.fixture(autouse=True, scope="module")
def short_diagnostics():
    """Fewer moves behind R-hat, which take as long as a training here; but all on the moons."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "DIAGNOSED_MOVES", 30)
        yield


def density(**options):
    """A quick estimator; settings of its network may be given among its parameters."""
    names = options.keys() & Network().get_params()
    settings = NETWORK | {name: options.pop(name) for name in names}
    if "module" in settings:  # has layers of its own
        del settings["hidden_layer_sizes"]
    quick = {"base": "gaussian", "n_members": 2, "n_steps": 2, "random_state": 0}
    return ContrastiveDivergenceEBM(**quick | {"energy_model": Network(**settings)} | options)


@cache
def moons():
    return TwoMoons().sample(500, random_state=0)


@cache
def new_moons():
    return TwoMoons().sample(4000, random_state=1)


def fitted_to_moons(sampler="mala", persistent=True):
    return fitted_to_moons_once(sampler, persistent)


@cache  # by position: it would take arguments by name, or left out, for others
def fitted_to_moons_once(sampler, persistent):
    # steps of "ula" are small: it needs more of them, and longer to find their size
    particular = {"n_steps": 3}
    if sampler == "ula":
        particular = {"n_steps": 5, "batch_size": 64, "learning_rate": 0.02}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "DIAGNOSED_MOVES", DIAGNOSED_MOVES)
        return density(sampler=sampler, persistent=persistent, **particular).fit(moons())


HUMPS = [stats.norm(-2.0, 0.5), stats.norm(1.0, 0.8)]


def humps(n, seed):
    rng = np.random.default_rng(seed)
    draws = [part.rvs(n, random_state=rng) for part in HUMPS]
    return np.where(rng.random(n) < 0.5, *draws)[:, None]


def fitted_to_humps(sampler="mala"):
    return fitted_to_humps_once(sampler)


@cache
def fitted_to_humps_once(sampler):
    return density(sampler=sampler).fit(humps(500, 0))


def line(low=-14.0, high=14.0, n=8001):
    """Cell centres as a column, and the length of a cell."""
    t = np.linspace(low, high, n)
    return t[:, None], t[1] - t[0]


def p_value(estimator, rows):
    """Of rows of one column against the distribution function of the estimator."""
    t, dt = line()
    mass = np.exp(estimator.score_samples(t)) * dt
    cdf = (np.cumsum(mass) - 0.5 * mass) / mass.sum()
    return stats.kstest(np.interp(rows[:, 0], t[:, 0], cdf), "uniform").pvalue


# ---------------------------------------------------------------------- a density


@pytest.mark.parametrize("persistent", [True, False])
@every_sampler
def test_every_sampler_improves_on_the_base(sampler, persistent):
    estimator = fitted_to_moons(sampler, persistent)
    assert estimator.n_iter_ > 0
    scores = estimator.score_samples(new_moons())
    assert (scores - estimator.base_score_samples(new_moons())).mean() > 0.5
    # Kullback-Leibler divergence of the truth from it; that of the base is .9 nats
    assert (TwoMoons().log_density(new_moons()) - scores).mean() < 0.35


@every_sampler
def test_divergence_from_the_truth_in_one_column(sampler):
    t, dt = line()
    truth = np.mean([part.pdf(t[:, 0]) for part in HUMPS], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.log(truth) - fitted_to_humps(sampler).score_samples(t)
        of_base = np.log(truth) - fitted_to_humps(sampler).base_score_samples(t)
    inside = truth > 0
    assert (truth * of_base)[inside].sum() * dt > 0.2
    assert 0.0 <= (truth * gap)[inside].sum() * dt < 0.03


# ---------------------------------------------------------------------- weights of modes


def far_apart(weights, d):
    """A fitted mixture of two normal distributions.

    Chains go from one to the other in one column only: in coordinates that are Gaussianised column
    by column there is no gap in one column, and a small one in two.
    """
    mixture = GaussianMixture(2, random_state=0)
    mixture.weights_, mixture.means_ = np.array(weights), np.array([[-4.0] * d, [5.0] * d])
    mixture.covariances_ = mixture.precisions_cholesky_ = np.stack([np.eye(d)] * 2)
    mixture.n_features_in_ = d
    return mixture


@cache
def far_rows(d):
    rng = np.random.default_rng(0)
    means = np.repeat([-4.0, 5.0], [800, 200])[:, None]
    return rng.permutation(rng.normal(means, 1.0, (1000, d)))


def fit_to_modes(weights=(0.5, 0.5), d=4, **options):
    options = {"base": far_apart(weights, d), "learning_rate": 0.01, "max_epochs": 15} | options
    return density(**options).fit(far_rows(d))


def left_mass(estimator):
    d = estimator.n_features_in_
    even = far_apart((0.5, 0.5), d)
    x = even.sample(10_000)[0]
    mass = np.exp(estimator.score_samples(x) - even.score_samples(x))
    return mass[x[:, 0] < 0.5].sum() / mass.sum()


def rise(estimator):
    """Held-out gain over the base while f was trained; the weights are worth .19 nats."""
    level = estimator.history_["held_out_log_likelihood"]
    return np.nanmax(level) - level[0]


def test_divergence_from_the_rows_is_blind_to_weights_and_recalibration_is_not():
    blind = fit_to_modes(persistent=False, recalibration=False)
    assert rise(blind) < 0.05
    assert abs(left_mass(blind) - 0.8) > 0.2
    mended = fit_to_modes(persistent=False)
    assert left_mass(mended) == pytest.approx(0.8, abs=0.03)


def test_right_weights_stay():
    for persistent in (True, False):
        estimator = fit_to_modes((0.8, 0.2), persistent=persistent)
        assert left_mass(estimator) == pytest.approx(0.8, abs=0.03)


def test_restarts_get_weights_right_without_recalibration():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        warnings.filterwarnings("ignore", "training ended at its limit")  # which is short
        estimator = fit_to_modes(recalibration=False, max_epochs=30)
    assert estimator.n_iter_ > 0
    assert estimator.chain_diagnostics_["r_hat"] < 1.1
    assert rise(estimator) > 0.1
    assert left_mass(estimator) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("reinit_fraction", [0.0, 0.001])
def test_chains_that_do_not_mix_are_told(reinit_fraction):
    # rare restarts do not mix either: R-hat is that of chains as in training
    with pytest.warns(ConvergenceWarning, match=r"do not mix \(split R-hat") as seen:
        estimator = fit_to_modes(reinit_fraction=reinit_fraction, max_epochs=3)
    assert seen[0].filename == __file__
    assert estimator.chain_diagnostics_["r_hat"] > 1.2
    # all the same some are proposed
    rate = estimator.chain_diagnostics_["restart_acceptance_rate"]
    assert math.isnan(rate) if reinit_fraction == 0 else 0.0 <= rate <= 1.0


# ---------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("persistent", [True, False])
@every_sampler
def test_diagnostics_of_training(sampler, persistent):
    diagnostics = fitted_to_moons(sampler, persistent).chain_diagnostics_
    assert set(diagnostics) == {
        "step_size", "acceptance_rate", "move_acceptance_rate", "restart_acceptance_rate", "r_hat"
    }  # fmt: skip
    assert diagnostics["step_size"].shape == diagnostics["acceptance_rate"].shape == (2,)
    # "auto" follows the acceptance that the sampler aims at while f changes
    target = SAMPLERS[sampler].TARGET_ACCEPTANCE
    assert diagnostics["acceptance_rate"].tolist() == pytest.approx([target] * 2, abs=0.05)
    assert diagnostics["step_size"][0] != diagnostics["step_size"][1]
    # the stand-in of a normal base is hardly worse than the base
    assert 0.85 < diagnostics["move_acceptance_rate"] <= 1.0
    if persistent:
        assert 0.1 < diagnostics["restart_acceptance_rate"] < 0.9
        assert 0.99 < diagnostics["r_hat"] < 1.2
    else:
        assert math.isnan(diagnostics["restart_acceptance_rate"])
        assert math.isnan(diagnostics["r_hat"])


def test_persistent_chains_are_rows_in_the_units_of_X():
    rows = np.insert(moons() * [100.0, 0.01] + [3e4, -7.0], 1, 5.0, axis=1)
    estimator = density(max_epochs=20).fit(rows)
    chains = estimator.persistent_chains_
    assert chains.shape == (2, 512, 3)
    assert chains.dtype == np.float64
    assert (chains[..., 1] == 5.0).all()
    for column in (0, 2):
        low, high = np.quantile(rows[:, column], [0.0, 1.0])
        inside = (chains[..., column] > low - 0.1 * (high - low)) & (
            chains[..., column] < high + 0.1 * (high - low)
        )
        assert inside.mean() > 0.95
        assert chains[..., column].std() == pytest.approx(rows[:, column].std(), rel=0.25)
        # of a chain for each of them, not of one
        assert len(np.unique(chains[0, :, column])) > 240
    assert not np.array_equal(chains[0], chains[1])


def test_persistent_chains_have_learned_what_the_model_has():
    # much better than draws of the base
    estimator = fitted_to_moons()
    chains = estimator.persistent_chains_.reshape(-1, 2)
    expected = estimator.score_samples(estimator.sample(2000, random_state=0)).mean()
    # of f as it was in the last step, which is not the average that is kept
    assert estimator.score(chains) == pytest.approx(expected, abs=0.5)
    base = density(energy_model=None).fit(moons()).sample(2000, random_state=0)
    assert estimator.score(base) < expected - 1.0


def test_attributes_of_chains_are_there_only_where_there_are_chains():
    X, alone = moons()[:100], density(energy_model=None).fit(moons()[:100])
    estimator = density(max_epochs=1).fit(X)
    assert hasattr(estimator, "persistent_chains_")
    estimator.sample(2)
    assert estimator.sample_diagnostics_ != {}
    estimator.set_params(persistent=False).fit(X)
    assert not hasattr(estimator, "persistent_chains_")
    assert estimator.sample_diagnostics_ == {}
    assert math.isnan(estimator.chain_diagnostics_["r_hat"])
    estimator.set_params(persistent=True, energy_model=None).fit(X)
    assert not hasattr(estimator, "persistent_chains_")
    assert not hasattr(estimator, "chain_diagnostics_")
    assert set(vars(estimator)) == set(vars(alone))


def test_pickles_are_small_and_whole():
    estimator = fitted_to_humps()
    assert not any("_chains" in name for name in vars(estimator) if name != "persistent_chains_")
    data = pickle.dumps(estimator)
    assert len(data) < 200_000
    other = pickle.loads(data)
    t, _ = line(n=50)
    np.testing.assert_array_equal(other.score_samples(t), estimator.score_samples(t))
    for start in ("base", "buffer"):
        np.testing.assert_array_equal(
            other.sample(20, random_state=0, start=start),
            estimator.sample(20, random_state=0, start=start),
        )


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("start", ["base", "buffer"])
@every_sampler
def test_samples_follow_the_model(sampler, start):
    estimator = fitted_to_humps(sampler)
    n_steps = {"base": 4, "buffer": 60}[start]
    for seed in range(2):
        rows = estimator.sample(1500, random_state=seed, n_steps=n_steps, start=start)
        assert p_value(estimator, rows) > 1e-4


def without_restarts(fitted):
    """Copy of a fitted estimator whose chains in `sample` take steps and nothing else."""
    estimator = copy.deepcopy(fitted)
    estimator._fitted_moves = replace(estimator._fitted_moves, reinit_fraction=0.0)
    return estimator


@every_sampler
def test_chains_alone_leave_the_model_as_it_is(sampler):
    # no restarts, and steps so long that "ula" without its correction would be far off
    estimator = without_restarts(fitted_to_humps(sampler))
    if sampler in ("mala", "ula"):
        estimator.chain_diagnostics_["step_size"] = np.array([1.0, 1.0])
    for seed in range(2):
        rows = estimator.sample(1500, random_state=seed, n_steps=12)
        assert p_value(estimator, rows) > 1e-4
    assert math.isnan(estimator.sample_diagnostics_["restart_acceptance_rate"])


@pytest.mark.parametrize("base", ["wrong weights", None])
def test_samples_with_weights_of_modes_and_with_other_proposals(base):
    options = {"base": None, "n_steps": 5}
    if base is not None:
        options = {"base": far_apart((0.5, 0.5), 1), "max_epochs": 3, "persistent": False}
    estimator = density(**options).fit(far_rows(1)[:500])
    assert (len(estimator.model_.mode_weights) > 0) or base is None
    starts = {"base": 4} if base else {"base": 4, "buffer": 80}
    for start, n_steps in starts.items():
        rows = estimator.sample(1000, random_state=0, n_steps=n_steps, start=start)
        assert p_value(estimator, rows) > 1e-4
        # chains from the rows never jump
        rate = estimator.sample_diagnostics_["restart_acceptance_rate"]
        assert math.isnan(rate) != estimator.persistent


def test_no_steps_are_draws_of_the_base_by_importance():
    estimator = fitted_to_humps()
    rows = estimator.sample(3000, random_state=0, n_steps=0)
    assert estimator.sample_diagnostics_ == {"start": "base", "n_steps": 0}
    assert p_value(estimator, rows) > 1e-4
    np.testing.assert_array_equal(
        rows, TiltedDensity.sample(estimator, 3000, random_state=0, n_steps=0)
    )
    # from the buffer they are the chains themselves
    rows = estimator.sample(50, random_state=0, n_steps=0, start="buffer")
    distance = np.abs(rows - estimator.persistent_chains_.reshape(1, -1)).min(axis=1)
    assert distance.max() < 1e-9


def test_diagnostics_of_sampling():
    estimator = fitted_to_moons()
    estimator.sample(500, random_state=0)
    diagnostics = estimator.sample_diagnostics_
    assert (diagnostics["start"], diagnostics["n_steps"]) == ("base", 3)
    assert set(diagnostics) == {
        "start", "n_steps", "step_size", "acceptance_rate", "move_acceptance_rate",
        "restart_acceptance_rate", "log_density_change", "log_density_change_std_error",
    }  # fmt: skip
    np.testing.assert_allclose(
        diagnostics["step_size"], estimator.chain_diagnostics_["step_size"], rtol=1e-6
    )
    expected = estimator.chain_diagnostics_["acceptance_rate"]
    np.testing.assert_allclose(diagnostics["acceptance_rate"], expected, atol=0.1)
    for name in ("move", "restart"):
        rate = f"{name}_acceptance_rate"
        assert diagnostics[rate] == pytest.approx(estimator.chain_diagnostics_[rate], abs=0.15)
    estimator.sample(500, random_state=0, n_steps=7, start="buffer")
    assert estimator.sample_diagnostics_["n_steps"] == 7
    assert estimator.sample_diagnostics_["start"] == "buffer"


def test_chains_that_are_there_do_not_climb():
    # of small samples too, where members get different numbers of rows
    estimator, changes = fitted_to_moons(), []
    for seed in range(40):
        estimator.sample(30, random_state=seed)
        changes.append(estimator.sample_diagnostics_["log_density_change"])
    assert abs(np.mean(changes)) < 3.0 * np.std(changes) / math.sqrt(40)
    errors = estimator.sample_diagnostics_["log_density_change_std_error"]
    assert errors == pytest.approx(np.std(changes), rel=0.5)


def test_chains_that_are_not_there_yet_climb():
    estimator = without_restarts(fitted_to_moons())
    spread = 3.0 * estimator.persistent_chains_
    estimator.persistent_chains_ = spread
    estimator.sample(300, random_state=0, n_steps=10, start="buffer")
    diagnostics = estimator.sample_diagnostics_
    change, error = (diagnostics[f"log_density_change{s}"] for s in ("", "_std_error"))
    assert change > 5.0 * error > 0.0
    assert math.isnan(diagnostics["restart_acceptance_rate"])


def test_one_row_of_one_member():
    estimator = density(n_members=1, max_epochs=10).fit(moons())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimator.sample(random_state=0).shape == (1, 2)
    assert math.isnan(estimator.sample_diagnostics_["log_density_change_std_error"])


@pytest.mark.parametrize("size", [1, 100])
def test_many_chains_go_in_blocks(monkeypatch, size):
    estimator = fitted_to_humps()
    n = 20 if size == 1 else 1000
    monkeypatch.setattr(contrastive_divergence, "SAMPLED_CHAINS", size)
    rows = estimator.sample(n, random_state=0)
    assert rows.shape == (n, 1)
    assert p_value(estimator, rows) > 1e-4


def test_start_is_refused_by_name():
    estimator = fitted_to_moons(persistent=False)
    with pytest.raises(ValueError, match="start='data' must be 'base' or 'buffer'"):
        estimator.sample(3, start="data")
    with pytest.raises(ValueError, match='start="buffer" needs persistent chains'):
        estimator.sample(3, start="buffer")
    with pytest.raises(ValueError, match="n_steps=2.0 must be an integer"):
        estimator.sample(3, n_steps=2.0)


def test_samples_where_no_chains_were_trained():
    estimator = density(energy_model=None).fit(moons())
    assert estimator.sample(20, random_state=0).shape == (20, 2)
    assert estimator.sample_diagnostics_ == {"start": "base", "n_steps": 0}
    assert estimator.sample(20, random_state=0, n_steps=2).shape == (20, 2)


# ---------------------------------------------------------------------- parameters


def test_step_size_given_is_kept():
    for sampler in ("mala", "random_walk"):
        options = {"step_size": 0.37, "sampler": sampler, "persistent": False, "max_epochs": 2}
        estimator = density(**options).fit(moons()[:100])
        np.testing.assert_allclose(estimator.chain_diagnostics_["step_size"], 0.37, rtol=1e-6)


@every_sampler
def test_absurd_steps_are_told(sampler):
    options = {"step_size": 50.0, "sampler": sampler, "persistent": False, "max_epochs": 1}
    with pytest.warns(ConvergenceWarning, match=r"accept 0% of .*Lower step_size") as seen:
        density(**options).fit(moons()[:100])
    assert seen[0].filename == __file__


def test_where_steps_adapt_it_is_the_learning_rate_that_is_too_large(monkeypatch):
    monkeypatch.setattr(contrastive_divergence, "MIN_ACCEPTANCE", 0.9)
    with pytest.warns(ConvergenceWarning, match=r"hardly move\. Lower the learning rate\."):
        density(max_epochs=1).fit(moons()[:100])


def test_chains_that_cannot_move_at_all_are_told():
    with pytest.warns(ConvergenceWarning) as seen:
        estimator = density(step_size=50.0, reinit_fraction=0.0, max_epochs=2).fit(moons())
    messages = " ".join(str(w.message) for w in seen)
    assert "accept 0%" in messages
    assert "do not mix" in messages
    assert estimator.chain_diagnostics_["r_hat"] > 1.2


class Residual(nn.Module):
    """A user's module with a kink and dropout."""

    seen = set()

    def __init__(self, n_features):
        super().__init__()
        self.first, self.last = nn.Linear(n_features, 32), nn.Linear(32, 1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, z):
        Residual.seen.add((self.training, torch.is_grad_enabled()))
        return self.last(self.dropout(torch.relu(self.first(z)))).squeeze(-1)


def test_module_of_a_user():
    Residual.seen.clear()
    module = Residual(2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.get_rng_state()
    estimator = density(module=module, max_epochs=60, sampler="random_walk").fit(moons())
    assert torch.equal(torch.get_rng_state(), state)
    assert estimator.score(new_moons()) > estimator.base_score_samples(new_moons()).mean() + 0.2
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    # dropout is for the loss: chains follow f itself
    assert (True, True) in Residual.seen
    assert (False, False) in Residual.seen
    assert (True, False) not in Residual.seen


@pytest.mark.parametrize("batch_size", [16, 400])
def test_batches_below_and_above_the_number_of_chains(batch_size):
    rows = new_moons()[:900] if batch_size > 256 else moons()[:100]
    estimator = density(batch_size=batch_size, max_epochs=1).fit(rows)
    assert estimator.persistent_chains_.shape == (2, 512, 2)


@pytest.mark.parametrize("persistent", [True, False])
def test_base_with_bounds(persistent):
    X = np.random.default_rng(0).beta(2.0, 5.0, size=(400, 1))
    estimator = density(base="uniform", persistent=persistent, max_epochs=20).fit(X)
    new = np.random.default_rng(1).beta(2.0, 5.0, size=(2000, 1))
    assert estimator.n_iter_ > 0
    inside = np.isfinite(estimator.base_score_samples(new))
    assert stats.beta(2, 5).logpdf(new[inside, 0]).mean() - estimator.score(new[inside]) < 0.05
    for start in ("base", "buffer") if persistent else ("base",):
        rows = estimator.sample(500, random_state=0, n_steps=20, start=start)
        assert np.isfinite(estimator.score_samples(rows)).all()


def test_ties_with_chains_from_the_rows():
    X = np.random.default_rng(0).poisson(6.0, size=(400, 2)).astype(float)
    estimator = density(persistent=False, max_epochs=20).fit(X)
    new = np.random.default_rng(1).poisson(6.0, size=(2000, 2)).astype(float)
    assert estimator.score(new) == pytest.approx(
        stats.poisson(6.0).logpmf(new).sum(axis=1).mean(), abs=0.15
    )


@pytest.mark.parametrize("persistent", [True, False])
def test_more_columns_than_rows_are_good_for(persistent):
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(100, 60)), rng.normal(size=(500, 60))
    estimator = density(persistent=persistent, max_epochs=2).fit(X)
    assert estimator.score(new) > estimator.base_score_samples(new).mean() - 0.5
    assert np.isfinite(estimator.sample(20, random_state=0)).all()


# ---------------------------------------------------------------------- warm start, interruption


def test_warm_start_goes_on_with_net_and_chains():
    estimator = density(warm_start=True, max_epochs=20).fit(moons())
    chains, score = estimator.persistent_chains_, estimator.score(new_moons())
    reached = np.nanmax(estimator.history_["held_out_log_likelihood"])
    # so short a training that nothing moves far
    estimator.set_params(
        energy_model__learning_rate=1e-9, energy_model__max_epochs=1, step_size=1e-4,
        reinit_fraction=0.0, sampler="random_walk",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(moons())
    np.testing.assert_allclose(estimator.persistent_chains_, chains, atol=0.02)
    assert estimator.history_["held_out_log_likelihood"][0] == pytest.approx(reached, abs=0.05)
    assert estimator.score(new_moons()) == pytest.approx(score, abs=0.1)


class Stop(Callback):
    def __init__(self, error):
        self.error, self.n = error, 0

    def on_batch_end(self, net, **kwargs):
        self.n += 1
        if self.n == 3:
            raise self.error("now")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_training_leaves_the_estimator_as_it_was(error):
    estimator = copy.deepcopy(fitted_to_moons())
    estimator.set_params(energy_model__callbacks=[Stop(error)])
    state = dict(vars(estimator))
    with pytest.raises(error, match="now"):
        estimator.fit(moons()[:300])
    assert vars(estimator) == state


def test_chains_are_reproducible():
    def everything(**options):
        estimator = density(max_epochs=1, **options).fit(moons()[:100])
        return [estimator.persistent_chains_.ravel(), estimator.sample(50, random_state=0).ravel(),
                estimator.sample(50, random_state=0, start="buffer").ravel()]  # fmt: skip

    first, again, other = everything(), everything(), everything(random_state=1)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("persistent", [True, False])
@every_sampler
def test_on_a_gpu(sampler, persistent):
    estimator = density(sampler=sampler, persistent=persistent, device="cuda").fit(moons())
    assert estimator.score(new_moons()) > estimator.base_score_samples(new_moons()).mean() + 0.3
    for start in ("base", "buffer") if persistent else ("base",):
        rows = estimator.sample(100, random_state=0, start=start)
        assert np.isfinite(estimator.score_samples(rows)).all()
    assert pickle.loads(pickle.dumps(estimator)).sample(3).shape == (3, 2)
