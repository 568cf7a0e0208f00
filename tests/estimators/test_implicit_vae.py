"""ImplicitVAE: its density, its transformer and its fit, against what is known exactly."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA, FactorAnalysis
from skorch.callbacks import Callback
from torch import nn

from skebm import ImplicitVAE
from skebm.datasets import make_two_moons
from skebm.estimators import _variational, implicit_vae
from skebm.estimators._progress import Progress
from skebm.estimators._variational import (
    LatentNetworks,
    beats,
    build_networks,
    negative_bounds,
    train_latent,
)
from skebm.exceptions import DivergenceError
from skebm.latents import (
    FactorModel,
    GaussianLikelihood,
    ImplicitEncoder,
    LatentVariableModel,
    factor_analysis,
    perceptron,
)
from skebm.objectives import gaussian_divergences

QUICK = {"hidden_layer_sizes": (16,), "max_epochs": 3, "random_state": 0}
KINDS = [("gaussian", "sliced"), ("implicit", "sliced"), ("implicit", "stein")]
kinds = pytest.mark.parametrize(("encoder", "score_estimator"), KINDS)


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


@cache
def fitted(**options):
    return vae(**options).fit(moons())


@cache
def at_start(encoder="implicit"):
    """Factor analysis, as an estimator."""
    return vae(n_components=2, max_epochs=0, encoder=encoder).fit(linear_rows(400))


def factors_of(estimator):
    """The linear model that a fit without training is."""
    model = estimator.model_.model
    decoder = model.decoder
    return FactorModel(decoder.bias, decoder.weight, model.likelihood.variance)


def standardized(estimator, X):
    """As documented: median, and interquartile range / 1.349 (of the rows fitted)."""
    low, center, high = np.quantile(linear_rows(400), [0.25, 0.5, 0.75], axis=0)
    scale = (high - low) / 1.349
    return torch.as_tensor((X - center) / scale), center, scale


# ---------------------------------------------------------------------- the start


def test_the_start_is_factor_analysis_of_the_training_fold():
    estimator = at_start()
    x, _, _ = standardized(estimator, linear_rows(400))
    trained_on = torch.as_tensor(np.isnan(estimator.out_of_fold_scores_))
    expected = factor_analysis(x[trained_on], torch.ones(int(trained_on.sum())), 2)
    for got, wanted in zip(factors_of(estimator), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert estimator.n_iter_ == 0


@pytest.mark.parametrize("encoder", ["implicit", "gaussian"])
def test_log_density_at_the_start_is_exact_within_its_error(encoder):
    estimator, X = at_start(encoder), linear_rows(500, seed=5)
    x, _, scale = standardized(estimator, X)
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
    x, center, scale = standardized(estimator, X)
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


@pytest.mark.filterwarnings("ignore:FactorAnalysis did not converge")
@pytest.mark.parametrize(("d", "k"), [(10, 6), (10, 2), (3, 1), (1, 1)])
def test_auto_components_are_those_of_the_best_held_out_likelihood(d, k):
    X, weight = linear_rows(300, d=d, k=k), 1 + np.arange(300) % 3
    estimator = vae(max_epochs=0, validation_fraction=0.3).fit(X, sample_weight=weight)
    held = ~np.isnan(estimator.out_of_fold_scores_)
    # weights are repetitions, for scikit-learn
    train, test = (X[rows].repeat(weight[rows], axis=0) for rows in (~held, held))
    levels = {
        n: FactorAnalysis(n, svd_method="lapack", tol=1e-4).fit(train).score(test)
        for n in (1, 2, 3, 4, 6, 8)
        if n < max(d, 2)
    }
    assert estimator.n_components_ == max(max(levels, key=levels.get), min(d, 4))


def test_errors_fall_with_the_draws():
    estimator, X = copy.deepcopy(at_start()), linear_rows(100, seed=5)
    few, many = (
        estimator.set_params(n_importance_samples=n).score_samples(X, return_std=True)[1]
        for n in (125, 2000)
    )
    assert 3.3 < np.median(few / many) < 4.7


# ---------------------------------------------------------------------- what is learned


@kinds
def test_linear_data(encoder, score_estimator):
    # without early stopping, which would fall back on the start: factor analysis itself
    X, new = linear_rows(), linear_rows(1000, seed=7)
    estimator = vae(
        n_components=2, encoder=encoder, score_estimator=score_estimator, max_epochs=10,
        early_stopping=False, n_importance_samples=100,
    ).fit(X)  # fmt: skip
    assert estimator.n_iter_ == 10
    best = FactorAnalysis(2).fit(X).score(new)
    short = best - estimator.score(new)
    assert short < (0.05 if score_estimator == "stein" else 0.02)
    assert short > -0.02  # nor better than the truth


@pytest.mark.parametrize("encoder", ["gaussian", "implicit"])
def test_linear_decoder_from_random_weights(encoder):
    # nothing of factor analysis is in this start: what is right here has been learned
    X, new = linear_rows(), linear_rows(1000, seed=7)
    estimator = vae(
        n_components=2, encoder=encoder, decoder_model=nn.Linear, learning_rate=5e-3,
        max_epochs=100, early_stopping=False,
    ).fit(X)  # fmt: skip
    start = vae(n_components=2, decoder_model=nn.Linear, max_epochs=0).fit(X)
    best = FactorAnalysis(2).fit(X).score(new)
    assert start.score(new) < best - 1.0
    assert abs(best - estimator.score(new)) < 0.02
    # the encoder is the posterior of what was learned, N(mean, covariance)
    law = estimator.model_.model
    weight, bias = law.decoder.module.weight.numpy(), law.decoder.module.bias.numpy()
    scaled = weight.T / law.likelihood.variance.numpy()
    covariance = np.linalg.inv(np.eye(2) + scaled @ weight)
    low, center, high = np.quantile(X, [0.25, 0.5, 0.75], axis=0)
    x = (new - center) / ((high - low) / 1.349)
    mean = (x - bias) @ (covariance @ scaled).T
    with torch.no_grad():
        noise = torch.zeros(1, estimator.model_.encoder.n_noise, dtype=torch.float64)
        if encoder == "implicit":
            generator = torch.Generator().manual_seed(0)
            noise = estimator.model_.encoder.noise(500, generator=generator, dtype=torch.float64)
        found_mean, found = estimator.model_.encoder.moments(torch.as_tensor(x), noise)
    found_mean, found = found_mean.numpy(), found.numpy()
    # divergence of Gaussian laws with these moments; a diagonal one cannot be nearer than `least`
    precision = np.linalg.inv(covariance)
    off = found_mean - mean
    divergence = 0.5 * (
        np.trace(precision @ found, axis1=1, axis2=2) - 2.0 + ((off @ precision) * off).sum(1)
        + np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(found)[1]
    )  # fmt: skip
    least = 0.5 * (np.log(np.diag(precision)).sum() + np.linalg.slogdet(covariance)[1])
    assert divergence.mean() < (least if encoder == "gaussian" else 0.0) + 0.03


def test_log_density_is_that_of_scikit_learn():
    X, new = linear_rows(400), linear_rows(300, seed=5)
    estimator, pca = copy.deepcopy(at_start()), PCA(2).fit(X)
    _, center, scale = standardized(estimator, X)
    # the solution of scikit-learn, put in place of our own
    spread = np.sqrt(pca.explained_variance_ - pca.noise_variance_)
    law = estimator.model_.model
    law.decoder.weight.copy_(torch.as_tensor(pca.components_.T * spread / scale[:, None]))
    law.decoder.bias.copy_(torch.as_tensor((pca.mean_ - center) / scale))
    variance = torch.as_tensor(pca.noise_variance_ / scale**2)
    law.likelihood.load_state_dict(GaussianLikelihood(variance).state_dict())
    value, error = estimator.score_samples(new, return_std=True)
    z = (value - pca.score_samples(new)) / error
    assert np.abs(z).max() < stats.norm.isf(1e-4 / len(z))
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert error.max() < 0.1


def test_errors_of_a_trained_fit_are_those_of_repetitions():
    estimator = copy.deepcopy(moons_vae()).set_params(n_importance_samples=100)
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


@pytest.mark.parametrize("data", ["moons", "linear"])
def test_never_below_the_start(data):
    # at a rate at which 180 rows are soon overfitted
    rows = moons if data == "moons" else linear_rows
    options = {"max_epochs": 60, "learning_rate": 0.01, "n_components": 2, "encoder": "gaussian",
               "n_importance_samples": 100}  # fmt: skip
    new, n_fits = rows(1000, seed=99), 4
    gains, overfitted = [], []
    for seed in range(n_fits):
        X = rows(200, seed=seed)
        start = vae(**options | {"max_epochs": 0}).fit(X).score_samples(new)
        gains.append(vae(**options).fit(X).score_samples(new) - start)
        if data == "linear" and seed == 0:
            late = vae(**options | {"max_epochs": 300, "early_stopping": False}).fit(X)
            overfitted = late.score_samples(new) - start
    gains = np.array(gains)
    # it is decided on 20 rows, so that it may err by what 20 rows can tell
    spread = gains.std(axis=1).max()
    assert gains.mean() >= -2 * spread / np.sqrt(20 * n_fits)
    if data == "linear":
        assert overfitted.mean() < -4 * overfitted.std() / np.sqrt(len(new))


@kinds
def test_training_learns_two_moons(encoder, score_estimator):
    options = {"encoder": encoder, "score_estimator": score_estimator, "n_components": 2}
    trained = fitted(**options, max_epochs=40, learning_rate=0.01)
    start = fitted(**options, max_epochs=0)
    new = moons(1500, seed=3)
    gain = trained.score_samples(new) - start.score_samples(new)
    assert gain.mean() - 4 * gain.std() / np.sqrt(len(gain)) > 0


@cache
def grid(low, high, n):
    """Cell centres, (n^2, 2), and the area of a cell."""
    edges = np.linspace(low, high, n + 1)
    t = 0.5 * (edges[1:] + edges[:-1])
    return np.stack(np.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2), (t[1] - t[0]) ** 2


def moons_vae():
    return fitted(
        n_components=2, encoder="implicit", max_epochs=40, learning_rate=0.01,
        n_importance_samples=1000,
    )  # fmt: skip


@cache
def moons_on_grid():
    points, area = grid(-8.0, 8.0, 72)
    value, error = moons_vae().score_samples(points, return_std=True)
    mass = np.exp(value) * area
    return points, mass, mass * error


def test_density_integrates_to_one():
    assert moons_vae().n_iter_ > 0
    points, mass, error = moons_on_grid()
    # the model is a mixture of normal laws this wide, and 2 exp(-2 pi^2 .65^2) is .0005: a grid is
    # off by no more; the errors of the rows are independent
    assert np.sqrt(moons_vae().noise_variance_.min()) > 0.65 * 16 / 72
    assert abs(mass.sum() - 1) < 4 * np.sqrt((error**2).sum()) + 0.0005
    assert np.sqrt((error**2).sum()) < 0.01
    assert mass.reshape(72, 72)[[0, -1]].sum() + mass.reshape(72, 72)[:, [0, -1]].sum() < 1e-4


def test_samples_follow_the_density():
    _, mass, _ = moons_on_grid()
    n = 4000
    drawn = moons_vae().sample(n, random_state=0)
    # cells of 4 x 4 grid points, those with few rows taken together
    cells = mass.reshape(18, 4, 18, 4).sum((1, 3)).ravel()
    edges = np.linspace(-8.0, 8.0, 19)
    counts = np.histogram2d(*drawn.T, bins=[edges, edges])[0].ravel()
    large = n * cells > 10
    expected = n * np.r_[cells[large], 1 - cells[large].sum()]
    observed = np.r_[counts[large], n - counts[large].sum()]
    assert large.sum() > 12
    assert stats.chisquare(observed, expected * n / expected.sum()).pvalue > 1e-3


def test_samples_of_a_linear_model():
    estimator = at_start()
    drawn = estimator.sample(20_000, random_state=1)
    factors = factors_of(estimator)
    _, center, scale = standardized(estimator, drawn)
    covariance = (factors.loadings @ factors.loadings.mT + factors.variance.diag()).numpy()
    white = np.linalg.solve(np.linalg.cholesky(covariance),
                            ((drawn - center) / scale - factors.center.numpy()).T)  # fmt: skip
    for column in white:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    off = np.corrcoef(white) - np.eye(5)
    assert np.abs(off).max() < 4.5 / np.sqrt(20_000)
    np.testing.assert_array_equal(drawn[:5], estimator.sample(20_000, random_state=1)[:5])


def test_no_sample_comes_twice():
    # more rows than are decoded at once
    assert len(np.unique(at_start().sample(20_000, random_state=1), axis=0)) == 20_000


# ---------------------------------------------------------------------- units and columns


def test_units_of_the_columns():
    # powers of two and no offset change no bit of the standardised columns
    scale = np.array([4.0, 0.125])
    options = {"n_components": 2, "max_epochs": 5}
    plain, scaled = vae(**options).fit(moons()), vae(**options).fit(moons() * scale)
    new = moons(100, seed=2)
    got = scaled.score_samples(new * scale) + np.log(scale).sum()
    np.testing.assert_allclose(got, plain.score_samples(new), atol=1e-9)
    np.testing.assert_allclose(scaled.transform(new * scale), plain.transform(new), atol=1e-9)
    np.testing.assert_allclose(
        scaled.reconstruct(new * scale), plain.reconstruct(new) * scale, rtol=1e-9
    )
    np.testing.assert_allclose(scaled.noise_variance_, plain.noise_variance_ * scale**2, rtol=1e-9)


@pytest.mark.parametrize(("scale", "offset"), [(1e5, 3e6), (1e-5, 2.0), (3.0, -7.0)])
def test_scales_and_offsets_at_the_start(scale, offset):
    options = {"n_components": 2, "max_epochs": 0}
    plain, moved = vae(**options).fit(moons()), vae(**options).fit(scale * moons() + offset)
    new = moons(100, seed=2)
    value, error = moved.score_samples(scale * new + offset, return_std=True)
    # the offset costs digits of the rows, and with them the draws: same law, other draws
    expected, other = plain.score_samples(new, return_std=True)
    assert (np.abs(value + 2 * np.log(scale) - expected) < 5 * np.hypot(error, other)).all()
    np.testing.assert_allclose(
        moved.reconstruct(scale * new + offset), scale * plain.reconstruct(new) + offset,
        atol=1e-4 * scale,
    )  # fmt: skip


def test_constant_columns():
    X = np.insert(moons(), 1, 3.0, axis=1)
    estimator, plain = vae(n_components=2).fit(X), vae(n_components=2).fit(moons())
    np.testing.assert_array_equal(estimator.score_samples(X), plain.score_samples(moons()))
    other = X[:4].copy()
    other[[0, 2], 1] = 3.1
    value, error = estimator.score_samples(other, return_std=True)
    assert (value[[0, 2]] == -np.inf).all()
    assert np.isfinite(value[[1, 3]]).all()
    assert (error[[0, 2]] == 0).all()
    drawn = estimator.sample(10, random_state=0)
    for rows in (drawn, estimator.reconstruct(X[:5]), estimator.inverse_transform(np.eye(2))):
        assert rows.shape[1] == 3
        assert (rows[:, 1] == 3.0).all()
    np.testing.assert_array_equal(drawn[:, [0, 2]], plain.sample(10, random_state=0))
    np.testing.assert_array_equal(estimator.noise_variance_[[0, 2]], plain.noise_variance_)
    assert estimator.noise_variance_[1] == 0
    np.testing.assert_array_equal(estimator.transform(X[:5]), plain.transform(moons()[:5]))


@pytest.mark.filterwarnings("error")
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


def test_ties_and_smoothing():
    rng = np.random.default_rng(0)
    X = np.c_[rng.poisson(4, 500), np.round(rng.normal(size=500), 1)]
    options = {"n_components": 2, "encoder": "gaussian", "n_importance_samples": 100}
    rough, smooth = (vae(**options, smoothing=h).fit(X) for h in (0.0, "scott"))
    # of whole numbers, the likelihood must not go to spikes: a density, cell by cell
    points = np.stack(np.meshgrid(np.arange(-3.0, 20.0, 0.25), np.linspace(-5, 5, 41)), -1)
    points = points.reshape(-1, 2)
    value, error = rough.score_samples(points, return_std=True)
    mass = np.exp(value) * 0.25 * 0.25
    assert abs(mass.sum() - 1) < 4 * np.sqrt(((mass * error) ** 2).sum()) + 1e-3
    # X + h sigma noise has a larger variance
    h = 500 ** (-1 / 6)
    wide, narrow = (e.sample(5000, random_state=0).var(axis=0) for e in (smooth, rough))
    np.testing.assert_allclose(wide / X.var(axis=0), 1 + h**2, rtol=0.15)
    assert (wide > narrow).all()


@pytest.mark.parametrize("far", [1e4, 1e8, 1e160, 1e300])
def test_rows_far_out(far):
    # outliers, whatever the scale: low, and no error
    estimator = fitted(n_components=2)
    value = estimator.score_samples(np.array([[far, 0.0], [0.0, -far], [0.0, 0.5]]))
    assert (value[:2] < -1e6).all()
    alone = estimator.score_samples([[0.0, 0.5]])
    assert value[2] == pytest.approx(alone[0], abs=1e-9)
    assert (estimator.predict([[far, 0.0]]) == -1).all()


def test_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(moons(), columns=["a", "b"])
    estimator, plain = vae(n_components=2).fit(frame), vae(n_components=2).fit(moons())
    np.testing.assert_array_equal(estimator.score_samples(frame), plain.score_samples(moons()))
    np.testing.assert_array_equal(estimator.transform(frame), plain.transform(moons()))
    assert list(estimator.feature_names_in_) == ["a", "b"]
    with pytest.raises(ValueError, match="feature names"):
        estimator.transform(frame[["b", "a"]])


# ---------------------------------------------------------------------- batches, seeds, threads


def test_rows_do_not_depend_on_their_batch():
    estimator, new = fitted(n_components=2, max_epochs=5), moons(300, seed=2)
    value, error = estimator.score_samples(new, return_std=True)
    order = np.random.default_rng(0).permutation(300)
    for rows in (order, order[:7], np.repeat(order[:5], 3)):
        again, error_again = estimator.score_samples(new[rows], return_std=True)
        np.testing.assert_allclose(again, value[rows], atol=1e-7)
        np.testing.assert_allclose(error_again, error[rows], atol=1e-7)
        np.testing.assert_allclose(
            estimator.transform(new[rows]), estimator.transform(new)[rows], atol=1e-7
        )
        np.testing.assert_allclose(
            estimator.reconstruct(new[rows]), estimator.reconstruct(new)[rows], atol=1e-7
        )


def test_many_rows_are_as_few():
    new = moons(1100, seed=2)
    estimator = fitted(n_components=2, max_epochs=5, learning_rate=0.01, early_stopping=False,
                       n_importance_samples=20)  # fmt: skip
    for method in (estimator.transform, estimator.reconstruct, estimator.score_samples):
        np.testing.assert_allclose(method(new)[-5:], method(new[-5:]), atol=1e-7)


def everything(estimator):
    state = estimator.model_.state_dict()
    new = moons(20, seed=2)
    return [
        *(state[name].numpy() for name in sorted(state)), estimator.score_samples(new),
        estimator.transform(new), estimator.sample(5, random_state=0), estimator.offset_,
        *estimator.history_.values(),
    ]  # fmt: skip


@kinds
def test_fits_are_bit_identical(encoder, score_estimator):
    module = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 2))

    def fit(seed=0):
        return everything(
            vae(encoder=encoder, score_estimator=score_estimator, decoder_model=module,
                n_components=2, random_state=seed).fit(moons())
        )  # fmt: skip

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    n_threads = torch.get_num_threads()
    first, second = fit(), fit()
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    with ThreadPoolExecutor(2) as pool:
        in_threads = list(pool.map(fit, [0, 0]))
    assert torch.get_num_threads() == n_threads
    for other in (second, *in_threads):
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert (first[-5] != fit(1)[-5]).any()


# ---------------------------------------------------------------------- weights, held-out rows


def test_rows_of_weight_zero_are_dropped():
    weight = (np.arange(400) % 3).astype(float)
    options = {"n_components": 2}
    weighted = vae(**options).fit(moons(), sample_weight=weight)
    without = vae(**options).fit(moons()[weight > 0], sample_weight=weight[weight > 0])
    new = moons(50, seed=2)
    np.testing.assert_array_equal(weighted.score_samples(new), without.score_samples(new))
    assert weighted.out_of_fold_scores_.shape == ((weight > 0).sum(),)
    scaled = vae(**options).fit(moons(), sample_weight=4 * weight)
    np.testing.assert_array_equal(weighted.score_samples(new), scaled.score_samples(new))


@pytest.mark.parametrize("max_epochs", [0, 20])
def test_weights_count(max_epochs):
    # all weight on the left half: what is learned is the left half
    X = moons()
    weight = np.where(X[:, 0] < 0.5, 1.0, 1e-3)
    estimator = vae(n_components=2, max_epochs=max_epochs, learning_rate=0.01,
                    early_stopping=False).fit(X, sample_weight=weight)  # fmt: skip
    mean = np.average(X, axis=0, weights=weight)
    drawn = estimator.sample(4000, random_state=0)
    # halves of 400 rows, so that folds and draws make an error of about 1 / sqrt(150)
    assert (np.abs(drawn.mean(axis=0) - mean) < 4 * drawn.std(axis=0) / np.sqrt(150)).all()
    assert (np.abs(X.mean(axis=0) - mean) > 4 * X.std(axis=0) / np.sqrt(150)).any()


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


def test_train_loss_is_minus_the_bound():
    # at a rate that learns nothing: the bound of the start, which is tight with a linear decoder
    estimator = vae(n_components=2, max_epochs=40, learning_rate=1e-12, weight_decay=0.0)
    estimator.fit(linear_rows(400))
    x, _, _ = standardized(estimator, linear_rows(400))
    trained_on = np.isnan(estimator.out_of_fold_scores_)
    exact = factors_of(estimator).log_prob(x).numpy()[trained_on]
    losses = estimator.history_["train_loss"][1:]
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() + exact.mean()) < 4 * error
    assert error < 0.02


class Batches(Callback):
    """Keeps the rows that are trained on."""

    def __init__(self):
        self.rows = []

    def on_batch_begin(self, net, batch=None, **_):
        self.rows.append(batch[0][0].clone())


@pytest.mark.parametrize("kind", ["ties", "smoothing"])
def test_every_epoch_has_noise_of_its_own(kind):
    X, smoothing = (moons().round(1), 0.0) if kind == "ties" else (moons(), 0.1)
    seen = Batches()
    vae(n_components=2, smoothing=smoothing, encoder="gaussian", batch_size=10_000,
        callbacks=[seen]).fit(X)  # fmt: skip
    for first, second in combinations([rows[:400] for rows in seen.rows], 2):
        assert not (first[:, None] == second).all(-1).any()


def test_score_network_takes_three_steps_on_training_rows_for_each_of_the_others(monkeypatch):
    losses, seen = _variational.score_network_losses, []

    def recorded(encoder, x, generator):
        seen.append(x.double())
        return losses(encoder, x, generator)

    monkeypatch.setattr(_variational, "score_network_losses", recorded)
    estimator = vae(n_components=2, max_epochs=4, batch_size=90).fit(linear_rows(400))
    assert len(seen) == 3 * 4 * 4
    assert {len(x) for x in seen} == {90}
    x, _, _ = standardized(estimator, linear_rows(400))
    found = torch.cdist(x, torch.cat(seen)).min(1).values < 1e-4
    np.testing.assert_array_equal(found, np.isnan(estimator.out_of_fold_scores_))


@pytest.mark.parametrize("decoder_model", ["mlp", nn.Linear])
def test_training_has_to_beat_its_start_on_held_out_rows(decoder_model, monkeypatch):
    seen = []

    def never(networks, start, x, weight, seed):
        seen.append((x.numpy(), weight.numpy()))
        return False

    monkeypatch.setattr(implicit_vae, "beats", never)
    weight = np.random.default_rng(0).uniform(0.5, 1.5, 400)
    options = {"n_components": 2, "encoder": "gaussian", "decoder_model": decoder_model}
    estimator = vae(**options, max_epochs=40, learning_rate=0.01).fit(moons(), sample_weight=weight)
    if decoder_model != "mlp":  # its start is not fitted
        assert not seen
        assert estimator.n_iter_ > 0
        return
    ((x, of_held),) = seen
    held = ~np.isnan(estimator.out_of_fold_scores_)
    np.testing.assert_allclose(of_held, (weight / weight.mean())[held])
    for got, column in zip(x.T, moons()[held].T, strict=True):
        assert np.corrcoef(got, column)[0, 1] > 1 - 1e-9
    assert estimator.n_iter_ == 0
    start = vae(**options, max_epochs=0).fit(moons(), sample_weight=weight)
    np.testing.assert_allclose(estimator.score_samples(x), start.score_samples(x), atol=1e-6)


def test_beats_is_a_test_at_five_per_cent():
    x, _, _ = standardized(None, linear_rows(2000, seed=9))
    rng = np.random.default_rng(0)
    options = {"binary": False, "likelihood": "gaussian", "encoder": "gaussian",
               "score_estimator": "sliced", "encoder_model": "mlp", "decoder_model": "mlp",
               "hidden_layer_sizes": (4,), "seed": 0}  # fmt: skip
    ones = torch.ones(len(x), dtype=torch.float64)
    good, poor = (build_networks(x, ones, k, **options) for k in (2, 1))
    exact = [factor_analysis(x, ones, k).log_prob(x) for k in (2, 1)]
    decided = []
    for _ in range(60):
        rows = torch.as_tensor(rng.choice(len(x), 20))
        weight = torch.as_tensor(rng.exponential(size=20))
        gain, share = (exact[0] - exact[1])[rows], weight / weight.sum()
        mean = share @ gain
        t = mean / (share.square() @ (gain - mean).square()).sqrt()
        if abs(t - 1.645) > 0.15:  # the errors of the log-densities count, too
            decided.append(bool(t > 1.645))
            assert beats(good, poor, x[rows], weight, 0) == decided[-1], t
        assert not beats(poor, good, x[rows], weight, 0) or t < -1.645
    assert 5 < sum(decided) < len(decided) - 5
    assert not beats(good, good, x[:20], ones[:20], 0)


def test_auto_threshold_flags_five_per_cent_of_new_rows():
    estimator = vae(n_components=2, validation_fraction=0.5, n_importance_samples=50)
    estimator.fit(moons(1200))
    flagged = (estimator.predict(moons(4000, seed=4)) == -1).mean()
    # a quantile of 600 held-out rows
    assert abs(flagged - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 600 + 1 / 4000))


def test_a_given_contamination_is_that_of_the_training_rows():
    estimator = fitted(n_components=2, contamination=0.1)
    assert (estimator.predict(moons()) == -1).sum() == 40
    np.testing.assert_array_equal(
        estimator.decision_function(moons()), estimator.score_samples(moons()) - estimator.offset_
    )


# ---------------------------------------------------------------------- fits that fail, go on, stop


class Raises(Callback):
    """Ends a fit in its second epoch."""

    def __init__(self, error):
        self.error, self.n = error, 0

    def on_batch_begin(self, net, **_):
        self.n += 1
        if self.n == 5:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt()])
@pytest.mark.parametrize("warm_start", [False, True])
def test_a_fit_that_fails_leaves_the_estimator_as_it_was(error, warm_start):
    estimator = vae(n_components=2, warm_start=warm_start)
    estimator.set_params(callbacks=[Raises(error)])
    with pytest.raises(type(error)):
        estimator.fit(moons())
    assert not [name for name in vars(estimator) if name.endswith("_")]
    estimator.set_params(callbacks=None).fit(moons())
    before = everything(estimator)
    attributes = set(vars(estimator))
    estimator.set_params(callbacks=[Raises(error)])
    with pytest.raises(type(error)):
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
    estimator.set_params(max_epochs=0).fit(1.5 * moons())
    np.testing.assert_allclose(estimator.score_samples(moons()), before, atol=1e-9)


def test_warm_start_of_another_shape_starts_afresh():
    estimator = vae(n_components=2, warm_start=True).fit(moons())
    estimator.set_params(n_components=3).fit(moons())
    assert estimator.n_components_ == 3
    assert estimator.transform(moons()).shape == (400, 3)
    assert list(estimator.get_feature_names_out()) == [f"implicitvae{i}" for i in range(3)]


def test_without_early_stopping_the_last_state_is_kept():
    estimator = vae(n_components=2, early_stopping=False, max_epochs=4).fit(moons())
    assert estimator.n_iter_ == 4
    assert estimator.history_["n_iter"][-1] == 4
    assert np.isfinite(estimator.score(moons()))


def test_warm_start_keeps_the_number_of_components():
    estimator = vae(max_epochs=0, warm_start=True).fit(linear_rows(400, d=8, k=6))
    assert estimator.n_components_ == 6
    before = estimator.score(linear_rows(50, d=8, k=6))
    estimator.fit(linear_rows(400, d=8, k=2))
    assert estimator.n_components_ == 6
    assert estimator.score(linear_rows(50, d=8, k=6)) == pytest.approx(before, abs=1e-9)


def test_patience():
    # 54 rows at a rate at which they are soon overfitted
    options = {"encoder": "gaussian", "n_components": 2, "patience": 1, "batch_size": 4,
               "learning_rate": 0.03, "max_epochs": 90, "hidden_layer_sizes": (32,)}  # fmt: skip
    X = moons(60)
    history = vae(**options).fit(X).history_
    last, best = history["n_iter"][-1], np.nanargmax(history["held_out_log_likelihood"])
    # 600 steps without a better state, of 13 or 14 an epoch
    assert 600 / 14 <= last - best <= 600 / 13 + 10  # the warm-up does not count
    assert last < 90
    # not while the divergence has another weight
    tempered = vae(**options, kl_weight_start=0.5).fit(X)
    assert tempered.history_["n_iter"][-1] == 90


@pytest.mark.parametrize("kl_weight_start", [0.1, 30.0])
def test_weight_of_the_divergence_ends_at_one(kl_weight_start):
    options = {"n_components": 2, "max_epochs": 60, "encoder": "gaussian", "early_stopping": False,
               "learning_rate": 1e-12, "weight_decay": 0.0}  # fmt: skip
    plain = vae(**options).fit(moons()).history_["train_loss"][1:]
    tempered = vae(**options, kl_weight_start=kl_weight_start).fit(moons())
    tempered = tempered.history_["train_loss"][1:]
    # nothing is learned at this rate, so that losses differ by the weight alone: kl (weight - 1)
    np.testing.assert_allclose(tempered[36:], plain[36:], rtol=1e-6)
    steps = np.arange(36 * 3).reshape(36, 3)
    weight = (kl_weight_start ** (1 - steps / (0.6 * 180))).mean(axis=1)
    divergence = (tempered - plain)[:36] / (weight - 1)
    np.testing.assert_allclose(divergence, divergence.mean(), rtol=0.1)


@kinds
def test_it_is_the_divergence_that_has_the_weight(encoder, score_estimator):
    # nothing is learned at this rate: losses differ by kl (weight - 1), kl that of exact posteriors
    options = {"n_components": 2, "max_epochs": 20, "encoder": encoder, "early_stopping": False,
               "score_estimator": score_estimator, "learning_rate": 1e-12, "weight_decay": 0.0,
               "batch_size": 60, "hidden_layer_sizes": ()}  # fmt: skip
    X = linear_rows(400)
    plain, tempered = (vae(**options, kl_weight_start=w).fit(X) for w in (1.0, 5.0))
    x, _, _ = standardized(plain, X)
    gain, bias, scale = factors_of(plain).posterior()
    exact = gaussian_divergences(x @ gain.mT + bias, scale.log())
    exact = exact[np.isnan(plain.out_of_fold_scores_)].mean().item()
    steps = np.arange(12 * 6).reshape(12, 6)
    weight = (5.0 ** (1 - steps / (0.6 * 120))).mean(axis=1)
    losses = [e.history_["train_loss"][1:13] for e in (plain, tempered)]
    found = (losses[1] - losses[0]) / (weight - 1)
    assert abs(found.mean() - exact) < 4 * found.std(ddof=1) / np.sqrt(12)
    assert found.std() < 0.1 * exact


class Widened(nn.Module):
    """g = c times the second of the three noises, for two columns and two components."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.size * inputs[..., 2:4]


def test_gradient_of_the_divergence_with_a_score_of_the_wrong_size():
    # the law N(0, (1 + c^2) I), whose score the network takes for that of N(0, I)
    score = perceptron(4, 2, (), seed=0)
    coder = ImplicitEncoder(perceptron(2, 4, (), seed=0), 2, Widened(), score)
    model = LatentVariableModel(nn.Linear(2, 2), GaussianLikelihood(torch.ones(2)), 2)
    plain, doubled = (
        negative_bounds(
            LatentNetworks(model, coder), torch.zeros(20_000, 2),
            torch.Generator().manual_seed(0), weight, score_estimator="sliced",
        )
        for weight in (1.0, 2.0)
    )  # fmt: skip
    (slope,) = torch.autograd.grad((doubled - plain).mean(), coder.residual.size)
    # of c^2 - log(1 + c^2) at c = 1; single draws spread by less than 2
    assert abs(slope - 1) < 4 * 2 / np.sqrt(20_000)


class Plan(Callback):
    """Reads how long a training would last, and ends it."""

    def on_epoch_end(self, net, **_):
        self.max_epochs, self.patience = net.max_epochs, net.patience
        self.evaluate_every = net.evaluate_every
        raise KeyboardInterrupt


def plan(**options):
    seen = Plan()
    options = {"n_components": 2, "encoder": "gaussian", "max_epochs": "auto"} | options
    vae(**options, callbacks=[seen]).fit(moons())
    return seen


def test_how_long_training_lasts():
    # of 360 rows: 100 epochs, or 6000 steps
    assert plan(batch_size=4).max_epochs == 100
    assert plan(batch_size=90).max_epochs == 1500
    # patience of at least 600 steps
    assert plan(batch_size=90).patience == 150
    assert plan(batch_size=90, patience=200).patience == 200
    assert plan(batch_size=4, patience=20).patience == 20
    # and of three evaluations, which are rare where many rows are held out
    rare = plan(batch_size=4, validation_fraction=0.5)
    assert rare.evaluate_every > 10
    assert rare.patience >= 3 * rare.evaluate_every


def test_weights_decay_but_not_those_of_the_score():
    # at this rate nothing else happens to them
    options = {"n_components": 2, "learning_rate": 1e-4, "early_stopping": False}
    plain, decayed = (vae(**options, weight_decay=w).fit(moons()).model_ for w in (0.0, 3000.0))
    for part in ("model.decoder.weight", "encoder.network.weight"):
        assert decayed.get_parameter(part).norm() < 0.5 * plain.get_parameter(part).norm()
    part = "encoder.score_network.0.weight"
    torch.testing.assert_close(
        decayed.get_parameter(part), plain.get_parameter(part), rtol=0, atol=0.01
    )


def test_hidden_layer_sizes_are_those_of_every_perceptron():
    networks = fitted(n_components=1, hidden_layer_sizes=(7, 5), max_epochs=0).model_
    widths = [m.out_features for m in networks.modules() if isinstance(m, nn.Linear)]
    # of decoder, encoder, its residual and its score
    assert widths == [7, 5, 2, 7, 5, 2, 7, 5, 1, 7, 5, 1]


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
        new = binary_rows(2000, seed=1)
        independent = np.where(new == 1, np.log(shares), np.log(1 - shares)).sum(axis=1)
        gain = estimator.score_samples(new) - independent
        assert gain.mean() - 4 * gain.std() / np.sqrt(len(gain)) > 0


@pytest.mark.parametrize("max_epochs", [0, 25])
def test_fractional_rows(max_epochs):
    rng = np.random.default_rng(0)
    X = rng.beta(*np.where(rng.random((400, 1, 1)) < 0.5, [[4, 4], [2, 2]], [[2, 2], [5, 6]])
                 .transpose(1, 0, 2))  # fmt: skip
    estimator = vae(likelihood="bernoulli", n_components=2, max_epochs=max_epochs,
                    learning_rate=0.01).fit(X)  # fmt: skip
    points, area = grid(0.0, 1.0, 40)
    value, error = estimator.score_samples(points, return_std=True)
    mass = np.exp(value) * area
    assert abs(mass.sum() - 1) < 4 * np.sqrt(((mass * error) ** 2).sum()) + 1e-3
    outside = [[1.0 + 1e-6, 0.5], [0.5, -1e-6]]
    assert (estimator.score_samples(outside) == -np.inf).all()
    assert np.isfinite(estimator.score_samples([[0.0, 1.0]])).all()
    drawn = estimator.sample(2000, random_state=0)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    mean = mass @ points / mass.sum()
    assert (np.abs(drawn.mean(axis=0) - mean) < 4 * drawn.std(axis=0) / np.sqrt(2000) + 1e-3).all()


def test_rows_with_some_zeros_and_ones_are_not_binary():
    X = np.random.default_rng(0).beta(2, 2, (300, 2))
    X[:100, 0], X[::7, 1] = 0.0, 1.0
    estimator = vae(likelihood="bernoulli", n_components=1, max_epochs=0).fit(X)
    assert np.isfinite(estimator.score_samples(X)).all()
    points, area = grid(0.0, 1.0, 40)
    value, error = estimator.score_samples(points, return_std=True)
    mass = np.exp(value) * area
    assert abs(mass.sum() - 1) < 4 * np.sqrt(((mass * error) ** 2).sum()) + 1e-3


def test_binary_rows_start_from_factor_analysis():
    estimator = vae(likelihood="bernoulli", n_components=2, max_epochs=0).fit(binary_rows())
    trained_on = np.isnan(estimator.out_of_fold_scores_)
    x = torch.as_tensor(binary_rows()[trained_on])
    factors = factor_analysis(x, torch.ones(len(x)), 2)
    # means at z = 0, and their slopes there
    z = 1e-3 * np.r_[np.zeros((1, 2)), np.eye(2), -np.eye(2)]
    center, up, down = np.split(estimator.inverse_transform(z), [1, 3])
    np.testing.assert_allclose(center[0], factors.center, atol=1e-6)
    np.testing.assert_allclose((up - down) / 2e-3, factors.loadings.T, atol=1e-4)


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


class ConvDecoder(nn.Module):
    def __init__(self, n_components, n_features):
        super().__init__()
        assert n_features == 64
        self.first = nn.Linear(n_components, 32)
        self.up = nn.ConvTranspose2d(8, 1, 4, stride=4)

    def forward(self, z):
        return self.up(self.first(z).tanh().view(-1, 8, 2, 2)).flatten(1)


class ConvEncoder(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 4, stride=4), nn.Flatten(), nn.ReLU(),
            nn.Linear(16, n_outputs),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


@cache
def images(n=200):
    """Bright squares somewhere in 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    i = np.arange(8)
    at = rng.uniform(1, 6, (n, 2))
    row, column = (np.exp(-0.5 * ((i - c[:, None]) / 1.2) ** 2) for c in at.T)
    return (row[:, :, None] * column[:, None]).reshape(n, 64) + 0.1 * rng.normal(size=(n, 64))


@pytest.mark.parametrize("encoder", ["implicit", "gaussian"])
def test_convolutions(encoder):
    estimator = vae(n_components=3, decoder_model=ConvDecoder, encoder_model=ConvEncoder,
                    encoder=encoder, max_epochs=60, learning_rate=0.01,
                    early_stopping=False).fit(images())  # fmt: skip
    assert estimator.transform(images()).shape == (200, 3)
    residual = estimator.reconstruct(images()) - images()
    assert (residual**2).mean() < 0.8 * images().var(axis=0).mean()
    assert np.isfinite(estimator.score_samples(images()[:5])).all()
    assert estimator.sample(3, random_state=0).shape == (3, 64)


def test_modules_of_users_are_copied():
    decoder, encoder = nn.Linear(2, 2), nn.Linear(2, 4)
    before = [p.clone() for p in (*decoder.parameters(), *encoder.parameters())]
    estimator = vae(n_components=2, decoder_model=decoder, encoder_model=encoder,
                    early_stopping=False).fit(moons())  # fmt: skip
    after = [*decoder.parameters(), *encoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in after)
    learned = [p for p in estimator.model_.parameters() if p.shape == (4, 2)]
    assert not any(torch.equal(p.float(), encoder.weight) for p in learned)
    assert pickle.loads(pickle.dumps(estimator)).score(moons()) == estimator.score(moons())


def test_modules_of_users_start_with_little_noise():
    X = linear_rows(400)
    estimator = vae(n_components=2, decoder_model=nn.Linear, max_epochs=0).fit(X)
    variance = X[np.isnan(estimator.out_of_fold_scores_)].var(axis=0)
    np.testing.assert_allclose(estimator.noise_variance_, 0.1 * variance, rtol=0.02)


@pytest.mark.parametrize("max_epochs", [0, 2])
def test_dropout_is_for_training_only(max_epochs):
    module = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    estimator = vae(n_components=2, decoder_model=module, max_epochs=max_epochs).fit(moons())
    means = estimator.inverse_transform(np.ones((10, 2)))
    np.testing.assert_allclose(means, means[:1].repeat(10, axis=0))


def test_factories_get_the_sizes():
    seen = []

    def factory(n_inputs, n_outputs):
        seen.append((n_inputs, n_outputs))
        return nn.Linear(n_inputs, n_outputs)

    X = np.insert(moons(), 1, 3.0, axis=1)  # of three columns, one is constant
    vae(n_components=5, decoder_model=factory, encoder_model=factory).fit(X)
    assert seen == [(5, 2), (2, 10)]


def test_modules_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"decoder_model must map \(n, 2\) to \(n, 2\)"):
        vae(n_components=2, decoder_model=nn.Linear(2, 3)).fit(moons())
    with pytest.raises(ValueError, match=r"encoder_model failed on rows of shape \(3, 2\)"):
        vae(n_components=2, encoder_model=nn.Linear(3, 4)).fit(moons())


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


FOLDED_AT = torch.tensor([[0.5], [1.0]], dtype=torch.float64)


@cache
def divergences_from_folded_posteriors(encoder, score_estimator):
    """KL(encoder || exact posterior) for x = |z| + .1 noise, by a histogram of 20,000 draws.

    Decoder and noise are fixed at the truth, so that only the encoder can learn.
    """
    rng = np.random.default_rng(0)
    x = torch.as_tensor(np.abs(rng.normal(size=(500, 1))) + 0.1 * rng.normal(size=(500, 1)))
    weight = torch.ones(500, dtype=torch.float64)
    networks = build_networks(
        x, weight, 1, binary=False, likelihood="gaussian", encoder=encoder,
        score_estimator=score_estimator, encoder_model="mlp", decoder_model=Folded(),
        hidden_layer_sizes=(32, 32), seed=0,
    )  # fmt: skip
    with torch.no_grad():
        networks.model.likelihood.log_variance.fill_(np.log(0.01))
    networks.model.likelihood.requires_grad_(False)
    train_latent(
        networks, x, weight, (torch.arange(500), torch.arange(10)),
        score_estimator=score_estimator, kl_weight_start=30.0, refresh=None,
        generator=torch.Generator().manual_seed(0), seed=0, learning_rate=0.005, weight_decay=0.0,
        batch_size=128, max_epochs=150, patience=1, early_stopping=False, callbacks=None,
        device=torch.device("cpu"), n_threads=1, progress=Progress(0),
    )  # fmt: skip
    coder, model = networks.encoder.double(), networks.model.double()
    noise = coder.noise(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n_bins, fine = 160, 50
    z = torch.linspace(-4, 4, 2 * n_bins * fine + 1, dtype=torch.float64)[1::2]  # cell centres
    edges = torch.linspace(-4, 4, n_bins + 1, dtype=torch.float64)
    found = []
    with torch.no_grad():
        log_posterior = model.log_joint(FOLDED_AT[:, None], z.expand(2, -1)[..., None])
        log_posterior = log_posterior.log_softmax(1).view(2, n_bins, fine).logsumexp(-1)
        drawn = coder.draw(FOLDED_AT, noise)[..., 0]
    for of_x, log_p in zip(drawn.clamp(-3.99, 3.99), log_posterior, strict=True):
        share = torch.histogram(of_x, edges)[0] / len(of_x)
        hit = share > 0
        found.append((share[hit] * (share[hit].log() - log_p[hit])).sum().item())
    return np.array(found)


@pytest.mark.parametrize(("encoder", "score_estimator"), KINDS)
def test_encoder_of_a_given_decoder_is_trained_at_the_defaults(encoder, score_estimator):
    # such a decoder has one likelihood, whatever the encoder: no held-out row could tell a good
    # encoder from an untrained one
    rng = np.random.default_rng(0)
    X = np.abs(rng.normal(size=(500, 1))) + 0.1 * rng.normal(size=(500, 1))
    low, center, high = np.quantile(X, [0.25, 0.5, 0.75])

    class Given(torch.nn.Module):
        def forward(self, z):
            return (z.abs() - center) / ((high - low) / 1.349)

    estimator = vae(
        n_components=1, encoder=encoder, score_estimator=score_estimator, decoder_model=Given(),
        max_epochs=100, learning_rate=0.01,
    ).fit(X)  # fmt: skip
    assert estimator.n_iter_ == 100
    shown = X[np.abs(X[:, 0]) > 0.5]
    error = estimator.reconstruct(shown) - shown
    assert np.sqrt(np.square(error).mean()) < 0.25


def test_a_gaussian_encoder_finds_one_of_two_modes():
    # the posterior has two alike, and a normal law can cover one: log 2
    found = divergences_from_folded_posteriors("gaussian", "sliced")
    np.testing.assert_allclose(found, np.log(2), atol=0.05)


@pytest.mark.parametrize("score_estimator", ["sliced", "stein"])
def test_an_implicit_encoder_finds_both_modes(score_estimator):
    found = divergences_from_folded_posteriors("implicit", score_estimator)
    assert (found < 0.25).all(), found


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
    moved = X + [0.0, 0.0, 1.0] * np.arange(400)[:, None]
    estimator.fit(moved)
    assert np.isfinite(estimator.offset_)
    assert np.isneginf(estimator.score_samples(moved[1:])).all()
    assert (estimator.predict(moved[1:]) == -1).all()
