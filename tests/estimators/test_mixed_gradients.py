"""Mixed tables by methods that learn from gradients: score matching, contrastive divergence."""

import copy
from itertools import product

import numpy as np
import pytest
import torch

from skebm import ContrastiveDivergenceEBM, Network, ScoreMatchingEBM
from skebm.datasets import LatentClasses

pd = pytest.importorskip("pandas")

NETWORK = Network(hidden_layer_sizes=(32,), learning_rate=3e-3, max_epochs=20, batch_size=128)
QUICK = {"base": "gaussian", "n_members": 2, "energy_model": NETWORK, "random_state": 0}
ESTIMATORS = {
    "score matching": ScoreMatchingEBM(**QUICK),
    "persistent": ContrastiveDivergenceEBM(**QUICK),
    "from the rows": ContrastiveDivergenceEBM(**QUICK, persistent=False, sampler="hmc"),
}
COLUMNS = ["colour", "member", "height"]
PATTERNS = list(product(["blue", "green", "red", None], [False, True]))
HEIGHTS = np.linspace(110.0, 230.0, 1_201)


def rows(n, seed=0):
    """A colour that may be missing, a membership, and a height that differs with both."""
    return LatentClasses().sample(n, random_state=seed)[COLUMNS]


def masses(log_density):
    """Of every pattern of states, the height integrated out."""
    total = {}
    for colour, member in PATTERNS:
        colours = pd.Categorical([colour] * len(HEIGHTS), ["blue", "green", "red"])
        grid = pd.DataFrame({"colour": colours, "member": member, "height": HEIGHTS})
        total[colour, member] = np.exp(log_density(grid)).sum() * (HEIGHTS[1] - HEIGHTS[0])
    return np.array(list(total.values()))


@pytest.fixture(scope="module")
def score_matching():
    return ESTIMATORS["score matching"].fit(rows(1_500))


@pytest.fixture(scope="module", params=ESTIMATORS)
def fitted(request):
    if request.param == "score matching":
        return request.getfixturevalue("score_matching")
    return ESTIMATORS[request.param].fit(rows(1_500))


def test_the_tilt_is_kept_and_its_gain_is_honest(fitted):
    assert fitted.accepted_ == "tilt"
    new = rows(6_000, seed=1)
    gain = fitted.score_samples(new) - fitted.base_score_samples(new)
    error = np.hypot(fitted.held_out_gain_std_error_, gain.std() / len(gain) ** 0.5)
    assert gain.mean() > 0.1
    # two members average, and so are better than the one that is held out
    assert fitted.held_out_gain_ - 3 * error < gain.mean() < fitted.held_out_gain_ + 0.1


def test_masses_sum_to_one(fitted):
    # each column keeps a little for what it has not shown
    met = (1_500 + 4) / (1_500 + 5) * (1_500 + 2) / (1_500 + 3)
    error = fitted.log_partition_std_error_.max()
    assert masses(fitted.score_samples).sum() == pytest.approx(met, abs=3 * error)


def test_draws_have_the_masses_of_the_density(fitted):
    drawn = fitted.sample(8_000, random_state=0)
    shares = drawn.groupby([drawn["colour"].astype(object).fillna("none"), "member"]).size()
    known = masses(fitted.score_samples)
    names = [(colour or "none", member) for colour, member in PATTERNS]
    np.testing.assert_allclose([shares[name] / 8_000 for name in names], known, atol=0.02)


def test_masses_of_base_and_energy_are_those_of_the_base(score_matching):
    plain = copy.deepcopy(score_matching)
    plain.model_.calibrate(1.0, torch.zeros(0, dtype=torch.float64), None)
    plain.model_.log_partition.zero_()
    found, known = masses(plain.score_samples), masses(plain.base_score_samples)
    np.testing.assert_allclose(found, known, rtol=2e-3)


def test_nothing_is_learned_of_states_alone():
    estimator = ScoreMatchingEBM(**QUICK).fit(rows(300)[["colour", "member"]])
    assert estimator.accepted_ == "base"
    assert not hasattr(estimator, "method_")


def test_chains_move_states_alone():
    """Two columns that depend on each other, from a base in which they do not."""
    estimator = ContrastiveDivergenceEBM(**QUICK).fit(rows(1_000)[["colour", "member"]])
    assert estimator.accepted_ == "tilt"
    table = pd.DataFrame(PATTERNS, columns=["colour", "member"])
    table["colour"] = pd.Categorical(table["colour"], ["blue", "green", "red"])
    found, known = np.exp(estimator.score_samples(table)), LatentClasses()
    np.testing.assert_allclose(found, np.exp(known.log_marginal(table)), atol=0.03)
    drawn = estimator.sample(4_000, random_state=0)
    np.testing.assert_allclose(
        drawn["member"].mean(), found[table["member"]].sum() / found.sum(), atol=0.03
    )


def test_chains_start_where_they_were():
    estimator = ContrastiveDivergenceEBM(**QUICK).fit(rows(600))
    drawn = estimator.sample(500, random_state=0, start="buffer", complete=True)
    assert drawn.notna().all(axis=None)
    assert drawn.dtypes.equals(rows(2).dtypes)
