"""ImplicitVAE: its density, its transformer and its fit, against what is known exactly."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FactorAnalysis
from skorch.callbacks import Callback
from torch import nn

from skebm import ImplicitVAE
from skebm.datasets import make_two_moons
from skebm.exceptions import DivergenceError
from skebm.latents import FactorModel

QUICK = {"hidden_layer_sizes": (16,), "max_epochs": 3, "random_state": 0}
kinds = pytest.mark.parametrize("encoder", ["gaussian", "implicit", "stein"])


def vae(**options):
    return ImplicitVAE(**QUICK | options)


@cache
def moons(n=400, seed=0):
    return make_two_moons(n, random_state=seed)


@cache
def linear_rows(n=2000, d=5, k=2, seed=0):
    """Probabilistic principal components: a rotated pancake."""
    rng = np.random.default_rng(1)
    loadings = rng.normal(size=(d, k))
    center = 10 * rng.normal(size=d)
    rng = np.random.default_rng(seed)
    return center + rng.normal(size=(n, k)) @ loadings.T + 0.5 * rng.normal(size=(n, d))


WEIGHT = 0.5 + np.arange(400) % 3


@cache
def fitted(**options):
    return vae(**options).fit(moons())


@cache
def at_start(encoder="implicit"):
    """Factor analysis, as an estimator."""
    estimator = vae(n_components=2, max_epochs=0, encoder=encoder)
    return estimator.fit(linear_rows(400), sample_weight=WEIGHT)


def factors_of(estimator):
    """The linear model that a fit without training is."""
    model = estimator.model_
    return FactorModel(model.decoder.bias, model.decoder.weight, model.likelihood.variance)


def standardized(X):
    """As documented: median, and interquartile range / 1.349 (of the rows fitted, weighted)."""
    columns = at_start()._columns
    center, scale = columns.center, columns.scale
    repeated = np.repeat(linear_rows(400), (2 * WEIGHT).astype(int), axis=0)
    low, median, high = np.quantile(repeated, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(center, median, atol=0.02)
    np.testing.assert_allclose(scale, (high - low) / 1.349, rtol=0.02)
    return torch.as_tensor((X - center) / scale), center, scale


# ---------------------------------------------------------------------- the start


@pytest.mark.parametrize("encoder", ["implicit", "gaussian"])
def test_log_density_at_the_start_is_exact_within_its_error(encoder):
    estimator, X = at_start(encoder), linear_rows(300, seed=5)
    x, _, scale = standardized(X)
    exact = factors_of(estimator).log_prob(x).numpy() - np.log(scale).sum()
    value, error = estimator.score_samples(X, return_std=True)
    z = (value - exact) / error
    assert np.abs(z).max() < stats.norm.isf(1e-4 / len(z))
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    # draws of the two parts of the proposal come in fixed numbers: the stated errors are too large
    assert 0.5 < z.std() < 1 + 4 / np.sqrt(2 * len(z))
    assert error.max() < 0.1


@pytest.mark.parametrize("encoder", ["implicit", "gaussian"])
def test_transformer_at_the_start_is_the_exact_posterior(encoder):
    estimator, X = at_start(encoder), linear_rows(50, seed=5)
    x, center, scale = standardized(X)
    factors = factors_of(estimator)
    # dense algebra, whatever the axes
    covariance = factors.loadings @ factors.loadings.mT + factors.variance.diag()
    gain = factors.loadings.mT @ torch.linalg.inv(covariance)
    z = (x - factors.center) @ gain.mT
    np.testing.assert_allclose(estimator.transform(X), z, atol=1e-4)
    means = (z @ factors.loadings.mT + factors.center).numpy() * scale + center
    np.testing.assert_allclose(estimator.reconstruct(X), means, atol=1e-4)
    np.testing.assert_allclose(estimator.inverse_transform(z.numpy()), means, atol=1e-8)


def test_noise_variance_is_in_the_units_of_the_columns():
    estimator = vae(n_components=2, max_epochs=0, validation_fraction=0.01).fit(linear_rows())
    # .25 in all columns; the error of a variance of 2000 rows, with room for the loadings
    np.testing.assert_allclose(estimator.noise_variance_, 0.25, rtol=6 * np.sqrt(2 / 2000))


def test_errors_fall_with_the_draws():
    estimator, X = copy.deepcopy(at_start()), linear_rows(100, seed=5)
    few, many = (
        estimator.set_params(n_importance_samples=n).score_samples(X, return_std=True)[1]
        for n in (125, 2000)
    )
    assert 3.3 < np.median(few / many) < 4.7


# ---------------------------------------------------------------------- what is learned


@kinds
def test_linear_data(encoder):
    # without early stopping, which would fall back on the start: factor analysis itself
    X, new = linear_rows(), linear_rows(1000, seed=7)
    estimator = vae(
        n_components=2, encoder=encoder, max_epochs=10, patience=None, n_importance_samples=100,
    ).fit(X)  # fmt: skip
    assert estimator.n_iter_ == 10
    best = FactorAnalysis(2).fit(X).score(new)
    short = best - estimator.score(new)
    assert short < (0.05 if encoder == "stein" else 0.02)
    assert short > -0.02  # nor better than the truth


@pytest.mark.parametrize("encoder", ["gaussian", "implicit"])
def test_linear_decoder_from_random_weights(encoder):
    # nothing of factor analysis is in this start: what is right here has been learned
    X, new = linear_rows(1000), linear_rows(500, seed=7)
    options = {"n_components": 2, "decoder_model": nn.Linear, "n_importance_samples": 100}
    start = vae(**options, max_epochs=0).fit(X)
    options |= {"encoder": encoder, "learning_rate": 0.01, "patience": None}
    estimator = vae(**options, max_epochs=80).fit(X)
    best = FactorAnalysis(2).fit(X).score(new)
    assert start.score(new) < best - 1.0
    assert abs(best - estimator.score(new)) < 0.02
    # the encoder is the posterior of what was learned, N(mean, covariance)
    model = estimator.model_
    weight, bias = model.decoder.module.weight.numpy(), model.decoder.module.bias.numpy()
    scaled = weight.T / model.likelihood.variance.numpy()
    covariance = np.linalg.inv(np.eye(2) + scaled @ weight)
    low, center, high = np.quantile(X, [0.25, 0.5, 0.75], axis=0)
    x = (new - center) / ((high - low) / 1.349)
    mean = (x - bias) @ (covariance @ scaled).T
    with torch.no_grad():
        noise = model.encoder.noise(500, rng=torch.Generator().manual_seed(0), dtype=torch.float64)
        found_mean, found = model.encoder.moments(torch.as_tensor(x), noise)
    found_mean, found = found_mean.numpy(), found.numpy()
    # divergence of normal distributions with these moments: of diagonal ones at least `least`
    precision = np.linalg.inv(covariance)
    off = found_mean - mean
    divergence = 0.5 * (
        np.trace(precision @ found, axis1=1, axis2=2) - 2.0 + ((off @ precision) * off).sum(1)
        + np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(found)[1]
    )  # fmt: skip
    least = 0.5 * (np.log(np.diag(precision)).sum() + np.linalg.slogdet(covariance)[1])
    assert divergence.mean() < (least if encoder == "gaussian" else 0.0) + 0.03


def test_errors_of_a_trained_fit_are_those_of_repetitions():
    estimator = copy.deepcopy(learned("implicit"))
    X, values, errors = moons(30, seed=5), [], []
    for seed in range(60):
        estimator._seed = seed  # of the noise of the rows
        value, error = estimator.score_samples(X, return_std=True)
        values.append(value)
        errors.append(error)
    ratio = np.std(values, axis=0) / np.sqrt(np.mean(np.square(errors), axis=0))
    # too large where the fixed numbers of draws from either part help; never much too small
    assert 0.5 < np.median(ratio) < 1.1
    assert ratio.max() < 1.6


@pytest.mark.parametrize("rows", [moons, linear_rows])
def test_never_below_the_start(rows):
    # at a rate at which 180 rows are soon overfitted
    options = {"max_epochs": 60, "learning_rate": 0.01, "n_components": 2, "encoder": "gaussian",
               "n_importance_samples": 50}  # fmt: skip
    new, n_fits = rows(1000, seed=99), 4

    def gain(seed, **late):
        X = rows(200, seed=seed)
        start = vae(**options | {"max_epochs": 0}).fit(X)
        trained = vae(**options | late).fit(X)
        # a fit that falls back on its start is that start
        return (
            0.0 * new[:, 0]
            if not trained.n_iter_
            else (trained.score_samples(new) - start.score_samples(new))
        )

    gains = np.array([gain(seed) for seed in range(n_fits)])
    # it is decided on 20 rows, so that it may err by what 20 rows can tell
    spread = gains.std(axis=1).max()
    assert gains.mean() >= -2 * spread / np.sqrt(20 * n_fits)
    if rows is linear_rows:
        overfitted = gain(0, max_epochs=300, patience=None)
        assert overfitted.mean() < -4 * overfitted.std() / np.sqrt(len(new))


def learned(encoder, max_epochs=40):
    return fitted(n_components=2, encoder=encoder, max_epochs=max_epochs, learning_rate=0.01,
                  n_importance_samples=100)  # fmt: skip


@kinds
def test_training_learns_two_moons(encoder):
    new = moons(1000, seed=3)
    start = learned(encoder, max_epochs=0)
    gain = learned(encoder).score_samples(new) - start.score_samples(new)
    assert gain.mean() - 4 * gain.std() / np.sqrt(len(gain)) > 0


@cache
def grid(low, high, n):
    """Cell centres, (n^2, 2), and the area of a cell."""
    edges = np.linspace(low, high, n + 1)
    t = 0.5 * (edges[1:] + edges[:-1])
    return np.stack(np.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2), (t[1] - t[0]) ** 2


def test_samples_of_a_linear_model():
    estimator = at_start()
    drawn = estimator.sample(20_000, random_state=1)
    factors = factors_of(estimator)
    _, center, scale = standardized(drawn)
    covariance = (factors.loadings @ factors.loadings.mT + factors.variance.diag()).numpy()
    white = np.linalg.solve(np.linalg.cholesky(covariance),
                            ((drawn - center) / scale - factors.center.numpy()).T)  # fmt: skip
    for column in white:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    off = np.corrcoef(white) - np.eye(5)
    assert np.abs(off).max() < 4.5 / np.sqrt(20_000)
    np.testing.assert_array_equal(drawn[:5], estimator.sample(20_000, random_state=1)[:5])
    # more rows than are decoded at once, and none of them comes twice
    assert len(np.unique(drawn, axis=0)) == 20_000


# ---------------------------------------------------------------------- units and columns


def test_units_of_the_columns():
    # powers of two and no offset change no bit of the standardised columns
    scale = np.array([4.0, 0.125])
    plain, scaled = fitted(n_components=2), vae(n_components=2).fit(moons() * scale)
    new = moons(100, seed=2)
    np.testing.assert_allclose(scaled.transform(new * scale), plain.transform(new), atol=1e-9)
    np.testing.assert_allclose(
        scaled.reconstruct(new * scale), plain.reconstruct(new) * scale, rtol=1e-9
    )
    np.testing.assert_allclose(scaled.noise_variance_, plain.noise_variance_ * scale**2, rtol=1e-9)


@pytest.mark.parametrize(("scale", "offset"), [(1e5, 3e6), (1e-5, 2.0), (3.0, -7.0)])
def test_scales_and_offsets_at_the_start(scale, offset):
    options = {"n_components": 2, "max_epochs": 0}
    plain, moved = fitted(**options), vae(**options).fit(scale * moons() + offset)
    new = moons(100, seed=2)
    value, error = moved.score_samples(scale * new + offset, return_std=True)
    # the offset costs digits of the rows, so that other draws are made
    expected, other = plain.score_samples(new, return_std=True)
    assert (np.abs(value + 2 * np.log(scale) - expected) < 5 * np.hypot(error, other)).all()
    np.testing.assert_allclose(
        moved.reconstruct(scale * new + offset), scale * plain.reconstruct(new) + offset,
        atol=1e-4 * scale,
    )  # fmt: skip


def test_constant_columns():
    X = np.insert(moons(), 1, 3.0, axis=1)
    estimator, plain = vae(n_components=2).fit(X), fitted(n_components=2)
    drawn = estimator.sample(10, random_state=0)
    for rows in (drawn, estimator.reconstruct(X[:5]), estimator.inverse_transform(np.eye(2))):
        assert rows.shape[1] == 3
        assert (rows[:, 1] == 3.0).all()
    np.testing.assert_array_equal(drawn[:, [0, 2]], plain.sample(10, random_state=0))
    np.testing.assert_array_equal(estimator.noise_variance_[[0, 2]], plain.noise_variance_)
    assert estimator.noise_variance_[1] == 0
    np.testing.assert_array_equal(estimator.transform(X[:5]), plain.transform(moons()[:5]))
    X[:, 1] = 3.1
    with pytest.warns(UserWarning, match="column 1 was constant in fit"):
        value, error = estimator.score_samples(X[:4], return_std=True)
    expected, same = plain.score_samples(moons()[:4], return_std=True)
    np.testing.assert_allclose(value, expected - np.log(402), atol=1e-9)
    np.testing.assert_array_equal(error, same)


@pytest.mark.filterwarnings("error", "ignore:training ended at its limit")  # of three epochs
@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_few_rows(n):
    estimator = vae().fit(linear_rows(n, d=3))
    value, error = estimator.score_samples(linear_rows(20, d=3), return_std=True)
    assert np.isfinite(value).all()
    assert np.isfinite(error).all()
    assert np.isfinite(estimator.offset_)
    assert np.isfinite(estimator.transform(linear_rows(n, d=3))).all()


@pytest.mark.parametrize("kind", ["one column", "wide", "many components", "collinear", "rare"])
def test_shapes(kind):
    options = {}
    X = linear_rows(60)
    if kind == "one column":
        X = X[:, :1]
    elif kind == "wide":
        X = linear_rows(15, d=30)
    elif kind == "many components":
        options["n_components"] = 9
    elif kind == "collinear":
        X = np.c_[X, X[:, :1] - X[:, 1:2]]
    else:  # a column that only one row differs in
        X = np.c_[X, np.arange(60) == 7]
    estimator = vae(**options).fit(X)
    d = X.shape[1]
    assert estimator.n_components_ == options.get("n_components", estimator.n_components_)
    assert estimator.transform(X).shape == (len(X), estimator.n_components_)
    assert estimator.n_components_ >= min(4, d)
    value, error = estimator.score_samples(X, return_std=True)
    assert np.isfinite(value).all()
    assert np.isfinite(error).all()
    assert estimator.sample(7, random_state=0).shape == estimator.reconstruct(X[:7]).shape == (7, d)
    assert np.isfinite(estimator.reconstruct(X)).all()


def test_rows_far_out():
    # outliers, whatever the scale: low, and no error
    estimator = fitted(n_components=2)
    far = np.array([1e4, 1e8, 1e160, 1e300])
    X = np.r_[np.c_[far, 0 * far], np.c_[0 * far, -far], [[0.0, 0.5]]]
    value = estimator.score_samples(X)
    assert (value[:-1] < -1e6).all()
    assert value[-1] == pytest.approx(estimator.score_samples(X[-1:])[0], abs=1e-9)
    assert (estimator.predict(X[:-1]) == -1).all()


# ---------------------------------------------------------------------- batches, seeds, threads


def test_rows_do_not_depend_on_their_batch():
    # more than are encoded at once
    estimator, new = learned("implicit"), moons(1100, seed=2)
    order = np.random.default_rng(0).permutation(1100)
    for method in (
        estimator.transform, estimator.reconstruct,
        lambda X: np.c_[estimator.score_samples(X, return_std=True)],
    ):  # fmt: skip
        values = method(new)
        for rows in (order[:300], order[:7], np.repeat(order[:5], 3)):
            np.testing.assert_allclose(method(new[rows]), values[rows], atol=1e-7)


def everything(estimator):
    state = estimator.model_.state_dict()
    new = moons(20, seed=2)
    return [
        *(state[name].numpy() for name in sorted(state)), estimator.score_samples(new),
        estimator.transform(new), estimator.sample(5, random_state=0), estimator.offset_,
        *estimator.history_.values(),
    ]  # fmt: skip


@kinds
def test_fits_are_bit_identical(encoder):
    module = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 2))

    def fit(seed=0):
        estimator = vae(encoder=encoder, decoder_model=module, n_components=2, random_state=seed)
        return everything(estimator.fit(moons()))

    before, first = torch.get_rng_state(), fit()
    with ThreadPoolExecutor(2) as pool:
        for other in pool.map(fit, [0, 0]):
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    assert (first[-5] != fit(1)[-5]).any()


# ---------------------------------------------------------------------- held-out rows


def test_out_of_fold_scores_and_history():
    estimator = fitted(n_components=2, max_epochs=5, validation_fraction=0.25)
    scores = estimator.out_of_fold_scores_
    held = ~np.isnan(scores)
    assert scores.shape == (400,)
    assert held.sum() == 100
    np.testing.assert_allclose(scores[held], estimator.score_samples(moons()[held]), atol=1e-9)
    history = estimator.history_
    assert set(history) == {"n_iter", "held_out_log_likelihood", "train_loss"}
    assert history["n_iter"].tolist() == list(range(6))
    assert np.isnan(history["train_loss"][0])
    assert np.isfinite(history["train_loss"][1:]).all()
    # nats per row in the units of X, from few draws: a bound that is near
    start = fitted(n_components=2, max_epochs=0, validation_fraction=0.25)
    exact = np.nanmean(start.out_of_fold_scores_)
    assert exact - 0.15 < history["held_out_log_likelihood"][0] < exact + 0.05
    assert start.history_["held_out_log_likelihood"] == pytest.approx(exact, abs=1e-9)


def test_history_is_about_held_out_rows_and_their_weights():
    options = {"n_components": 2, "validation_fraction": 0.25, "max_epochs": 0}
    held = ~np.isnan(fitted(**options).out_of_fold_scores_)
    X = np.where(held[:, None], 1.5, 1.0) * moons()
    scores = vae(**options).fit(X).score_samples(X)
    weight = np.where(scores < np.median(scores[held]), 1.0, 0.1)
    start = vae(**options).fit(X, sample_weight=weight)
    trained = vae(**options | {"max_epochs": 1}).fit(X, sample_weight=weight)
    found = start.out_of_fold_scores_[held]
    exact = np.average(found, weights=weight[held])
    assert exact < found.mean() - 0.4
    assert start.history_["held_out_log_likelihood"] == pytest.approx(exact, abs=1e-9)
    # from few draws
    assert exact - 0.15 < trained.history_["held_out_log_likelihood"][0] < exact + 0.05


# ---------------------------------------------------------------------- fits that fail, go on, stop


class Raises(Callback):
    """Ends a fit in its second epoch."""

    n = 0

    def on_batch_begin(self, net, **_):
        self.n += 1
        if self.n == 5:
            raise KeyboardInterrupt


def test_a_fit_that_is_interrupted_leaves_the_networks_as_they_were():
    estimator = vae(n_components=2, warm_start=True).fit(moons())
    before, attributes = everything(estimator), set(vars(estimator))
    estimator.set_params(callbacks=[Raises()])
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(linear_rows(400, d=2))
    assert set(vars(estimator)) == attributes
    for a, b in zip(before, everything(estimator), strict=True):
        np.testing.assert_array_equal(a, b)


def test_divergence_is_an_error():
    estimator = vae(n_components=2, learning_rate=1e30, max_epochs=20)
    with pytest.raises(DivergenceError, match="learning_rate"):
        estimator.fit(moons())
    assert not hasattr(estimator, "model_")


def test_warm_start_goes_on():
    options = {"n_components": 2, "max_epochs": 30, "learning_rate": 0.01, "encoder": "gaussian"}
    estimator = vae(**options, warm_start=True).fit(moons())
    assert estimator.n_iter_ > 0
    first = estimator.history_["held_out_log_likelihood"]
    before = estimator.score_samples(moons())
    estimator.set_params(max_epochs=0).fit(moons())
    np.testing.assert_allclose(estimator.score_samples(moons()), before, atol=1e-9)
    estimator.set_params(max_epochs=2).fit(moons())
    again = estimator.history_["held_out_log_likelihood"]
    # same rows, same seed, same draws: it begins where the first fit ended
    assert again[0] == pytest.approx(np.nanmax(first), abs=1e-4)
    # without, from the start
    cold = vae(**options | {"max_epochs": 2}).fit(moons())
    assert cold.history_["held_out_log_likelihood"][0] == pytest.approx(first[0], abs=1e-9)
    # the columns are kept
    estimator.set_params(max_epochs=0).fit(1.02 * moons())
    np.testing.assert_allclose(estimator.score_samples(moons()), before, atol=1e-9)


def test_warm_start_of_another_shape_starts_afresh():
    estimator = vae(n_components=2, warm_start=True).fit(moons())
    estimator.set_params(n_components=3).fit(moons())
    assert estimator.n_components_ == 3
    assert estimator.transform(moons()).shape == (400, 3)
    assert list(estimator.get_feature_names_out()) == [f"implicitvae{i}" for i in range(3)]


def test_without_patience_the_last_state_is_kept():
    estimator = vae(n_components=2, patience=None, max_epochs=4).fit(moons())
    assert estimator.n_iter_ == 4
    assert estimator.history_["n_iter"][-1] == 4
    assert np.isfinite(estimator.score(moons()))


def test_warm_start_keeps_the_number_of_components():
    estimator = vae(max_epochs=0, warm_start=True).fit(linear_rows(400, d=8, k=6))
    n, before = estimator.n_components_, estimator.score(linear_rows(50, d=8, k=6))
    few = linear_rows(400, d=8, k=6)[:25]
    estimator.fit(few)
    assert estimator.n_components_ == n
    assert vae(max_epochs=0).fit(few).n_components_ < n
    assert estimator.score(linear_rows(50, d=8, k=6)) == pytest.approx(before, abs=1e-9)


# ---------------------------------------------------------------------- values in [0, 1]


@cache
def binary_rows(n=400, seed=0):
    rng = np.random.default_rng(seed)
    on = rng.random((n, 1)) < 0.4
    p = np.where(on, [0.9, 0.8, 0.2, 0.1], [0.1, 0.3, 0.7, 0.6])
    return (rng.random((n, 4)) < p).astype(float)


ALL_BINARY = np.array([[(i >> j) & 1 for j in range(4)] for i in range(16)], dtype=float)


@pytest.mark.parametrize("max_epochs", [0, 25])
def test_binary_rows(max_epochs):
    estimator = vae(likelihood="bernoulli", n_components=1, max_epochs=max_epochs,
                    learning_rate=0.01).fit(binary_rows())  # fmt: skip
    value, error = estimator.score_samples(ALL_BINARY, return_std=True)
    p = np.exp(value)
    assert abs(p.sum() - 1) < 4 * np.sqrt(((p * error) ** 2).sum())
    n = 4000
    drawn = estimator.sample(n, random_state=0)
    counts = np.bincount((drawn @ [1, 2, 4, 8]).astype(int), minlength=16)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert stats.chisquare(counts, n * p / p.sum()).pvalue > 1e-3
    # no probability in between, or outside
    assert (estimator.score_samples([[0.5, 0, 0, 1], [0, 0, 2.0, 1]]) == -np.inf).all()
    means = estimator.reconstruct(binary_rows())
    assert ((means > 0) & (means < 1)).all()
    assert not hasattr(estimator, "noise_variance_")
    if max_epochs:
        # the two kinds of rows are told apart, which independent columns are not
        shares = binary_rows().mean(axis=0)
        new = binary_rows(1000, seed=1)
        independent = np.where(new == 1, np.log(shares), np.log(1 - shares)).sum(axis=1)
        gain = estimator.score_samples(new) - independent
        assert gain.mean() - 4 * gain.std() / np.sqrt(len(gain)) > 0


@cache
def fractional_rows():
    rng = np.random.default_rng(0)
    a, b = np.where(rng.random((400, 1, 1)) < 0.5, [[4, 4], [2, 2]], [[2, 2], [5, 6]]).swapaxes(
        0, 1
    )
    return rng.beta(a, b)


@pytest.mark.parametrize(("max_epochs", "n_at_the_ends"), [(0, 0), (0, 100), (25, 0)])
def test_fractional_rows(max_epochs, n_at_the_ends):
    X = fractional_rows().copy()
    X[:n_at_the_ends, 0], X[: n_at_the_ends // 2, 1] = 0.0, 1.0  # these do not make them binary
    estimator = vae(likelihood="bernoulli", n_components=2, max_epochs=max_epochs,
                    learning_rate=0.01, atoms="off").fit(X)  # fmt: skip
    points, area = grid(0.0, 1.0, 30)
    value, error = estimator.score_samples(points, return_std=True)
    mass = np.exp(value) * area
    assert abs(mass.sum() - 1) < 4 * np.sqrt(((mass * error) ** 2).sum()) + 1e-3
    outside = [[1.0 + 1e-6, 0.5], [0.5, -1e-6]]
    assert (estimator.score_samples(outside) == -np.inf).all()
    assert np.isfinite(estimator.score_samples(np.r_[X[:100], [[0.0, 1.0]]])).all()
    drawn = estimator.sample(2000, random_state=0)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    mean = mass @ points / mass.sum()
    assert (np.abs(drawn.mean(axis=0) - mean) < 4 * drawn.std(axis=0) / np.sqrt(2000) + 1e-3).all()


def test_values_outside_of_the_unit_interval():
    X = binary_rows().copy()
    X[3, 2] = 1.5
    with pytest.raises(ValueError, match=r"values in \[0, 1\], but column 2 has others"):
        vae(likelihood="bernoulli").fit(X)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcd"))
    with pytest.raises(ValueError, match="column 'c' has others"):
        vae(likelihood="bernoulli").fit(frame)
    # when a fit goes on, too
    estimator = vae(likelihood="bernoulli", warm_start=True).fit(binary_rows())
    with pytest.raises(ValueError, match="column 2 has others"):
        estimator.fit(X)


def test_warm_start_with_another_likelihood():
    X = np.random.default_rng(0).random((200, 2))
    estimator = vae(n_components=1, max_epochs=0, warm_start=True).fit(X)
    estimator.set_params(likelihood="bernoulli").fit(X)
    # standardised columns are not in [0, 1]: the columns are learned again
    fresh = vae(n_components=1, max_epochs=0, likelihood="bernoulli").fit(X)
    np.testing.assert_allclose(estimator.score_samples(X), fresh.score_samples(X), atol=1e-9)


def test_smoothing_of_bernoulli_columns_is_refused():
    with pytest.raises(ValueError, match="smoothing"):
        vae(likelihood="bernoulli", smoothing=0.1).fit(binary_rows())


# ---------------------------------------------------------------------- modules of users


@pytest.mark.parametrize("encoder", ["implicit", "gaussian"])
def test_convolutions(encoder):
    def decoder_model(n_components, n_features):
        return nn.Sequential(
            nn.Linear(n_components, 32), nn.Tanh(), nn.Unflatten(1, (8, 2, 2)),
            nn.ConvTranspose2d(8, 1, 4, stride=4), nn.Flatten(),
        )  # fmt: skip

    def encoder_model(n_features, n_outputs):
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 4, stride=4), nn.Flatten(), nn.ReLU(),
            nn.Linear(16, n_outputs),
        )  # fmt: skip

    # bright squares somewhere in 8 x 8 pixels
    rng, i = np.random.default_rng(0), np.arange(8)
    at = rng.uniform(1, 6, (100, 2))
    row, column = (np.exp(-0.5 * ((i - c[:, None]) / 1.2) ** 2) for c in at.T)
    images = (row[:, :, None] * column[:, None]).reshape(100, 64) + 0.1 * rng.normal(size=(100, 64))
    estimator = vae(n_components=3, decoder_model=decoder_model, encoder_model=encoder_model,
                    encoder=encoder, max_epochs=60, learning_rate=0.01, patience=None)  # fmt: skip
    estimator.fit(images)
    assert estimator.transform(images).shape == (100, 3)
    residual = estimator.reconstruct(images) - images
    assert (residual**2).mean() < 0.8 * images.var(axis=0).mean()
    assert np.isfinite(estimator.score_samples(images[:5])).all()
    assert estimator.sample(3, random_state=0).shape == (3, 64)


def test_modules_of_users_are_copied():
    decoder, encoder = nn.Linear(2, 2), nn.Linear(2, 4)
    before = [p.clone() for p in (*decoder.parameters(), *encoder.parameters())]
    estimator = vae(n_components=2, decoder_model=decoder, encoder_model=encoder,
                    patience=None).fit(moons())  # fmt: skip
    after = [*decoder.parameters(), *encoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in after)
    learned = [p for p in estimator.model_.parameters() if p.shape == (4, 2)]
    assert not any(torch.equal(p.float(), encoder.weight) for p in learned)
    assert pickle.loads(pickle.dumps(estimator)).score(moons()) == estimator.score(moons())


@pytest.mark.parametrize("max_epochs", [0, 2])
def test_dropout_is_for_training_only(max_epochs):
    module = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    estimator = vae(n_components=2, decoder_model=module, max_epochs=max_epochs).fit(moons())
    means = estimator.inverse_transform(np.ones((10, 2)))
    np.testing.assert_allclose(means, means[:1].repeat(10, axis=0))


class Folded(nn.Module):
    def forward(self, z):
        return z.abs()


def test_reconstructions_are_means_of_decoded_draws():
    # |z| for z ~ N(0, 1), with which the encoder for a user's decoder starts: sqrt(2 / pi)
    n, X = 2**16, moons()[:, :1]
    estimator = vae(n_components=1, decoder_model=Folded(), max_epochs=0, n_posterior_samples=n)
    zero, one = estimator.fit(X).inverse_transform([[0.0], [1.0]])
    found = (estimator.reconstruct(X[:4]) - zero) / (one - zero)
    # of each pair of opposite signs, one counts
    error = np.sqrt((1 - 2 / np.pi) / (n / 2))
    np.testing.assert_allclose(found, np.sqrt(2 / np.pi), rtol=0, atol=4 * error)


@kinds
def test_encoder_of_a_given_decoder_is_trained_at_the_defaults(encoder):
    # such a decoder has one likelihood, whatever the encoder: no held-out row could tell a good
    # encoder from an untrained one
    rng = np.random.default_rng(0)
    X = np.abs(rng.normal(size=(500, 1))) + 0.1 * rng.normal(size=(500, 1))
    low, center, high = np.quantile(X, [0.25, 0.5, 0.75])

    class Given(nn.Module):
        def forward(self, z):
            return (z.abs() - center) / ((high - low) / 1.349)

    estimator = vae(
        n_components=1, encoder=encoder, decoder_model=Given(), max_epochs=100, learning_rate=0.01,
    ).fit(X)  # fmt: skip
    assert estimator.n_iter_ == 100
    shown = X[np.abs(X[:, 0]) > 0.5]
    error = estimator.reconstruct(shown) - shown
    assert np.sqrt(np.square(error).mean()) < 0.25


# ---------------------------------------------------------------------- rounding, constant columns


def test_rounding_of_a_scaler_is_no_value_outside():
    X = np.random.default_rng(0).random((60, 2))
    X[0], X[1] = 1.0 + 2e-16, -1e-17
    estimator = vae(likelihood="bernoulli", n_components=1).fit(X)
    assert np.isfinite(estimator.score_samples(X)).all()
    assert np.isneginf(estimator.score_samples(X + 1e-3)[0])
    with pytest.raises(ValueError, match="column 0"):
        vae(likelihood="bernoulli", n_components=1).fit(X + 1e-6)


def test_warm_start_where_a_constant_column_has_moved():
    X = np.c_[moons(), np.full(400, 3.0)]
    estimator = vae(n_components=2, warm_start=True, max_epochs=1).fit(X)
    moved = X + [0.0, 0.0, 1.0] * moons()[::-1, :1]
    with pytest.warns(UserWarning, match="other columns are constant"):
        estimator.fit(moved)
    cold = vae(n_components=2, max_epochs=1).fit(moved)
    np.testing.assert_array_equal(estimator.score_samples(moved), cold.score_samples(moved))
