"""Holes filled from the density of the table."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from skebm import Boosting, DensityImputer, ImplicitVAE, NCEDensity
from skebm.datasets import make_bayesian_network, make_latent_classes
from skebm.estimators._completer import Possible

pd = pytest.importorskip("pandas")

BASE = {"base": "gmm", "energy_model": None, "n_members": 2, "random_state": 0}


def imputer(**options):
    return DensityImputer(NCEDensity(**BASE), **{"random_state": 0, **options})


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([imputer(), imputer(strategy="mean")])
def test_battery(estimator, check):
    check(estimator)


# ---------------------------------------------------------------- beside the true conditional

COVARIANCE = np.array([[1.0, 0.8, -0.3], [0.8, 1.5, 0.2], [-0.3, 0.2, 0.7]])
MEAN = np.array([1.0, -2.0, 0.5])


def gaussian(n, share=0.25, seed=0):
    """Rows, and which of their cells are missing, at random."""
    rng = np.random.default_rng(seed)
    X = rng.multivariate_normal(MEAN, COVARIANCE, n)
    return X, rng.random(X.shape) < share


def conditional(row, hole):
    """Mean and covariance of the cells of a Gaussian row that are missing, given the others."""
    known = ~hole
    slope = COVARIANCE[np.ix_(hole, known)] @ np.linalg.inv(COVARIANCE[np.ix_(known, known)])
    mean = MEAN[hole] + slope @ (row - MEAN)[known]
    return mean, COVARIANCE[np.ix_(hole, hole)] - slope @ COVARIANCE[np.ix_(known, hole)]


@pytest.fixture(scope="module")
def table():
    return gaussian(2_000)


@pytest.fixture(scope="module")
def drawing(table):
    X, hole = table
    return imputer(n_draws=19).fit(np.where(hole, np.nan, X))


def test_means_are_conditional_means(table):
    X, hole = table
    holey = np.where(hole, np.nan, X)
    for strategy in ("mean", "mode"):
        filled = imputer(strategy=strategy).fit_transform(holey)
        np.testing.assert_array_equal(filled[~hole], X[~hole])
        some = np.flatnonzero(hole.any(1))
        truth = np.concatenate([conditional(X[i], hole[i])[0] for i in some])
        error = np.concatenate([filled[i, hole[i]] for i in some]) - truth
        spread = np.concatenate([np.sqrt(np.diag(conditional(X[i], hole[i])[1])) for i in some])
        bound = {"mean": 0.22, "mode": 0.35}[strategy]  # rows with several holes are sampled
        assert np.sqrt(np.mean((error / spread) ** 2)) < bound
        assert abs(np.mean(error / spread)) < 0.05


def test_means_stay_within_what_fit_has_seen(table):
    """Tails of a density may be so heavy that they have no mean, and one value is all of it."""
    X, hole = table
    fitted = imputer(strategy="mean").fit(np.where(hole, np.nan, X))
    far = Possible(np.array([0]), 1, np.array([[-2.0, 1e9]]), np.array([[0.99, 0.01]]))
    mean = fitted._single(far, fitted.estimator_._columns)
    largest = np.nanmax(np.where(hole, np.nan, X)[:, 1])
    np.testing.assert_allclose(mean, -2.0 * 0.99 + 0.01 * largest)


def test_draws_are_of_the_joint_conditional(table, drawing):
    """Rows with one, two and three holes: their squared distance from the mean is chi-squared."""
    X, hole = table
    filled = drawing.transform(np.where(hole, np.nan, X))
    for n_holes in (1, 2, 3):
        distance = []
        for i in np.flatnonzero(hole.sum(1) == n_holes):
            mean, covariance = conditional(X[i], hole[i])
            gap = filled[i, hole[i]] - mean
            distance.append(gap @ np.linalg.solve(covariance, gap))
        assert stats.kstest(distance, stats.chi2(n_holes).cdf).pvalue > 1e-3


def test_draws_cover_the_truth_as_often_as_they_say(drawing):
    """A new row lies between the least and the largest of 19 draws with probability 18/20."""
    X, hole = gaussian(1_500, seed=1)
    draws = np.stack(drawing.impute(np.where(hole, np.nan, X)))
    inside = ((draws.min(0) < X) & (X < draws.max(0)))[hole]
    rows_with_holes = hole.any(1).sum()
    assert inside.mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / rows_with_holes))


def test_draws_of_a_tilt_are_of_the_model():
    """Pairs of open cells, by Gibbs sampling, and such rows of the model itself."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 1_200)
    ring = np.c_[3 * np.cos(angle), 3 * np.sin(angle)] + 0.3 * rng.normal(size=(1_200, 2))
    X = np.c_[ring, (angle < np.pi) + 0.1 * rng.normal(size=1_200)]
    density = NCEDensity(
        base="gaussian", n_members=2, energy_model=Boosting(max_iter=60), random_state=0
    ).fit(X)
    assert density.accepted_ == "tilt"
    filler = DensityImputer(density, random_state=0)
    filler.estimator_, filler._seed, filler.n_features_in_ = density, 0, 3
    given = np.tile([np.nan, np.nan, 1.0], (1_500, 1))
    filled = filler.transform(given)
    other = density.condition({2: 1.0}).sample(1_500, random_state=1)
    for direction in ([1, 0], [0, 1], [1, 1]):
        drawn = stats.ks_2samp(filled[:, :2] @ direction, other @ direction)
        assert drawn.pvalue > 1e-3
    radius = [np.hypot(*rows[:, :2].T) for rows in (filled, other)]
    assert stats.ks_2samp(*radius).pvalue > 1e-3


@pytest.mark.parametrize("make", [make_latent_classes, make_bayesian_network])
def test_categories_are_drawn_by_their_probabilities(make):
    """Those of the distribution itself, of which every category is tried in the place of a hole."""
    from skebm.datasets import MIXED_DISTRIBUTIONS

    truth = MIXED_DISTRIBUTIONS[make.__name__.removeprefix("make_")]
    X = make(3_000, random_state=0)
    X = X[X.notna().all(axis=1)].reset_index(drop=True)
    hole = np.random.default_rng(0).random(len(X)) < 0.3
    for column, levels in truth.columns.items():
        if isinstance(levels, type):
            continue
        holey = X.astype({column: object})
        holey.loc[hole, column] = None
        filled = imputer().fit_transform(holey)[column][hole]
        density = np.stack(
            [truth.log_density(X[hole].assign(**{column: level})) for level in levels], axis=1
        )
        p = np.exp(density - np.logaddexp.reduce(density, axis=1, keepdims=True))
        for k, level in enumerate(levels):
            # the share where the level is likely, and where it is not
            for weight in (p[:, k], 1.0 - p[:, k]):
                error = weight @ ((filled == level) - p[:, k]) / weight.sum()
                bound = np.sqrt(weight**2 @ (p[:, k] * (1 - p[:, k]))) / weight.sum()
                assert abs(error) < 4 * bound + 0.03


def test_a_row_without_cells_is_a_draw_of_the_density(drawing):
    empty = np.full((1_500, 3), np.nan)
    filled = drawing.set_params(n_draws=1).transform(empty)
    drawing.set_params(n_draws=19)
    for direction in ([1, 0, 0], [1, 1, 0], [1, -1, 1]):
        along, scale = MEAN @ direction, np.sqrt(direction @ COVARIANCE @ direction)
        pit = stats.norm(along, scale).cdf(filled @ direction)
        assert stats.kstest(pit, "uniform").statistic < 0.06


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_latent_variable_model_fills_as_well():
    X, hole = gaussian(300)
    hole[:, 0] |= np.random.default_rng(1).random(300) < 0.6
    holey = np.where(hole, np.nan, X)
    density = ImplicitVAE(encoder="gaussian", max_epochs=30, learning_rate=0.02, random_state=0)
    fitted = DensityImputer(density, random_state=0).fit(holey)
    hole, holey = hole[:100], holey[:100]
    for strategy in ("draw", "mean"):
        filled = fitted.set_params(strategy=strategy).transform(holey)
        assert np.isfinite(filled).all()
        both = hole.sum(1) == 2
        truth = np.concatenate([conditional(X[i], hole[i])[0] for i in np.flatnonzero(both)])
        own = np.concatenate([filled[i, hole[i]] for i in np.flatnonzero(both)])
        assert np.corrcoef(own, truth)[0, 1] > 0.5


# ---------------------------------------------------------------- tables


def shop(n=600, share=0.2, seed=0):
    """A frame of many dtypes with holes, and the same without."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    full = pd.DataFrame(
        {
            "size": x.astype(np.float32),
            "count": np.round(3 + x).astype(int),
            "whole": np.round(10 + 2 * x),
            "kind": pd.Categorical(np.where(x > 0, "u", "v"), categories=["w", "v", "u"]),
            "amount": np.where(rng.random(n) < 0.6, 0.0, np.exp(x)),
            "member": x + rng.normal(size=n) > 0,
            "name": np.where(x > 0.5, "ann", "bob"),
            "same": 7.0,
        },
        index=np.arange(n) + 1_000,
    ).astype({"count": "Int64", "member": "boolean", "name": object})
    holey = full.copy()
    for column in full:
        holey.loc[rng.random(n) < share, column] = None
    return full, holey


STRATEGIES = pytest.mark.parametrize("strategy", ["draw", "mean", "mode"])


@STRATEGIES
def test_a_frame_comes_back_with_its_dtypes(strategy):
    full, holey = shop()
    filled = imputer(strategy=strategy).fit_transform(holey)
    assert filled.dtypes.equals(holey.dtypes)
    assert filled.index.equals(holey.index)
    assert list(filled.columns) == list(holey.columns)
    assert filled.notna().all(axis=None)
    there = holey.notna()
    pd.testing.assert_frame_equal(filled[there], holey[there])
    assert holey.isna().any(axis=None)  # it is a copy
    assert (filled["whole"] % 1 == 0).all()
    assert (filled["same"] == 7.0).all()
    for column in ("count", "kind", "name"):
        same = filled[column] == full[column]
        assert same[~there[column]].mean() > (0.6 if strategy == "draw" else 0.7)
    lost = ~there["amount"]
    zeros = (filled["amount"] == 0)[lost].mean()
    expected = {"draw": (0.5, 0.7), "mean": (0, 0.05), "mode": (0.85, 1.0)}[strategy]
    assert expected[0] <= zeros <= expected[1]


@STRATEGIES
def test_polars(strategy):
    pl = pytest.importorskip("polars")
    _, holey = shop()
    schema = {"size": pl.Float32, "count": pl.Int16, "kind": pl.Enum(["w", "v", "u"]),
              "member": pl.Boolean, "name": pl.String}  # fmt: skip
    table = pl.DataFrame(
        {name: [None if pd.isna(v) else v for v in holey[name].astype(object)] for name in schema},
        schema=schema,
    )
    filled = imputer(strategy=strategy).fit_transform(table)
    assert filled.schema == table.schema
    assert sum(filled.null_count().row(0)) == 0
    kept = table["kind"].is_not_null()
    assert filled["kind"].filter(kept).equals(table["kind"].filter(kept))


def test_arrays_lists_and_tensors():
    X, hole = gaussian(300)
    holey = np.where(hole, np.nan, X)
    fitted = imputer().fit(holey)
    filled = fitted.transform(holey)
    for other in (holey.tolist(), torch.as_tensor(holey), np.asfortranarray(holey)):
        np.testing.assert_array_equal(fitted.transform(other), filled)
    assert fitted.transform(holey.astype(np.float32)).dtype == np.float32
    objects = fitted.transform(np.where(hole, None, X))
    assert objects.dtype == object
    np.testing.assert_array_equal(objects.astype(float), filled)


def test_columns_that_fit_saw_complete_are_filled_too():
    X, hole = gaussian(1_000)
    hole[:, 1] |= ~hole.any(1)
    fitted = imputer(strategy="mean").fit(X)
    filled = fitted.transform(np.where(hole, np.nan, X))
    truth = np.concatenate([conditional(x, h)[0] for x, h in zip(X, hole, strict=True)])
    assert np.sqrt(np.mean((filled[hole] - truth) ** 2)) < 0.15


def test_a_category_that_fit_never_met_is_kept_and_says_nothing():
    full, holey = shop()
    fitted = imputer().fit(holey.drop(columns="kind").assign(kind=full["kind"].astype(object)))
    row = full.drop(columns="kind").assign(kind="new")[:200]
    row["size"] = np.float32("nan")
    filled = fitted.transform(row)
    assert (filled["kind"] == "new").all()
    assert filled["size"].notna().all()
    assert np.corrcoef(filled["size"], full["size"][:200])[0, 1] > 0.8


def test_rare_categories_that_share_a_code_are_drawn_by_their_shares():
    rng = np.random.default_rng(0)
    kind = rng.choice(["a", "b", "c", "d"], 800, p=[0.5, 0.3, 0.15, 0.05])
    table = pd.DataFrame({"kind": kind, "x": rng.normal(size=800)})
    table.loc[rng.random(800) < 0.4, "kind"] = None
    lost = table["kind"].isna()
    pooling = DensityImputer(NCEDensity(**BASE, max_categories=3), random_state=0)
    drawn = pooling.fit_transform(table)["kind"][lost].value_counts(normalize=True)
    assert drawn["c"] == pytest.approx(0.15, abs=0.08)
    assert 0 < drawn["d"] < 0.12


# ---------------------------------------------------------------- as a transformer


def test_results_depend_on_the_seed_alone():
    X, hole = gaussian(300)
    holey = np.where(hole, np.nan, X)
    fitted = imputer(n_draws=3).fit(holey)
    first = fitted.impute(holey)
    assert len(first) == 3
    np.testing.assert_array_equal(fitted.transform(holey), first[0])
    assert (first[0] != first[1])[hole].all()
    for other in (fitted, pickle.loads(pickle.dumps(fitted)), clone(fitted).fit(holey)):
        for one, again in zip(first, other.impute(holey), strict=True):
            np.testing.assert_array_equal(one, again)
    another = imputer(n_draws=3, random_state=1).fit(holey).transform(holey)
    assert (another != first[0])[hole].all()


def test_the_seed_is_handed_down():
    X, hole = gaussian(300)
    holey = np.where(hole, np.nan, X)
    unseeded = NCEDensity(**{**BASE, "random_state": None})
    one, two = (DensityImputer(unseeded, random_state=3).fit(holey) for _ in range(2))
    np.testing.assert_array_equal(one.transform(holey), two.transform(holey))
    assert imputer(random_state=3).fit(holey).estimator_.random_state == 0
    assert unseeded.random_state is None


def test_memory_does_not_grow_with_rows(monkeypatch):
    """Rows are completed some at a time, and come back in their places."""
    X, hole = gaussian(400)
    holey = np.where(hole, np.nan, X)
    fitted = imputer(strategy="mean").fit(holey)
    whole = fitted.transform(holey)
    monkeypatch.setattr("skebm.compose._imputer.ROWS_AT_ONCE", 50)
    alone = hole.sum(1) == 1  # the others are made of draws
    np.testing.assert_allclose(fitted.transform(holey)[alone], whole[alone])


def test_inside_a_pipeline_and_with_names():
    full, holey = shop()
    y = full["whole"].to_numpy()
    numbers = holey[["size", "amount", "same"]]
    model = make_pipeline(imputer(), LinearRegression()).fit(numbers, y)
    assert model.score(numbers, y) > 0.5
    assert list(model[0].get_feature_names_out()) == ["size", "amount", "same"]
    framed = imputer().set_output(transform="pandas").fit(numbers.to_numpy(float))
    assert list(framed.transform(numbers.to_numpy(float)).columns) == ["x0", "x1", "x2"]


def test_weights_and_groups_reach_the_density():
    X, hole = gaussian(400)
    holey = np.where(hole, np.nan, X)
    far = np.r_[holey, holey + 100.0]
    weight = np.r_[np.ones(400), np.zeros(400)]
    np.testing.assert_array_equal(
        imputer().fit(far, sample_weight=weight).transform(holey),
        imputer().fit(holey).transform(holey),
    )
    with pytest.raises(ValueError, match="one label in groups"):
        imputer().fit(holey, groups=np.zeros(400))


# ---------------------------------------------------------------- errors


def test_what_cannot_be_filled_is_named():
    X, hole = gaussian(100)
    frame = pd.DataFrame(np.where(hole, np.nan, X), columns=["a", "b", "c"])
    with pytest.raises(ValueError, match="column 'b' has no cell"):
        imputer().fit(frame.assign(b=np.nan))
    with pytest.raises(ValueError, match="n_draws=3 with strategy='mean'"):
        imputer(strategy="mean", n_draws=3).fit(frame)
    for other in (GaussianMixture(), NCEDensity, "nce"):
        with pytest.raises(ValueError, match="estimator=.* cannot be conditioned"):
            DensityImputer(other).fit(frame)
    refusing = NCEDensity(handle_missing="error")
    with pytest.raises(ValueError, match="estimator=.* takes no missing cells"):
        DensityImputer(refusing).fit(frame)
    with pytest.raises(ValueError, match="column 'a'.*infinity"):
        imputer().fit(frame).transform(frame.assign(a=np.inf))
    with pytest.raises(ValueError, match="feature names"):
        imputer().fit(frame).transform(frame[["b", "a", "c"]])
