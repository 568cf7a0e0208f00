"""ImplicitVAE of tables with categories, missing cells and atoms, against what is known exactly."""

import pickle
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp
from scipy.stats import chi2, norm
from sklearn.pipeline import make_pipeline
from torch import nn

pd = pytest.importorskip("pandas")

from skebm import TRUSTED_TYPES, ImplicitVAE
from skebm.datasets import LatentClasses, ZeroInflatedAmounts

QUICK = {
    "encoder": "gaussian", "hidden_layer_sizes": (16,), "max_epochs": 20, "learning_rate": 0.01,
    "random_state": 0,
}  # fmt: skip

SLOPES = {"height": 1.5, "weight": 1.0, "member": 2.0, "missing": -1.5}


def vae(**options):
    return ImplicitVAE(**QUICK | options)


@cache
def one_factor(n=1_500, seed=0):
    """All is linear in one z: two numbers, one with holes, and the logit of a yes or no."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    height = SLOPES["height"] * z + rng.normal(size=n)
    weight = SLOPES["weight"] * z + 0.7 * rng.normal(size=n)
    weight[rng.random(n) < expit(SLOPES["missing"] * z - 1.0)] = np.nan
    member = rng.random(n) < expit(SLOPES["member"] * z)
    return pd.DataFrame({"height": height, "weight": weight, "member": member})


def log_density_of_one_factor(frame):
    """The same by quadrature over z."""
    z, width = np.linspace(-8, 8, 801, retstep=True)
    height, weight = (frame[name].to_numpy()[:, None] for name in ("height", "weight"))
    missing = expit(SLOPES["missing"] * z - 1.0)
    with_weight = np.log1p(-missing) + norm.logpdf(weight, SLOPES["weight"] * z, 0.7)
    logs = norm.logpdf(z) + norm.logpdf(height, SLOPES["height"] * z)
    logs = logs + np.where(np.isnan(weight), np.log(missing), with_weight)
    sign = np.where(frame["member"], 1.0, -1.0)[:, None]
    return logsumexp(logs + np.log(expit(sign * SLOPES["member"] * z)), axis=1) + np.log(width)


def middles(low, high, n):
    """Middles of n intervals, and their width."""
    width = (high - low) / n
    return low + width * (np.arange(n) + 0.5), width


@cache
def fitted():
    return vae(max_epochs=30).fit(one_factor())


@cache
def of_classes():
    return vae(n_importance_samples=50).fit(LatentClasses().sample(800, 0))


# ---------------------------------------------------------------- the density


@pytest.mark.parametrize("encoder", ["gaussian", "implicit", "stein"])
def test_the_density_of_a_known_factor_is_found(encoder):
    new = one_factor(1_000, seed=1)
    estimator = vae(encoder=encoder, n_components=1, patience=None).fit(one_factor())
    truth = log_density_of_one_factor(new).mean()
    states = 3 * np.log(1_502 / 1_503)  # what each column keeps for what it has not shown
    short = truth + states - estimator.score(new)
    assert -0.02 < short < 0.05
    start = vae(n_components=1, max_epochs=0).fit(one_factor())
    assert truth - start.score(new) > 2 * short  # nor is that the start


def test_latent_classes_are_nearly_found():
    truth = LatentClasses()
    new = truth.sample(1_000, random_state=1)
    exact = truth.log_density(new).mean()
    estimator = vae(hidden_layer_sizes=(32,), max_epochs=40).fit(truth.sample(2_000, 0))
    assert exact - 0.2 < estimator.score(new) < exact + 0.02
    # independent columns, each known exactly, are worse
    alone = sum(truth.log_marginal(new[[name]]) for name in truth.columns)
    assert alone.mean() < exact - 0.5


def test_the_density_sums_and_integrates_to_one():
    estimator = fitted()
    heights, weights = np.linspace(-9, 9, 61), np.linspace(-8, 8, 61)
    total = variance = 0.0
    for member, has_weight in product((False, True), repeat=2):
        height, weight = np.meshgrid(heights, weights if has_weight else [np.nan])
        rows = pd.DataFrame({"height": height.ravel(), "weight": weight.ravel(), "member": member})
        cell = (heights[1] - heights[0]) * (weights[1] - weights[0] if has_weight else 1.0)
        value, error = estimator.score_samples(rows, return_std=True)
        total += np.exp(value).sum() * cell
        variance += np.square(np.exp(value) * cell * error).sum()
    kept = (1_501 / 1_502) * (1_502 / 1_503) ** 2
    assert total == pytest.approx(kept, abs=4 * np.sqrt(variance) + 1e-4)
    assert np.sqrt(variance) < 5e-3


def test_draws_and_density_agree():
    frame = LatentClasses().sample(800, 0)[["colour", "member"]]
    estimator = vae(n_importance_samples=20_000).fit(frame)
    cells = pd.DataFrame(
        list(product(["blue", "green", "red", None], [False, True])), columns=["colour", "member"]
    )
    masses, error = estimator.score_samples(cells, return_std=True)
    masses = np.exp(masses)
    assert masses.sum() == pytest.approx(804 / 805 * 802 / 803, abs=4 * error.max())
    drawn = estimator.sample(20_000, random_state=0)
    counts = drawn.value_counts(dropna=False)
    keys = [(np.nan if c is None else c, m) for c, m in cells.itertuples(index=False)]
    counts = np.array([counts.get(key, 0) for key in keys])
    assert counts.sum() == 20_000
    expected = 20_000 * masses / masses.sum()
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, len(cells) - 1)


def test_values_of_draws_have_the_density():
    """The mean log-density of draws is the integral of p log p."""
    frame = one_factor()[["weight"]].assign(other=one_factor()["member"])
    estimator = vae(max_epochs=10).fit(frame)
    drawn = estimator.sample(4_000, random_state=0)
    scores = estimator.score_samples(drawn)
    grid = np.linspace(-8, 8, 161)
    integral = 0.0
    for other, weight in product((False, True), (grid, [np.nan])):
        rows = pd.DataFrame({"weight": weight, "other": other})
        value = estimator.score_samples(rows)
        integral += (np.exp(value) * value).sum() * (0.1 if len(weight) > 1 else 1.0)
    assert abs(scores.mean() - integral) < 4 * scores.std() / np.sqrt(4_000) + 0.01


# ---------------------------------------------------------------- what is not known


def test_an_unknown_cell_is_summed_out():
    estimator = of_classes()
    rows = LatentClasses().sample(20, 1)
    rows["colour"] = rows["colour"].astype(object)
    every = []
    for colour in ("blue", "green", "red", None):
        rows["colour"] = colour
        every.append(estimator.score_samples(rows, return_std=True))
    values, errors = np.swapaxes(every, 0, 1)
    rows["colour"] = "mauve"
    with pytest.warns(UserWarning, match="'colour' shows 'mauve'"):
        found, error = estimator.score_samples(rows, return_std=True)
    # 800 rows show four states of this column
    expected = logsumexp(values, axis=0) - np.log(804 / 805) + np.log(1 / 805)
    room = np.sqrt(error**2 + np.square(errors).max(axis=0))
    assert (np.abs(found - expected) < 4 * room).all()


def test_a_hole_where_fit_met_none_is_integrated_out():
    X = one_factor()[["height"]].assign(other=one_factor()["weight"]).dropna().to_numpy()
    estimator = vae(max_epochs=5).fit(X)
    assert not estimator.columns_[1].missing
    grid, width = np.linspace(-8, 8, 161, retstep=True)
    value, errors = estimator.score_samples(np.c_[np.full(161, 0.3), grid], return_std=True)
    with pytest.warns(UserWarning, match="column 1 shows a missing cell"):
        found, error = estimator.score_samples([[0.3, np.nan]], return_std=True)
    expected = logsumexp(value) + np.log(width) - np.log(len(X) + 2)
    assert abs(found[0] - expected) < 4 * (error[0] + errors.max()) + 1e-3
    with pytest.warns(UserWarning, match="a missing cell"):
        assert np.isfinite(estimator.transform([[0.3, np.nan], [np.nan, np.nan]])).all()


def test_rows_do_not_depend_on_their_batch():
    rows = LatentClasses().sample(30, 1)
    estimator = of_classes()
    together = estimator.score_samples(rows)
    alone = [estimator.score_samples(rows.iloc[i : i + 1])[0] for i in range(10)]
    # networks are in single precision, and their products round by how many rows there are
    np.testing.assert_allclose(alone, together[:10], atol=3e-5)
    np.testing.assert_allclose(estimator.score_samples(rows[::-1])[::-1], together, atol=3e-5)


# ---------------------------------------------------------------- the transformer


def test_reconstructions_are_rows_like_the_table():
    frame = LatentClasses().sample(500, 2)
    estimator = of_classes()
    back = estimator.reconstruct(frame)
    assert back.dtypes.equals(frame.dtypes)
    assert back.columns.equals(frame.columns)
    assert back["visits"].min() >= 0
    right = (back["colour"].astype(object) == frame["colour"].astype(object)).mean()
    assert right > frame["colour"].value_counts(normalize=True).max() + 0.05
    error = (back["height"] - frame["height"]).std()
    assert error < 0.7 * frame["height"].std()
    pd.testing.assert_frame_equal(estimator.reconstruct(frame.head(7)), back.head(7))


def test_inverse_transform_has_the_likeliest_state_and_the_mean():
    """As draws of p(x | z) say."""
    estimator = fitted()
    z = np.random.default_rng(0).normal(size=(6, estimator.n_components_))
    back = estimator.inverse_transform(z)
    assert isinstance(back, pd.DataFrame)
    model = estimator.model_
    rng = torch.Generator().manual_seed(0)
    for i, row in back.iterrows():
        output = model.decoder(torch.as_tensor(z[i : i + 1]).expand(4_000, -1))
        drawn = estimator._columns.restore(model.likelihood.sample(output, rng).numpy())
        height, weight, member = drawn.T
        shares = member.mean(), np.isnan(weight).mean()
        if abs(shares[0] - 0.5) > 0.05:
            assert row["member"] == (shares[0] > 0.5)
        if abs(shares[1] - 0.5) > 0.05:
            assert np.isnan(row["weight"]) == (shares[1] > 0.5)
        assert row["height"] == pytest.approx(height.mean(), abs=4 * height.std() / np.sqrt(4_000))
        if not np.isnan(row["weight"]):
            there = weight[~np.isnan(weight)]
            room = 4 * there.std() / np.sqrt(len(there))
            assert row["weight"] == pytest.approx(there.mean(), abs=room)


def test_arrays_give_arrays():
    X = one_factor()[["height", "weight"]].to_numpy()
    estimator = vae(max_epochs=2).fit(X)
    back, drawn = estimator.reconstruct(X[:50]), estimator.sample(300, random_state=0)
    assert back.dtype == drawn.dtype == np.float64
    assert np.isfinite(back[:, 0]).all()
    assert 0.1 < np.isnan(drawn[:, 1]).mean() < 0.5
    objects = one_factor().astype(object).to_numpy()
    estimator = vae(max_epochs=2, categorical_features=[2]).fit(objects)
    assert set(estimator.reconstruct(objects[:50])[:, 2]) <= {False, True}


def test_polars_tables_come_back():
    pl = pytest.importorskip("polars")
    counts = np.random.default_rng(0).poisson(3, 400)
    frame = pl.DataFrame({
        "kind": pl.Series(np.where(counts > 3, "many", "few")), "count": pl.Series(counts),
    })  # fmt: skip
    estimator = vae(max_epochs=5).fit(frame)
    back = estimator.reconstruct(frame)
    assert back.schema == frame.schema
    as_array = vae(max_epochs=5, categorical_features=[0]).fit(frame.to_numpy())
    means = as_array.reconstruct(frame.to_numpy())[:, 1].astype(float)
    assert (means != np.round(means)).all()
    np.testing.assert_array_equal(back["count"], np.round(means))


def test_small_integers_stay_in_their_dtype():
    rng = np.random.default_rng(0)
    counts = rng.integers(2, 200, 400).astype("uint8")
    frame = pd.DataFrame({"kind": rng.choice(["a", "b"], 400), "number": counts})
    estimator = vae(max_epochs=0, n_components=1).fit(frame)
    assert estimator.columns_[1].bounds[0] == -np.inf
    assert estimator.sample(2_000, random_state=0, output="array")[:, 1].min() < -5
    drawn = estimator.sample(2_000, random_state=0)["number"]
    assert drawn.dtype == "uint8"
    # those beyond are at the ends: none has gone round to the other one
    assert (drawn == 0).mean() == pytest.approx((drawn < 5).mean(), abs=0.03)
    low = estimator.inverse_transform([[-30.0], [30.0]])["number"]
    assert low.min() == 0


def test_one_of_the_rare_categories_is_the_most_frequent_one():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"street": rng.choice(list("abcde"), 500, p=[0.1, 0.1, 0.1, 0.25, 0.45]),
                          "size": rng.normal(size=500)})  # fmt: skip
    estimator = vae(max_epochs=1, max_categories=2).fit(frame)
    assert len(estimator.columns_[0].pooled) == 4
    assert set(estimator.reconstruct(frame)["street"]) <= {"e", "d"}


def test_in_a_pipeline_whose_output_is_a_frame():
    frame = one_factor()
    estimator = vae(max_epochs=1, n_components=2).set_output(transform="pandas")
    pipeline = make_pipeline(estimator).fit(frame)
    z = pipeline.transform(frame)
    assert list(z.columns) == ["implicitvae0", "implicitvae1"]
    assert np.isfinite(z.to_numpy()).all()
    assert pipeline.inverse_transform(z).dtypes.equals(frame.dtypes)


# ---------------------------------------------------------------- everything else


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_atoms_under_both_likelihoods(likelihood):
    """A share that is 0 or 1 for many has masses there, and a density in between."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=1_200)
    share = (0.5 + 0.4 * z + 0.2 * rng.normal(size=1_200)).clip(0, 1)
    other = z + rng.normal(size=1_200)
    X = np.c_[share, other if likelihood == "gaussian" else expit(other)]
    estimator = vae(likelihood=likelihood, n_components=1).fit(X)
    assert estimator.columns_[0].atoms == (0.0, 1.0)
    drawn = estimator.sample(4_000, random_state=0)
    ends = {"gaussian": [(-1.5, 2.5), (-6.0, 6.0)], "bernoulli": [(0.0, 1.0), (0.0, 1.0)]}
    (between, width), (others, cell) = (middles(*pair, 40) for pair in ends[likelihood])
    total = 0.0
    for shares, weight in ([0.0], 1.0), ([1.0], 1.0), (between, width):
        rows = np.stack(np.meshgrid(shares, others), axis=-1).reshape(-1, 2)
        mass = np.exp(estimator.score_samples(rows)).sum() * weight * cell
        if len(shares) == 1:
            assert mass == pytest.approx((X[:, 0] == shares[0]).mean(), abs=0.03)
            assert mass == pytest.approx((drawn[:, 0] == shares[0]).mean(), abs=0.03)
        total += mass
    assert total == pytest.approx(1.0, abs=0.01)


def test_zero_inflated_amounts():
    truth = ZeroInflatedAmounts()
    frame = truth.sample(1_000, random_state=0)
    drawn = vae().fit(frame).sample(4_000, random_state=0)
    for segment, share in zip(("basic", "plus", "premium"), truth.zero_shares, strict=True):
        own = drawn.loc[drawn["segment"] == segment, "amount"] == 0
        assert own.mean() == pytest.approx(share, abs=0.1)


def test_modules_of_users_see_indicators_and_values():
    sizes = []

    def network(n_inputs, n_outputs):
        sizes.append((n_inputs, n_outputs))
        return nn.Linear(n_inputs, n_outputs)

    frame = one_factor()
    estimator = vae(n_components=2, encoder_model=network, decoder_model=network, max_epochs=3).fit(
        frame
    )
    # two values, a number or missing, no or yes
    assert set(sizes) == {(2, 6), (6, 4)}
    assert np.isfinite(estimator.score_samples(frame)).all()


def test_weights_and_groups():
    frame = one_factor()
    weight = np.random.default_rng(0).integers(0, 3, len(frame))
    groups = np.arange(len(frame)) // 3
    estimator = vae(max_epochs=1).fit(frame, sample_weight=weight, groups=groups)
    held = ~np.isnan(estimator.out_of_fold_scores_)
    assert len(held) == (weight > 0).sum()
    used = frame[weight > 0]
    np.testing.assert_allclose(
        estimator.out_of_fold_scores_[held], estimator.score_samples(used[held]), atol=1e-9
    )
    expected = np.average(estimator.out_of_fold_scores_[held], weights=weight[weight > 0][held])
    assert estimator.history_["held_out_log_likelihood"][0] < expected + 1.0


def test_noise_variance_is_in_the_units_of_the_columns():
    frame = one_factor()
    scaled = frame.assign(weight=100 * frame["weight"] + 5)
    variance, other = (vae(max_epochs=2).fit(f).noise_variance_ for f in (frame, scaled))
    np.testing.assert_allclose(other, variance * [1, 1e4, 1], rtol=1e-4)
    assert (variance[:2] > 0.05).all()
    assert variance[2] == 0  # of a column without numbers


def test_stored_and_loaded():
    estimator, frame = fitted(), one_factor(50, seed=1)
    again = pickle.loads(pickle.dumps(estimator))
    skops = pytest.importorskip("skops.io")
    other = skops.loads(skops.dumps(estimator), trusted=TRUSTED_TYPES)
    for copy in (again, other):
        np.testing.assert_array_equal(copy.score_samples(frame), estimator.score_samples(frame))
        pd.testing.assert_frame_equal(copy.reconstruct(frame), estimator.reconstruct(frame))
