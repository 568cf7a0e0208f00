"""Tables with categories, missing cells, values of their own: what goes in, and what comes out."""

import pickle
from itertools import product

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skebm import (
    TRUSTED_TYPES,
    AdversarialEBM,
    Boosting,
    ContrastiveDivergenceEBM,
    FlowContrastiveDensity,
    ImplicitVAE,
    NCEDensity,
    Network,
    OutlierDetector,
    ScoreMatchingEBM,
)

pd = pytest.importorskip("pandas")

pytestmark = pytest.mark.usefixtures("small_parts")

QUICK = {"base": "gmm", "n_members": 2, "energy_model": Boosting(max_iter=20), "random_state": 0}
QUICK_VAE = {
    "encoder": "gaussian", "hidden_layer_sizes": (32,), "max_epochs": 20, "learning_rate": 0.01,
    "n_importance_samples": 50, "random_state": 0,
}  # fmt: skip
QUICK_SM = QUICK | {"energy_model": Network(hidden_layer_sizes=(16,), max_epochs=20)}
QUICK_CD = QUICK | {"energy_model": Network(hidden_layer_sizes=(16,), max_epochs=10)}
QUICK_DETECTOR = {"n_members": 2, "random_state": 0}
SETTINGS = {
    NCEDensity: QUICK, ScoreMatchingEBM: QUICK_SM, ContrastiveDivergenceEBM: QUICK_CD,
    ImplicitVAE: QUICK_VAE, OutlierDetector: QUICK_DETECTOR,
}  # fmt: skip
every_estimator = pytest.mark.parametrize("Estimator", SETTINGS)


def quick(Estimator, **options):
    return Estimator(**SETTINGS[Estimator] | options)


def people(n, seed=0):
    """A region, a yes or no, a count, an age with holes, and an amount that often is zero."""
    rng = np.random.default_rng(seed)
    region = rng.choice(["east", "north", "west"], n, p=[0.5, 0.3, 0.2])
    member = rng.random(n) < np.where(region == "east", 0.7, 0.2)
    age = rng.normal(40 + 10 * member, 8.0, n)
    age[rng.random(n) < np.where(member, 0.1, 0.4)] = np.nan
    amount = np.where(rng.random(n) < 0.35, 0.0, np.exp(rng.normal(1.0 + member, 0.5, n)))
    visits = rng.poisson(2 + 2 * member)
    return pd.DataFrame(
        {
            "region": pd.Categorical(region, categories=["west", "north", "east", "south"]),
            "member": member,
            "visits": visits,
            "age": age,
            "amount": amount,
        }
    )


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda cls: cls.__name__)
def fitted(request, small_parts):
    return quick(request.param).fit(people(1_200))


@pytest.fixture(scope="module")
def fitted_again(fitted):
    """The same fit, and its labels of the rows."""
    estimator = clone(fitted)
    return estimator, estimator.fit_predict(people(1_200))


@pytest.fixture(scope="module")
def nce(small_parts):
    return NCEDensity(**QUICK).fit(people(1_200))


# ---------------------------------------------------------------- what columns are taken for


def test_columns_are_reported(fitted):
    region, member, visits, age, amount = fitted.columns_
    assert [c.kind for c in fitted.columns_] == ["category"] * 2 + ["number"] * 3
    assert region.categories == ("west", "north", "east")
    assert member.categories == (False, True)
    assert (visits.step, visits.bounds[0], visits.missing) == (1.0, 0.0, False)
    assert age.missing
    assert amount.atoms == (0.0,)


@pytest.mark.parametrize("kind", ["object", "str", "string", "boolean", "category"])
def test_dtypes_of_pandas_that_hold_categories(kind):
    frame = people(300)[["age", "member"]]
    words = frame["member"].map({True: "yes", False: "no"})
    frame["member"] = frame["member"].astype("boolean") if kind == "boolean" else words.astype(kind)
    estimator = NCEDensity(**QUICK).fit(frame)
    assert estimator.columns_[1].kind == "category"
    drawn = estimator.sample(50, random_state=0)
    assert drawn.dtypes.equals(frame.dtypes)
    assert set(drawn["member"]) <= set(frame["member"])


@every_estimator
def test_dtypes_of_polars(Estimator):
    pl = pytest.importorskip("polars")
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "a": pl.Series(rng.choice(["x", "y"], 300)),
            "b": pl.Series(rng.choice(["x", "y"], 300), dtype=pl.Categorical),
            "c": pl.Series(rng.choice(["x", "y"], 300), dtype=pl.Enum(["x", "y", "z"])),
            "d": pl.Series(rng.random(300) < 0.5),
            "e": pl.Series([None if v < -1 else v for v in rng.normal(size=300)]),
            "f": pl.Series(rng.poisson(3, 300)),
            "g": pl.Series(rng.normal(size=300), dtype=pl.Float32),
        }
    )
    estimator = quick(Estimator).fit(frame)
    assert [c.kind for c in estimator.columns_] == ["category"] * 4 + ["number"] * 3
    drawn = estimator.sample(60, random_state=0)
    assert drawn.schema == frame.schema
    assert drawn["e"].null_count() > 0
    assert np.isfinite(estimator.score_samples(frame)).all()


def test_dtypes_of_numbers_that_doubles_do_not_hold():
    pl = pytest.importorskip("polars")
    rng = np.random.default_rng(0)
    large = np.uint64(2**63) + rng.integers(0, 2**62, 200).astype(np.uint64)
    estimator = NCEDensity(**QUICK).fit(pd.DataFrame({"a": rng.normal(size=200), "b": large}))
    assert estimator.sample(50, random_state=0)["b"].dtype == np.uint64
    most = pd.DataFrame({"a": rng.normal(size=200), "b": np.iinfo(np.int64).max - large // 2**40})
    drawn = NCEDensity(**QUICK).fit(most).sample(50, random_state=0)["b"]
    assert (drawn > 2**62).all()
    cents = pl.DataFrame({"a": pl.Series(rng.normal(size=200)).cast(pl.Decimal(10, 2))})
    drawn = NCEDensity(**QUICK).fit(cents).sample(50, random_state=0)
    assert drawn.schema == cents.schema


def test_what_is_no_table_of_cells_is_refused():
    frame = people(50)[["age", "visits"]]
    frame["visits"] = [[1, 2]] * 50
    with pytest.raises(ValueError, match=r"column 'visits' holds a list, \[1, 2\] in row 0"):
        NCEDensity(**QUICK).fit(frame)
    pl = pytest.importorskip("polars")
    with pytest.raises(TypeError, match=r"LazyFrame.*pass X.collect\(\)"):
        NCEDensity(**QUICK).fit(pl.LazyFrame({"a": [1.0, 2.0]}))


@every_estimator
def test_categories_of_arrays_are_named(Estimator):
    frame = people(300)[["region", "age"]].astype(object)
    with pytest.raises(ValueError, match="column 0 holds text .*categorical_features"):
        quick(Estimator).fit(frame.to_numpy())
    for categorical in ([0], [True, False]):
        estimator = quick(Estimator, categorical_features=categorical).fit(frame.to_numpy())
        assert [c.kind for c in estimator.columns_] == ["category", "number"]
        assert estimator.sample(5, random_state=0).dtype == object
    named = quick(Estimator, categorical_features=["region"]).fit(frame)
    assert named.columns_[0].kind == "category"


def test_an_object_array_of_numbers_is_one_of_numbers():
    X = people(300)[["visits", "amount"]].to_numpy()
    as_numbers = NCEDensity(**QUICK).fit(X).score_samples(X)
    as_objects = NCEDensity(**QUICK).fit(X.astype(object)).score_samples(X.astype(object))
    np.testing.assert_array_equal(as_numbers, as_objects)


def test_columns_of_objects_that_are_numbers():
    frame = people(300)[["age", "visits"]]
    scores = NCEDensity(**QUICK).fit(frame).score_samples(frame)
    objects = frame.astype(object)
    objects.loc[frame["age"].isna(), "age"] = pd.NA
    estimator = NCEDensity(**QUICK).fit(objects)
    assert [c.kind for c in estimator.columns_] == ["number", "number"]
    np.testing.assert_allclose(estimator.score_samples(objects), scores, atol=1e-12)
    gaps = frame.convert_dtypes()
    np.testing.assert_allclose(NCEDensity(**QUICK).fit(gaps).score_samples(gaps), scores, atol=1e-9)
    assert estimator.sample(5, random_state=0).dtypes.tolist() == [object, object]


@pytest.mark.parametrize(
    ("given", "match"),
    [([7], "7, and X has 2 columns"), (["nothing"], "'nothing', which is no column"),
     ([True], "mask of 1 columns")],
)  # fmt: skip
def test_categorical_features_that_are_none(given, match):
    with pytest.raises(ValueError, match=match):
        NCEDensity(**QUICK, categorical_features=given).fit(people(100)[["region", "visits"]])


@every_estimator
def test_identifiers_are_refused_or_pooled(Estimator):
    frame = people(400)
    frame["street"] = np.random.default_rng(0).integers(0, 90, 400).astype(str)
    with pytest.raises(ValueError, match="(?s)'street' holds .* identifier.*max_categories"):
        quick(Estimator).fit(frame)
    estimator = quick(Estimator, max_categories=5).fit(frame)
    report = estimator.columns_[-1]
    assert len(report.categories) == 4
    assert len(report.pooled) > 80
    assert set(estimator.sample(200, random_state=0)["street"]) <= set(frame["street"])


def test_dates_are_refused_by_name():
    frame = people(50)
    frame["day"] = pd.date_range("2020-01-01", periods=50)
    with pytest.raises(ValueError, match="'day' of X holds dates"):
        NCEDensity(**QUICK).fit(frame)


@every_estimator
@pytest.mark.parametrize("missing", ["state", "error"])
def test_infinity_is_refused_by_name(Estimator, missing):
    frame = people(100).dropna()
    frame.iloc[3, 4] = np.inf
    for table in (frame, frame[["visits", "amount"]]):
        with pytest.raises(ValueError, match="'amount' contains infinity"):
            quick(Estimator, handle_missing=missing).fit(table)


@every_estimator
def test_missing_cells_may_be_refused(Estimator):
    estimator = quick(Estimator, handle_missing="error")
    assert not estimator.__sklearn_tags__().input_tags.allow_nan
    assert Estimator().__sklearn_tags__().input_tags.allow_nan
    with pytest.raises(ValueError, match="'age' contains NaN"):
        estimator.fit(people(100))
    with pytest.raises(ValueError, match="'age' contains NaN"):
        estimator.fit(people(100)[["age", "visits"]])


@pytest.mark.parametrize(
    "Estimator",
    [FlowContrastiveDensity, AdversarialEBM],
)
def test_other_estimators_name_the_column_and_the_one_to_take(Estimator):
    with pytest.raises(ValueError, match="'region' .*NCEDensity"):
        Estimator().fit(people(100))
    with pytest.raises(ValueError, match="'age' .*NCEDensity"):
        Estimator().fit(people(100)[["age", "visits"]])


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"base": "flow"}, "base='flow' knows numbers only, and column 'region' holds categories"),
        ({"base": None}, "base=None knows numbers only"),
        ({"noise": "uniform"}, "noise='uniform' knows numbers only"),
        ({"atoms": {"nothing": [0]}}, "atoms has 'nothing'"),
        ({"atoms": {"amount": ["zero"]}}, "must be numbers"),
    ],
)
def test_options_that_cannot_act(option, match):
    with pytest.raises(ValueError, match=match):
        NCEDensity(**QUICK | option).fit(people(100))


# ---------------------------------------------------------------- values of their own


def atoms_of(values, **options):
    X = np.c_[values, np.random.default_rng(9).normal(size=len(values))]
    return NCEDensity(base="gaussian", energy_model=None, **options).fit(X).columns_[0].atoms


def zero_inflated(n, rng):
    return np.where(rng.random(n) < 0.3, 0.0, rng.lognormal(size=n))


def test_atoms_are_found_and_grids_are_not():
    rng = np.random.default_rng(0)
    assert atoms_of(zero_inflated(600, rng)) == (0.0,)
    capped = np.minimum(zero_inflated(900, rng), 2.0)
    assert atoms_of(capped) == (0.0, 2.0)
    assert atoms_of(rng.normal(size=600)) == ()
    assert atoms_of(rng.poisson(0.7, 600)) == ()  # counts, with many zeros
    assert atoms_of(np.round(rng.normal(size=600), 1)) == ()
    tenths = np.round(rng.gamma(2.0, size=2_000), 1)
    assert atoms_of(np.where(rng.random(2_000) < 0.2, 1.0, tenths)) == ()


def test_bootstraps_have_the_same_atoms():
    rng = np.random.default_rng(1)
    values = zero_inflated(500, rng)
    found = {atoms_of(values[rng.integers(0, 500, 500)]) for _ in range(20)}
    assert found == {(0.0,)}


def test_atoms_may_be_given_or_turned_off():
    values = zero_inflated(400, np.random.default_rng(2))
    assert atoms_of(values, atoms="off") == ()
    assert atoms_of(values, atoms={0: [0.0]}) == (0.0,)
    assert atoms_of(np.random.default_rng(0).normal(size=100), atoms={1: [0.0]}) == ()


def test_an_atom_has_a_mass_and_a_number_a_density():
    """The probability of zero is a probability, and in other units of the column the same one."""
    frame = people(1_500)[["amount", "visits"]]
    estimator = NCEDensity(base="gmm", energy_model=None, random_state=0).fit(frame)
    in_cents = frame.assign(amount=100 * frame["amount"])
    other = NCEDensity(base="gmm", energy_model=None, random_state=0).fit(in_cents)
    change = estimator.score_samples(frame) - other.score_samples(in_cents)
    expected = np.where(frame["amount"] == 0, 0.0, np.log(100.0))
    np.testing.assert_allclose(change, expected, atol=1e-8)
    rows = pd.DataFrame({"amount": 0.0, "visits": np.linspace(-8, 25, 3_301)})
    share = np.exp(estimator.score_samples(rows)).sum() * 0.01
    assert share == pytest.approx((frame["amount"] == 0).mean(), abs=0.02)


# ---------------------------------------------------------------- the density


def test_the_density_sums_and_integrates_to_one():
    frame = people(1_000)[["member", "age", "amount"]]
    estimator = NCEDensity(base="gmm", n_members=2, random_state=0).fit(frame)
    ages, amounts = np.linspace(-10, 100, 221), np.linspace(-6, 60, 661)
    total = 0.0
    for member, has_age, has_amount in product((False, True), repeat=3):
        age, amount = np.meshgrid(ages if has_age else [np.nan], amounts if has_amount else [0.0])
        if has_amount:  # the atom itself is no number
            amount = np.where(amount == 0.0, 1e-9, amount)
        rows = pd.DataFrame({"member": member, "age": age.ravel(), "amount": amount.ravel()})
        cell = (0.5 if has_age else 1.0) * (0.1 if has_amount else 1.0)
        total += np.exp(estimator.score_samples(rows)).sum() * cell
    # each column keeps a little for what it has not shown: 1 / (n + number of states + 1)
    kept = np.prod([(1_000 + c) / (1_001 + c) for c in (2, 2, 2)])
    error = estimator.log_partition_std_error_.max()
    assert total == pytest.approx(kept, abs=0.01 + 3 * error)


def test_draws_have_the_states_and_values_of_the_rows(fitted):
    frame, drawn = people(1_200), fitted.sample(6_000, random_state=0)
    assert drawn.dtypes.equals(frame.dtypes)
    assert drawn.columns.equals(frame.columns)
    for states in ("region", "member"):
        own, known = drawn[states].value_counts(True), frame[states].value_counts(True)
        np.testing.assert_allclose(own.sort_index(), known.sort_index(), atol=0.05)
    assert drawn["age"].isna().mean() == pytest.approx(frame["age"].isna().mean(), abs=0.05)
    assert (drawn["amount"] == 0).mean() == pytest.approx((frame["amount"] == 0).mean(), abs=0.05)
    assert drawn["visits"].min() >= 0
    assert drawn["amount"].min() == 0  # an atom at the end is a bound
    if isinstance(fitted, OutlierDetector):  # whose views are wide
        return
    together = drawn.groupby("member")["age"].mean()
    # few continuous latent variables do not tell the two groups apart altogether
    tolerance = 3.0 if isinstance(fitted, ImplicitVAE) else 2.0
    assert together[True] - together[False] == pytest.approx(10.0, abs=tolerance)
    assert fitted.score(drawn) == pytest.approx(fitted.score(people(3_000, seed=5)), abs=0.3)


def test_steps_are_of_numbers_alone(nce):
    with pytest.raises(ValueError, match="n_steps=3 moves numbers only"):
        nce.sample(2, n_steps=3)


def test_draws_as_arrays(fitted):
    array = fitted.sample(20, random_state=3, output="array")
    frame = fitted.sample(20, random_state=3)
    assert array.shape == (20, 5)
    assert frame["region"].tolist() == array[:, 0].tolist()
    np.testing.assert_array_equal(frame["age"], array[:, 3].astype(float))
    with pytest.raises(ValueError, match="output='table'"):
        fitted.sample(2, output="table")


def test_complete_rows_may_be_asked_for(fitted):
    drawn = fitted.sample(3_000, random_state=0, complete=True)
    assert len(drawn) == 3_000
    assert drawn["age"].notna().all()
    # under the condition, not filled in: members say their age more often
    share = people(20_000, seed=7).dropna()["member"].mean()
    assert drawn["member"].mean() == pytest.approx(share, abs=0.05)
    frame = people(300).assign(rare=np.where(np.arange(300) < 1, 1.0, np.nan))
    never = NCEDensity(**QUICK | {"energy_model": None}).fit(frame.iloc[1:].assign(rare=np.nan))
    assert len(never.sample(5, random_state=0, complete=True)) == 5  # a column of nothing is none


@every_estimator
def test_numbers_of_arrays_lie_on_their_grid_and_within_their_bounds(Estimator):
    rng = np.random.default_rng(0)
    X = np.c_[rng.poisson(1.0, 500), np.round(rng.normal(size=500), 1), rng.normal(size=500)]
    estimator = quick(Estimator).fit(X)
    assert [c.step for c in estimator.columns_] == [1.0, 0.1, 0.0]
    drawn = estimator.sample(400, random_state=0)
    assert drawn.dtype == np.float64
    assert (drawn[:, 0] == np.round(drawn[:, 0])).all()
    assert drawn[:, 0].min() == 0
    assert (drawn[:, 1] == np.round(drawn[:, 1], 1)).all()
    assert len(np.unique(drawn[:, 2])) > 390


def test_a_column_of_few_values_on_no_grid_shows_no_others():
    rng = np.random.default_rng(0)
    ladder = np.exp(rng.normal(size=40))
    X = np.c_[rng.choice(ladder, 500), rng.normal(size=500)]
    drawn = NCEDensity(**QUICK).fit(X).sample(300, random_state=0)
    assert set(drawn[:, 0]) <= set(ladder)


def test_numbers_alone_are_what_they_were():
    frame = people(600)[["visits", "amount"]].assign(
        noise=np.random.default_rng(0).normal(size=600)
    )
    options = QUICK | {"atoms": "off"}
    scores = NCEDensity(**options).fit(frame).score_samples(frame)
    as_array = NCEDensity(**options).fit(frame.to_numpy()).score_samples(frame.to_numpy())
    np.testing.assert_array_equal(scores, as_array)


def test_one_row_scores_as_all_do(fitted):
    frame = people(40, seed=2)
    alone = [fitted.score_samples(frame.iloc[i : i + 1])[0] for i in range(40)]
    np.testing.assert_allclose(alone, fitted.score_samples(frame), atol=1e-7)


def test_units_change_no_label(fitted, fitted_again):
    frame = people(1_200)
    scaled = frame.assign(age=1e3 * frame["age"] - 7.0, amount=1e-4 * frame["amount"])
    other = clone(fitted)
    labels = other.fit_predict(scaled)
    np.testing.assert_allclose(
        other.decision_function(scaled), fitted.decision_function(frame), atol=1e-6
    )
    np.testing.assert_array_equal(other.predict(scaled), fitted.predict(frame))
    np.testing.assert_array_equal(labels, fitted_again[1])


@every_estimator
def test_labels_follow_the_contamination(Estimator):
    frame = people(800)
    labels = quick(Estimator, contamination=0.1).fit_predict(frame)
    assert (labels == -1).mean() == pytest.approx(0.1, abs=0.005)
    shares = [(labels[frame["age"].isna() == gone] == -1).mean() for gone in (False, True)]
    assert max(shares) < 0.2  # a missing cell is not odd for being one


def test_what_was_never_met_has_one_probability(nce):
    rows = people(3, seed=4)
    rows["region"] = rows["region"].astype(object)
    rows.loc[0, "region"] = "mars"
    rows.loc[1, "region"] = None
    with pytest.warns(UserWarning, match="'region' shows 'mars', which fit has not met"):
        scores = nce.score_samples(rows)
    assert scores.shape == (3,)
    moved = rows.copy()
    moved.loc[0, "region"] = "venus"
    with pytest.warns(UserWarning, match="'venus'"):
        np.testing.assert_array_equal(nce.score_samples(moved), scores)
    # it is that probability times the density of the other cells under the bases
    plain = rows.iloc[[0]].copy()
    total = []
    for region in ("west", "north", "east"):
        plain["region"] = region
        total.append(nce.base_score_samples(plain)[0])
    expected = np.logaddexp.reduce(total) + np.log(1 / 1_204) - np.log(1_203 / 1_204)
    assert scores[0] == pytest.approx(expected, abs=1e-8)


def test_a_missing_cell_that_was_never_met(nce):
    rows = people(2, seed=4).astype({"visits": float})
    rows.loc[0, "visits"] = np.nan
    with pytest.warns(UserWarning, match="'visits' shows a missing cell"):
        scores = nce.score_samples(rows)
    assert np.isfinite(scores).all()
    numbers = NCEDensity(**QUICK).fit(np.random.default_rng(0).normal(size=(300, 2)))
    with pytest.warns(UserWarning, match="column 1 shows a missing cell"):
        score = numbers.score_samples([[0.3, np.nan]])
    grid = np.c_[np.full(2_001, 0.3), np.linspace(-10, 10, 2_001)]
    total = np.exp(numbers.base_score_samples(grid)).sum() * 0.01 / 302
    assert score[0] == pytest.approx(np.log(total), abs=1e-3)


# ---------------------------------------------------------------- everything else


@pytest.mark.parametrize(
    "energy_model",
    [Network(max_epochs=2), LogisticRegression(), "trees of scikit-learn", None],
    ids=["network", "classifier", "trees", "base"],
)
def test_energies_of_all_kinds(energy_model):
    from sklearn.ensemble import HistGradientBoostingClassifier

    if isinstance(energy_model, str):
        energy_model = HistGradientBoostingClassifier(max_iter=10)
    frame = people(300)
    estimator = NCEDensity(**QUICK | {"energy_model": energy_model}).fit(frame)
    assert np.isfinite(estimator.score_samples(frame)).all()
    assert np.isfinite(estimator.log_partition_).all()


def test_a_module_sees_indicators_and_values():
    from torch import nn

    seen = []

    class Module(nn.Module):
        def __init__(self, n_features):
            super().__init__()
            seen.append(n_features)
            self.linear = nn.Linear(n_features, 1)

        def forward(self, z):
            assert not z.isnan().any()
            return self.linear(z)

    NCEDensity(**QUICK | {"energy_model": Network(Module, max_epochs=1)}).fit(people(300))
    # three regions, two of member, number or missing, number or zero, and three values
    assert set(seen) == {3 + 2 + 2 + 2 + 3}


def test_scores_of_numbers_alone(nce):
    gradient = nce.stein_score(people(20, seed=1))
    frame = people(20, seed=1)
    assert np.isnan(gradient[:, :2]).all()
    assert np.isfinite(gradient[:, 2]).all()
    np.testing.assert_array_equal(np.isnan(gradient[:, 3]), frame["age"].isna())
    np.testing.assert_array_equal(np.isnan(gradient[:, 4]), frame["amount"] == 0)


def test_stored_and_loaded(fitted):
    frame = people(50, seed=1)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.score_samples(frame), fitted.score_samples(frame))
    pd.testing.assert_frame_equal(again.sample(9, random_state=0), fitted.sample(9, random_state=0))
    skops = pytest.importorskip("skops.io")
    stored = skops.dumps(fitted)
    assert set(skops.get_untrusted_types(data=stored)) <= set(TRUSTED_TYPES)
    again = skops.loads(stored, trusted=TRUSTED_TYPES)
    np.testing.assert_array_equal(again.score_samples(frame), fitted.score_samples(frame))
    pd.testing.assert_frame_equal(again.sample(9, random_state=0), fitted.sample(9, random_state=0))


def test_equal_seeds_make_equal_fits(fitted, fitted_again):
    again, _ = fitted_again
    frame = people(50, seed=1)
    np.testing.assert_array_equal(again.score_samples(frame), fitted.score_samples(frame))


def test_searches_weights_and_groups():
    frame = people(300)
    search = GridSearchCV(NCEDensity(**QUICK), {"base": ["gmm", "gaussian"]}, cv=2).fit(frame)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    weight = np.random.default_rng(0).integers(0, 3, 300)
    estimator = NCEDensity(**QUICK).fit(frame, sample_weight=weight, groups=np.arange(300) // 3)
    assert len(estimator.out_of_fold_scores_) == (weight > 0).sum()


def test_copies_of_rows_are_kept_together():
    frame = people(300)
    twice = NCEDensity(**QUICK).fit(pd.concat([frame, frame], ignore_index=True))
    once = NCEDensity(**QUICK).fit(frame)
    assert twice.score(frame) == pytest.approx(once.score(frame), abs=0.3)
    members = twice.out_of_fold_members_
    # rows of categories and counts alone are equal by chance, too
    fine = frame["age"].notna() | (frame["amount"] > 0)
    np.testing.assert_array_equal(members[:300][fine], members[300:][fine])


@every_estimator
def test_in_a_pipeline_of_columns(Estimator):
    frame = people(300)
    scaled = ColumnTransformer(
        [("scale", StandardScaler(), ["age", "amount"])], remainder="passthrough",
        verbose_feature_names_out=False,
    ).set_output(transform="pandas")  # fmt: skip
    pipeline = make_pipeline(scaled, quick(Estimator)).fit(frame)
    assert np.isfinite(pipeline.score_samples(frame)).all()
    assert [c.kind for c in pipeline[-1].columns_].count("category") == 2


def test_a_table_of_categories_alone():
    frame = people(500)[["region", "member"]]
    estimator = NCEDensity(n_members=2, random_state=0).fit(frame)
    cells = pd.DataFrame(
        list(product(["west", "north", "east"], [False, True])), columns=["region", "member"]
    )
    masses = np.exp(estimator.score_samples(cells))
    shares = [((frame == row).all(axis=1)).mean() for _, row in cells.iterrows()]
    np.testing.assert_allclose(masses, shares, atol=0.03)
    assert masses.sum() == pytest.approx(503 / 504 * 502 / 503, abs=0.01)
    assert list(estimator.sample(4, random_state=0)) == ["region", "member"]


densities = pytest.mark.parametrize("Estimator", [e for e in SETTINGS if e is not OutlierDetector])


@densities
def test_a_warm_start_begins_anew(Estimator):
    network = {"energy_model": Network(max_epochs=1)} if Estimator is NCEDensity else {}
    estimator = quick(Estimator, **network, warm_start=True)
    frame = people(200)
    estimator.fit(frame)
    with pytest.warns(UserWarning, match="only tables of numbers go on"):
        estimator.fit(frame)


@every_estimator
def test_all_missing_and_constant_columns(Estimator):
    frame = people(300).assign(nothing=np.nan, same="a")
    estimator = quick(Estimator).fit(frame)
    assert [c.kind for c in estimator.columns_][-2:] == ["constant", "constant"]
    drawn = estimator.sample(5, random_state=0)
    assert drawn["nothing"].isna().all()
    assert (drawn["same"] == "a").all()
    rows = frame.iloc[:2].copy()
    rows.loc[0, "nothing"] = 3.0
    with pytest.warns(UserWarning, match="'nothing' was constant in fit"):
        scores = estimator.score_samples(rows)
    assert scores[0] < estimator.score_samples(frame.iloc[:1])[0] - 5


def test_many_sets_of_values_are_told():
    rng = np.random.default_rng(0)
    X = rng.multivariate_normal(np.zeros(6), 0.5 + 0.5 * np.eye(6), 600)
    X[rng.random(X.shape) < 0.3] = np.nan
    estimator = NCEDensity(**QUICK).fit(X)
    assert "diagonal covariances, because rows have values in" in estimator.summary()
    assert "diagonal" not in NCEDensity(**QUICK).fit(people(200)).summary()


def test_text_that_is_not_named_says_what_to_do():
    frame = people(60)[["region", "age"]].astype({"region": object})
    with pytest.raises(ValueError, match="'region' is taken for numbers, .*categorical_features"):
        NCEDensity(**QUICK, categorical_features=None).fit(frame)
    with pytest.raises(ValueError, match="'region' holds text .*NCEDensity"):
        AdversarialEBM().fit(frame)


def test_lists_of_rows():
    cells = people(200)[["region", "age", "visits"]].astype(object).to_numpy()
    estimator = NCEDensity(**QUICK, categorical_features=[0]).fit(cells.tolist())
    assert [c.kind for c in estimator.columns_] == ["category", "number", "number"]
    expected = estimator.score_samples(cells)
    np.testing.assert_array_equal(estimator.score_samples(cells.tolist()), expected)


def test_scores_in_few_columns_are_not_smoothed_over_states():
    frame = people(300)[["region", "visits"]]
    estimator = NCEDensity(n_members=2, energy_model=None, random_state=0).fit(frame)
    gradient = estimator.stein_score(frame)
    assert np.isnan(gradient[:, 0]).all()
    step = 1e-5
    up, down = (frame.assign(visits=frame["visits"] + h) for h in (step, -step))
    slope = (estimator.score_samples(up) - estimator.score_samples(down)) / (2 * step)
    np.testing.assert_allclose(gradient[:, 1], slope, atol=1e-3)
    with pytest.raises(ValueError, match="all of numbers alone"):
        estimator.stein_score(frame, smoothing=0.1)
