"""Questions about some cells: conditionals, marginals, masses of categories, explanations."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from skebm import UNKNOWN, ImplicitVAE, NCEDensity, Network
from skebm.datasets import make_two_moons

pd = pytest.importorskip("pandas")

CORRELATION = np.array([[1.0, 0.7, 0.2], [0.7, 1.0, 0.1], [0.2, 0.1, 1.0]])
SCALE = np.array([1.0, 2.0, 3.0])
MEAN = np.array([0.0, 1.0, 2.0])


def gaussian_rows(n=1500, seed=0):
    rng = np.random.default_rng(seed)
    return MEAN + rng.multivariate_normal(np.zeros(3), CORRELATION, n) * SCALE


@pytest.fixture(scope="module")
def gaussian():
    return NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(gaussian_rows())


@pytest.fixture(scope="module")
def moons():
    """A density with a tilt, whose base is a bad one."""
    X = make_two_moons(n_samples=500, random_state=0)
    network = Network(hidden_layer_sizes=(32,), max_epochs=60)
    est = NCEDensity(base="gaussian", energy_model=network, n_members=2, random_state=0).fit(X)
    assert not est.model_.is_untilted
    return est, X


def table(n=400, seed=0):
    rng = np.random.default_rng(seed)
    region = rng.choice(["east", "west", "south"], n, p=[0.5, 0.3, 0.2])
    age = rng.normal(40.0, 10.0, n).round()
    income = np.where(rng.random(n) < 0.3, 0.0, rng.normal(30.0 + 10.0 * (region == "west"), 4.0))
    frame = pd.DataFrame({"region": region, "age": age.astype(int), "income": income})
    frame.loc[rng.random(n) < 0.1, "income"] = np.nan
    frame["unit"] = 1
    return frame


@pytest.fixture(scope="module")
def mixed():
    return NCEDensity(base="gmm", energy_model=None, random_state=0).fit(table())


# ---------------------------------------------------------------------- conditionals


def test_conditional_moments_of_a_gaussian(gaussian):
    covariance = CORRELATION * np.outer(SCALE, SCALE)
    slope = covariance[1:, 0] / covariance[0, 0]
    given = gaussian.condition({0: [1.0, -2.0]})
    assert given.columns == [1, 2]
    for j, place in ((1, 0), (2, 1)):
        wanted = MEAN[j] + slope[place] * np.array([1.0, -2.0])
        spread = math.sqrt(covariance[j, j] - slope[place] * covariance[0, j])
        np.testing.assert_allclose(given.mean(j), wanted, atol=0.12 * spread)
        np.testing.assert_allclose(given.std(j), spread, rtol=0.06)
        quantiles = given.quantile(j, [0.1, 0.5, 0.9])
        wanted = wanted[:, None] + spread * np.array([-1.2816, 0.0, 1.2816])
        np.testing.assert_allclose(quantiles, wanted, atol=0.15 * spread)
        share = given.probability(j, given.quantile(j, 0.25)[0], np.inf)[0]
        assert share == pytest.approx(0.75, abs=0.01)


def test_a_single_open_number_is_exact(gaussian):
    """The Gaussian that was fitted says what its conditional is."""
    base = gaussian.model_.bases
    X = np.array([[0.5, 2.0, 1.0], [-1.0, 0.0, 4.0]])
    given = gaussian.condition({0: X[:, 0], 1: X[:, 1]})
    means, variances = [], []
    scale, center = gaussian._columns.scale, gaussian._columns.center
    z = (X - center) / scale
    weights = []
    for q in base:
        covariance = (q.scale_tril[0] @ q.scale_tril[0].T).numpy()
        mean = q.means[0].numpy()
        slope = np.linalg.solve(covariance[:2, :2], covariance[:2, 2])
        means.append(mean[2] + (z[:, :2] - mean[:2]) @ slope)
        variances.append(np.full(2, covariance[2, 2] - covariance[:2, 2] @ slope))
        away = z[:, :2] - mean[:2]
        weights.append(
            -0.5 * (away * np.linalg.solve(covariance[:2, :2], away.T).T).sum(1)
            - 0.5 * np.linalg.slogdet(covariance[:2, :2])[1]
        )
    weights = np.exp(weights - logsumexp(weights, axis=0))
    mean = (weights * means).sum(0)
    variance = (weights * (np.array(variances) + np.square(means))).sum(0) - mean**2
    np.testing.assert_allclose(given.mean(2), center[2] + scale[2] * mean, rtol=1e-3)
    np.testing.assert_allclose(given.std(2), scale[2] * np.sqrt(variance), rtol=1e-2)


def test_chain_rule_with_every_term_by_its_own_way(moons):
    """p(a) by quadrature of the density, p(b | a) by the conditional, p(a, b) by the density."""
    est, X = moons
    rows = X[:3]
    marginal, error = est.marginal(0).score_samples(rows[:, :1], return_std=True)
    given = est.condition({0: rows[:, 0]})
    conditional = given.score_samples(rows[:, 1:])
    joint = est.score_samples(rows)
    grid = np.linspace(-4.0, 4.0, 2001)
    for i, row in enumerate(rows):
        density = np.exp(est.score_samples(np.column_stack([np.full(2001, row[0]), grid])))
        assert marginal[i] == pytest.approx(math.log(np.trapezoid(density, grid)), abs=2e-3)
    np.testing.assert_allclose(conditional, joint - marginal, atol=1e-9)
    # log Z is in both, but for what members weigh them differently
    _, of_conditional = given.score_samples(rows[:, 1:], return_std=True)
    assert (of_conditional < error + 1e-3).all()
    assert (error > 0).all()


def test_log_z_cancels_where_there_is_one_member():
    X = make_two_moons(n_samples=300, random_state=0)
    network = Network(hidden_layer_sizes=(32,), max_epochs=40)
    est = NCEDensity(base="gaussian", energy_model=network, n_members=1, random_state=0).fit(X)
    assert est.log_partition_std_error_[0] > 1e-4
    given = est.condition({0: X[:2, 0]})
    _, error = given.score_samples(X[:2, 1:], return_std=True)
    assert (error < 0.5 * est.log_partition_std_error_[0]).all()
    assert (given.std_error_given >= est.log_partition_std_error_[0] * 0.999).all()


def test_units_change_moments_and_nothing_else(gaussian):
    X = gaussian_rows()
    factor = np.array([1000.0, 1.0, 0.01])
    other = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(X * factor)
    one, two = gaussian.condition({0: 1.0}), other.condition({0: 1000.0})
    np.testing.assert_allclose(two.mean(2), 0.01 * one.mean(2), rtol=1e-6)
    rows = np.array([[1.0, 3.0]])
    np.testing.assert_allclose(
        two.score_samples(rows * factor[1:]), one.score_samples(rows) - np.log(0.01), rtol=1e-6
    )
    np.testing.assert_allclose(
        other.marginal([0, 2]).score_samples(X[:5, [0, 2]] * factor[[0, 2]]),
        gaussian.marginal([0, 2]).score_samples(X[:5, [0, 2]]) - np.log(10.0), rtol=1e-6,
    )  # fmt: skip
    np.testing.assert_allclose(
        other.explain(X[:5] * factor).excess, gaussian.explain(X[:5]).excess, atol=1e-6
    )


def test_draws_are_seeded_and_distinct(moons):
    est, X = moons
    given = est.condition({0: X[:2, 0]})
    drawn = given.sample(500, random_state=0)
    assert drawn.shape == (1000, 1)
    np.testing.assert_array_equal(drawn, given.sample(500, random_state=0))
    assert (given.sample(500, random_state=1) != drawn).any()
    assert len(np.unique(drawn)) > 950
    np.testing.assert_allclose(drawn[:500].mean(), given.mean(1)[0], atol=0.15)


def test_sample_given_is_whole_rows(gaussian):
    drawn = gaussian.sample(300, random_state=0, given={1: 3.0})
    assert drawn.shape == (300, 3)
    assert (drawn[:, 1] == 3.0).all()
    assert len(np.unique(drawn[:, 0])) > 285
    with pytest.raises(ValueError, match="n_steps=5 moves all cells"):
        gaussian.sample(3, given={1: 3.0}, n_steps=5)


# ---------------------------------------------------------------------- tables


def test_masses_of_states_add_up_to_what_was_seen(mixed):
    """And the rest, which is new to the table, has the probability of the rule of succession."""
    regions = ["east", "west", "south"]
    total = np.exp(mixed.marginal("region").score_samples(pd.DataFrame({"region": regions}))).sum()
    assert total == pytest.approx((400 + 3) / (400 + 3 + 1), abs=1e-9)


def test_the_marginal_of_a_number_with_an_atom_is_one_in_all(mixed):
    income = mixed.marginal("income")
    grid = np.linspace(5.0, 65.0, 1201)
    numbers = np.trapezoid(np.exp(income.score_samples({"income": grid})), grid)
    states = np.exp(income.score_samples({"income": [0.0, None]})).sum()
    assert numbers + states == pytest.approx(403 / 404, abs=2e-3)
    wanted = [(table().income == 0).mean(), table().income.isna().mean()]
    found = np.exp(income.score_samples({"income": [0.0, np.nan]}))
    np.testing.assert_allclose(found, wanted, atol=0.03)


def test_categories_given_the_rest(mixed):
    frame = table(300, seed=1)
    probabilities = mixed.category_probabilities(frame, "region")
    assert mixed.columns_[0].categories == ("east", "south", "west")
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    # by the densities of rows with every category in turn
    logs = np.stack(
        [mixed.score_samples(frame.assign(region=r)) for r in ("east", "south", "west")]
    )
    np.testing.assert_allclose(probabilities, np.exp(logs - logsumexp(logs, axis=0)).T, atol=1e-9)
    np.testing.assert_allclose(
        mixed.category_probabilities(frame.drop(columns="region"), "region"), probabilities
    )
    high = frame.income > 36
    assert probabilities[high, 2].mean() > probabilities[frame.income.between(1, 34), 2].mean()


def test_numbers_given_a_category(mixed):
    frame = table()
    given = mixed.condition({"region": ["west", "east"]})
    income = frame[frame.income > 0].groupby("region").income.mean()
    atom = given.probability("income", -1e-9, 1e-9)
    np.testing.assert_allclose(atom, 0.3 / 0.9 * 0.9, atol=0.08)
    mean = given.mean("income") / (1 - atom)
    np.testing.assert_allclose(mean, [income["west"], income["east"]], rtol=0.06)
    assert (given.quantile("income", 0.1) == 0.0).all()
    assert given.columns == ["age", "income", "unit"]


def test_frames_come_back_as_they_were_given(mixed):
    rows = table(6, seed=3)[["region", "age"]].set_axis(list("abcdef"))
    drawn = mixed.condition(rows).sample(2, random_state=0)
    assert list(drawn.index) == [i for i in "abcdef" for _ in range(2)]
    assert list(drawn.columns) == ["income", "unit"]
    whole = mixed.sample(5, random_state=0, given={"region": "south", "age": 33})
    assert whole.dtypes.equals(table().dtypes)
    assert (whole[["region", "age", "unit"]] == ["south", 33, 1]).all(axis=None)
    complete = mixed.condition({"region": "east"}).sample(300, random_state=0, complete=True)
    assert not complete.income.isna().any()
    assert mixed.condition({"region": "east"}).sample(300, random_state=0).income.isna().any()


def test_no_completion_is_complete(mixed, monkeypatch):
    given = mixed.condition({"region": "east"})
    monkeypatch.setattr(type(mixed._columns), "is_complete", lambda self, x: x[:, 0] < 0)
    with pytest.raises(ValueError, match="complete=True: of 65536 completions of a row none is"):
        given.sample(3, complete=True)


def test_unknown_is_not_missing(mixed):
    rows = pd.DataFrame({"region": ["east", UNKNOWN], "income": [np.nan, np.nan]}, dtype=object)
    given = mixed.condition(rows)
    assert given.columns == ["region", "age", "unit"]
    both = given.log_density_given
    east, any_region = mixed.condition({"region": "east", "income": None}), {"income": np.nan}
    assert both[0] == pytest.approx(east.log_density_given[0], abs=1e-9)
    assert both[1] == pytest.approx(mixed.condition(any_region).log_density_given[0], abs=1e-9)
    assert both[0] < both[1]
    drawn = given.sample(200, random_state=0)
    assert (drawn.region[:200] == "east").all()
    assert drawn.region[200:].nunique() == 3
    assert pickle.loads(pickle.dumps(UNKNOWN)) is UNKNOWN


def test_what_fit_has_not_met_says_nothing(mixed):
    with pytest.warns(UserWarning, match="region"):
        new = mixed.condition({"region": ["north"], "age": [40]})
    without = mixed.condition({"age": [40]})
    np.testing.assert_allclose(new.mean("income"), without.mean("income"), rtol=1e-6)


@pytest.mark.parametrize("given", [{"region": "mars"}, {"age": np.nan}, {"unit": 2}])
def test_a_warning_says_that_given_cells_are_new(mixed, given):
    (name,) = given
    with pytest.warns(
        UserWarning, match=f"column '{name}' of given has 1 cell.s. that fit has not"
    ):
        drawn = mixed.sample(5, given=given, random_state=0)
    assert drawn["region"].isna().all() == (name == "region")


def test_given_gaps_are_gaps_in_every_dtype():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=99), "yes": rng.random(99) < 0.5})
    frame["n"] = rng.integers(0, 3, 99).astype(np.uint8)
    est = NCEDensity(base="gmm", energy_model=None, random_state=0).fit(frame)
    with pytest.warns(UserWarning, match="fit has not met"):
        drawn = est.sample(4, given={"yes": None, "n": np.nan}, random_state=0)
    assert drawn.isna().sum().tolist() == [0, 4, 4]
    assert est.sample(4, given={"x": 0.0}, random_state=0).dtypes.equals(frame.dtypes)


def test_a_warning_says_that_cells_beside_a_category_are_new(mixed):
    rows = table(3).assign(unit=2)
    with pytest.warns(UserWarning, match="column 'unit' of X has 3 cell"):
        new = mixed.category_probabilities(rows, "region")
    np.testing.assert_allclose(new, mixed.category_probabilities(table(3), "region"), rtol=1e-6)


def test_polars_and_arrays():
    pl = pytest.importorskip("polars")
    frame = table()
    est = NCEDensity(energy_model=None, base="gmm", random_state=0).fit(
        pl.DataFrame({name: column.to_list() for name, column in frame.items()})
    )
    given = est.condition(pl.DataFrame({"region": ["east", "west"]}))
    assert given.sample(3, random_state=0).columns == ["age", "income", "unit"]
    array = NCEDensity(energy_model=None, base="gmm", categorical_features=[0], random_state=0).fit(
        frame.to_numpy(dtype=object)
    )
    rows = np.array([["east", UNKNOWN, 30.0, 1], ["west", 41, UNKNOWN, 1]], dtype=object)
    drawn = array.condition(rows).sample(2, random_state=0)
    assert drawn.shape == (4, 2)
    assert drawn[2, 0] == 41
    assert drawn[0, 1] == 30.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"town": "x"}, "given has a column 'town', which fit has not seen"),
        ({}, "given has no column"),
        ({"age": "old"}, "column 'age' is taken for numbers"),
        ({"age": np.inf}, "column 'age' of given contains infinity"),
        ({"age": [1, 2], "income": [1.0, 2.0, 3.0]}, "different lengths"),
        ({"region": "east", "age": 3, "income": 1.0, "unit": 1}, "row 0 of given has no open cell"),
        (np.zeros((2, 3)), "given has 3 columns, and fit has seen 4"),
        (3.0, "given must be a mapping"),
    ],
)
def test_what_cannot_be_given(mixed, given, message):
    with pytest.raises(ValueError, match=message):
        mixed.condition(given)


def test_what_cannot_be_asked(mixed):
    given = mixed.condition({"age": 40})
    with pytest.raises(ValueError, match="column='region' holds categories: ask for its prob"):
        given.mean("region")
    with pytest.raises(ValueError, match="column='income' holds numbers"):
        given.probabilities("income")
    with pytest.raises(ValueError, match="column='age' is none of"):
        given.mean("age")
    with pytest.raises(ValueError, match="q=1.5 must be in"):
        given.quantile("income", 1.5)
    with pytest.raises(ValueError, match="low=2 must not be above high=1"):
        given.probability("income", 2, 1)
    with pytest.raises(ValueError, match="n_draws=100 must be a positive multiple of 16"):
        mixed.condition({"age": 40}, n_draws=100)
    with pytest.raises(ValueError, match="X lacks column 'region'"):
        mixed.marginal(["age", "region"]).score_samples(pd.DataFrame({"age": [3]}))
    with pytest.raises(ValueError, match="columns has 'town'"):
        mixed.marginal(["age", "town"])
    with pytest.raises(ValueError, match="X has 2 rows, and 3 were given"):
        mixed.condition({"age": [1, 2, 3]}).score_samples(table(2).drop(columns="age"))


def test_densities_of_columns_read_tensors_and_say_what_they_are(gaussian):
    rows = gaussian_rows(4)
    of_two, open_two = gaussian.marginal([0, 2]), gaussian.condition({1: 0.0})
    for density in (of_two, open_two):
        expected = density.score_samples(rows[:, [0, 2]])
        found = density.score_samples(torch.tensor(rows[:, [0, 2]], requires_grad=True))
        np.testing.assert_array_equal(found, expected)
    assert repr(of_two).startswith("MarginalDensity(columns=[0, 2], estimator=NCEDensity(")
    assert repr(open_two).startswith("ConditionalDensity(columns=[0, 2], estimator=NCEDensity(")


def test_marginal_of_all_columns_is_the_density(mixed):
    frame = table(5, seed=2)
    every = mixed.marginal(list(frame.columns)).score_samples(frame)
    np.testing.assert_allclose(every, mixed.score_samples(frame))
    assert list(mixed.marginal(["income", "age"]).sample(3, random_state=0).columns) == [
        "age", "income",
    ]  # fmt: skip


def test_what_is_known_of_a_fit_is_forgotten_by_the_next(gaussian):
    est = pickle.loads(pickle.dumps(gaussian))
    assert not any("completer" in name for name in vars(est))
    before = est.condition({0: 1.0}).mean(1)
    est.fit(gaussian_rows(seed=5) + 10.0)
    assert est.condition({0: 11.0}).mean(1) == pytest.approx(before + 10.0, abs=0.3)


# ---------------------------------------------------------------------- explanations


def test_the_altered_cell_is_named_as_often_as_by_the_true_conditional():
    covariance = CORRELATION * np.outer(SCALE, SCALE)
    X = gaussian_rows(3000)
    est = NCEDensity(base="gmm", energy_model=None, random_state=0).fit(X)
    rng = np.random.default_rng(7)
    rows, altered = gaussian_rows(1000, seed=9), rng.integers(3, size=1000)
    rows[np.arange(1000), altered] += rng.choice([-1, 1], 1000) * 2.5 * SCALE[altered]
    found = est.explain(rows).excess
    precision = np.linalg.inv(covariance)
    away = (rows - MEAN) @ precision
    truth = 0.5 * away**2 / np.diag(precision) - 0.5  # (k^2 - 1) / 2
    named = [(excess.argmax(1) == altered).mean() for excess in (found, truth)]
    assert named[1] > 0.7
    assert abs(named[0] - named[1]) < 0.03


def test_explanations_of_a_table(mixed):
    frame = table(3, seed=4)
    frame.loc[1, "income"] = 90.0
    explanation = mixed.explain(frame)
    assert explanation.columns == [("region",), ("age",), ("income",)]
    first, *others = explanation.of_row(1)
    assert first.columns == ("income",)
    assert first.values == (90.0,)
    assert first.excess > 10.0 > max(other.excess for other in others)
    assert first.surprise == pytest.approx(
        mixed.marginal(["region", "age", "unit"]).score_samples(frame.iloc[[1]])[0]
        - mixed.score_samples(frame.iloc[[1]])[0],
        abs=1e-3,
    )
    assert list(explanation.expected.columns) == list(frame.columns)
    with pytest.raises(IndexError, match="i=3 is none of the 3 row"):
        explanation.of_row(3)
    with pytest.warns(UserWarning, match="which fit has not met"):
        explanation = mixed.explain(frame.assign(region="mars"))
    assert explanation.of_row(0)[0].values == ("mars",)


def test_columns_that_say_the_same_are_a_group():
    rng = np.random.default_rng(0)
    X = gaussian_rows(600)
    X = np.column_stack([X, X[:, 0] + 0.02 * rng.normal(size=600)])
    est = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(X)
    row = X[:1].copy()
    row[0, 3] += 3.0
    explanation = est.explain(row)
    assert explanation.columns == [(0, 3), (1,), (2,)]
    assert explanation.of_row(0)[0].columns == (0, 3)
    assert len(explanation.of_row(0)[0].values) == 2


# ---------------------------------------------------------------------- latent variables


def test_a_linear_latent_variable_model_has_the_conditional_of_its_gaussian():
    X = gaussian_rows()
    est = ImplicitVAE(n_components=1, max_epochs=0, random_state=0).fit(X)
    import torch

    with torch.no_grad():
        decoder = est.model_.decoder
        mean, other = decoder(torch.zeros(1, 1).double())[0], decoder(torch.ones(1, 1).double())[0]
    slope = (other - mean).numpy()
    covariance = np.outer(slope, slope) + np.diag(est.model_.likelihood.variance.detach().numpy())
    center, scale = est._columns.center, est._columns.scale
    z = (1.0 - center[0]) / scale[0] - mean[0].item()
    wanted = mean.numpy()[1:] + covariance[1:, 0] / covariance[0, 0] * z
    spread = np.sqrt(np.diag(covariance)[1:] - covariance[1:, 0] ** 2 / covariance[0, 0])
    given = est.condition({0: 1.0})
    for j in (1, 2):
        found = (given.mean(j)[0] - center[j]) / scale[j]
        assert found == pytest.approx(wanted[j - 1], abs=0.12 * spread[j - 1])
        assert given.std(j)[0] / scale[j] == pytest.approx(spread[j - 1], rel=0.1)
    log_given = -0.5 * z**2 / covariance[0, 0] - 0.5 * math.log(2 * math.pi * covariance[0, 0])
    error = abs(given.log_density_given[0] - (log_given - math.log(scale[0])))
    assert error < 4 * given.std_error_given[0]
    # one open cell
    both = est.condition({0: 1.0, 1: 2.0})
    known = (np.array([1.0, 2.0]) - center[:2]) / scale[:2] - mean.numpy()[:2]
    gain = np.linalg.solve(covariance[:2, :2], covariance[:2, 2])
    assert (both.mean(2)[0] - center[2]) / scale[2] == pytest.approx(
        mean[2].item() + known @ gain, abs=0.05
    )
    joint, error = both.score_samples([[3.0]], return_std=True)
    assert abs(joint - (est.score_samples([[1.0, 2.0, 3.0]]) - both.log_density_given)) < 1e-9
    assert error > 0


def test_bernoulli_likelihoods_are_refused():
    X = (np.random.default_rng(0).random((60, 3)) < 0.4).astype(float)
    est = ImplicitVAE(n_components=1, likelihood="bernoulli", max_epochs=0, random_state=0).fit(X)
    with pytest.raises(ValueError, match='likelihood="bernoulli" does not answer'):
        est.condition({0: 1.0})
