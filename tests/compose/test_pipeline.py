"""A density behind transformers, in the units of X: closed forms, quadrature, refusals."""

import pickle

import numpy as np
import pytest
import sklearn
from scipy import stats
from sklearn.base import clone
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import FitFailedWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from skebm import Boosting, ImplicitVAE, NCEDensity, OutlierDetector
from skebm.compose import DensityPipeline, InvertibleFunctionTransformer


def minus_log(X):
    return -np.log(X)


def identity(X):
    return X


def log_transformer(log_det=minus_log):
    return InvertibleFunctionTransformer(np.log, np.exp, log_det)


def pipeline(*steps):
    names = [*(f"step{i}" for i in range(len(steps) - 1)), "density"]
    return DensityPipeline(list(zip(names, steps, strict=True)))


def gaussian():
    return GaussianMixture(1, reg_covar=0.0)


def base_alone(**particular):
    """A density of ours that fits in a tenth of a second."""
    options = {"base": "gaussian", "energy_model": None, "n_members": 2, "random_state": 0}
    return NCEDensity(**options | particular)


RIGHT = stats.lognorm(1.0, scale=3.0).rvs((400, 1), random_state=0)
STEEP = stats.pareto(1.0).rvs((400, 1), random_state=3)
"""Skewed so far that its power is near -1, with an image that ends soon; mirrored, near 3."""
NARROW = stats.norm(10.0, 0.3).rvs((400, 1), random_state=1)
EVEN = stats.norm(1.0, 0.7).rvs((400, 1), random_state=2)

IN_ONE_COLUMN = {
    "standard": (StandardScaler(), RIGHT),
    "standard-mean-only": (StandardScaler(with_std=False), RIGHT),
    "min-max": (MinMaxScaler((-2, 3)), RIGHT),
    "min-max-clip": (MinMaxScaler((-2, 3), clip=True), EVEN),
    "robust": (RobustScaler(), RIGHT),
    "robust-unit-variance": (RobustScaler(unit_variance=True), RIGHT),
    "robust-centre-only": (RobustScaler(with_scaling=False), RIGHT),
    "max-abs": (MaxAbsScaler(), RIGHT),
    "pca": (PCA(), RIGHT),
    "pca-whiten": (PCA(whiten=True), RIGHT),
    "box-cox": (PowerTransformer("box-cox"), RIGHT),
    "box-cox-raw": (PowerTransformer("box-cox", standardize=False), NARROW),
    "yeo-johnson": (PowerTransformer(), EVEN),
    "yeo-johnson-raw": (PowerTransformer(standardize=False), RIGHT),
    "yeo-johnson-right": (PowerTransformer(), STEEP),
    "yeo-johnson-left": (PowerTransformer(), -STEEP),
    "box-cox-left": (PowerTransformer("box-cox"), STEEP),
    "log": (log_transformer(), RIGHT),
    "exp": (InvertibleFunctionTransformer(np.exp, np.log, identity), EVEN),
    "passthrough": ("passthrough", RIGHT),
    "none": (None, RIGHT),
    "identity": (FunctionTransformer(), RIGHT),
}

DOMAIN = {
    "box-cox": (1e-60, 1e60),
    "box-cox-left": (1e-60, 1e60),
    "log": (1e-300, 1e300),
    "exp": (-300.0, 300.0),
}


def ends(name, transformer):
    """Where the image of a transformer ends, in z: where it takes the ends of its domain."""
    if transformer in (None, "passthrough"):
        return -np.inf, np.inf
    domain = DOMAIN.get(name.removesuffix("-raw"), (-1e60, 1e60))
    return np.ravel(transformer.transform(np.array(domain)[:, None]))


def integral(density, X):
    """Of the density, between and around the rows, over points that are dense where they are."""
    spread = np.ptp(X)
    far = X.max() + spread * np.r_[np.linspace(0, 1, 20_001), np.geomspace(1, 1e6, 20_001)]
    inner = np.linspace(X.min(), X.max(), 40_001)
    low = X.min() - spread * np.r_[np.linspace(0, 1, 20_001), np.geomspace(1, 1e6, 20_001)]
    near_zero = np.r_[-np.geomspace(1e-12, 1, 4001), np.geomspace(1e-12, 1, 4001)]
    x = np.unique(np.r_[low, inner, far, near_zero * abs(X).min()])
    with np.errstate(over="ignore"):  # of a distance in z that is squared
        return np.trapezoid(np.exp(density.score_samples(x[:, None])), x)


@pytest.mark.parametrize("name", IN_ONE_COLUMN)
def test_the_density_integrates_to_one_in_x(name):
    transformer, X = IN_ONE_COLUMN[name]
    density = pipeline(transformer, gaussian()).fit(X)
    error = density.log_image_mass_std_error_
    assert integral(density, X) == pytest.approx(1.0, abs=2e-4 + 4 * error)
    gm = density[-1]
    low, high = ends(name, density[0])
    normal = stats.norm(gm.means_[0, 0], gm.covariances_[0, 0, 0] ** 0.5)
    mass = normal.cdf(high) - normal.cdf(low)
    assert density.log_image_mass_ == pytest.approx(np.log(mass), abs=4 * error + 1e-3)


@pytest.mark.parametrize("name", IN_ONE_COLUMN)
def test_draws_have_the_density(name):
    transformer, X = IN_ONE_COLUMN[name]
    density = pipeline(transformer, gaussian()).fit(X)
    drawn = density.sample(2000, random_state=0)
    assert drawn.shape == (2000, 1)
    assert np.isfinite(density.score_samples(drawn)).all()
    low, high = ends(name, density[0])
    gm = density[-1]
    mean, scale = gm.means_[0, 0], gm.covariances_[0, 0, 0] ** 0.5
    truncated = stats.truncnorm((low - mean) / scale, (high - mean) / scale, mean, scale)
    z = drawn if transformer in (None, "passthrough") else density[0].transform(drawn)
    assert stats.kstest(np.ravel(z), truncated.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "name", ["min-max-clip", "yeo-johnson-right", "yeo-johnson-left", "box-cox-left", "exp"]
)
def test_mass_outside_of_the_image_is_among_the_tests(name):
    transformer, X = IN_ONE_COLUMN[name]
    assert pipeline(transformer, gaussian()).fit(X).log_image_mass_ < -0.001


def test_change_of_variables_of_a_mixture(X3):
    density = pipeline(RobustScaler(), PCA(whiten=True), MinMaxScaler(), GaussianMixture(3)).fit(X3)
    rows = X3[:50]
    origin, units = density[:-1].transform(np.zeros((1, 3))), density[:-1].transform(np.eye(3))
    slope = (units - origin).T
    mixture, back = density[-1], np.linalg.inv(slope)
    expected = np.logaddexp.reduce(
        [
            np.log(w) + stats.multivariate_normal(back @ (m - origin[0]), back @ c @ back.T)
            .logpdf(rows)
            for w, m, c in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True)
        ]
    )  # fmt: skip
    np.testing.assert_allclose(density.score_samples(rows), expected, atol=1e-7)
    plain = Pipeline(density.steps)
    difference = expected - plain.score_samples(rows)
    np.testing.assert_allclose(difference, np.linalg.slogdet(slope)[1], atol=1e-7)
    assert density.score(rows) == pytest.approx(expected.mean())
    weight = np.arange(50.0)
    assert density.score(rows, sample_weight=weight) == pytest.approx(
        np.average(expected, weights=weight)
    )
    np.testing.assert_array_equal(density.predict(rows), plain.predict(rows))
    np.testing.assert_array_equal(density.fit_predict(X3), density.predict(X3))


@pytest.fixture
def X3():
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 3)) @ rng.normal(size=(3, 3)) * [1.0, 10.0, 0.1] + [3.0, 0.0, 9.0]


def test_the_logarithm_makes_a_lognormal():
    density = pipeline(log_transformer(), gaussian()).fit(RIGHT)
    gm = density[-1]
    truth = stats.lognorm(gm.covariances_[0, 0, 0] ** 0.5, scale=np.exp(gm.means_[0, 0]))
    np.testing.assert_allclose(density.score_samples(RIGHT), truth.logpdf(RIGHT[:, 0]))
    drawn = density.sample(2000, random_state=0)
    assert stats.kstest(drawn[:, 0], truth.cdf).pvalue > 1e-3
    np.testing.assert_array_equal(drawn, density.sample(2000, random_state=0))
    assert (drawn != density.sample(2000, random_state=1)).all()


def total(X):
    return -np.log(X).sum(axis=1)


@pytest.mark.parametrize("log_det", [minus_log, total])
def test_a_log_determinant_by_column_or_in_all(log_det, X3):
    X = np.exp(X3 / X3.std(axis=0))
    density = pipeline(log_transformer(log_det), gaussian()).fit(X)
    normal = stats.multivariate_normal(density[-1].means_[0], density[-1].covariances_[0])
    expected = normal.logpdf(np.log(X)) - np.log(X).sum(axis=1)
    np.testing.assert_allclose(density.score_samples(X), expected)


def test_a_wrong_log_determinant_is_noticed():
    with pytest.warns(UserWarning, match="'step0'.*differs by"):
        pipeline(log_transformer(np.log), gaussian()).fit(RIGHT)


def test_a_wrong_inverse_is_noticed():
    with (
        pytest.warns(UserWarning, match="'step0': its inverse does not bring 25 of 25"),
        pytest.raises(ValueError, match="none of 20000 draws"),
    ):
        pipeline(InvertibleFunctionTransformer(np.log, np.tanh, minus_log), gaussian()).fit(RIGHT)


class Doubling(StandardScaler):
    """A transformer of a user, by inheritance and with its own log-determinant."""

    def transform(self, X):
        return 2.0 * super().transform(X)

    def inverse_transform(self, X):
        return super().inverse_transform(np.asarray(X) / 2.0)


class SaysIt(Doubling):
    def log_abs_det_jacobian(self, X):
        return np.full(len(X), np.log(2.0 / self.scale_).sum())


def test_a_transformer_that_says_its_log_determinant(X3):
    same = pipeline(gaussian()).fit(X3).score_samples(X3)
    np.testing.assert_allclose(pipeline(SaysIt(), gaussian()).fit(X3).score_samples(X3), same)


@pytest.mark.parametrize(
    ("transformer", "words"),
    [
        (PCA(2), "'step0', PCA, keeps 2 of 3"),
        (PCA(0.5), "'step0', PCA, keeps 1 of 3"),
        (QuantileTransformer(n_quantiles=10), "'step0', QuantileTransformer"),
        (Normalizer(), "'step0', Normalizer"),
        (PolynomialFeatures(), "'step0', PolynomialFeatures"),
        (FunctionTransformer(np.exp), "'step0'.*has no log-determinant"),
        (FactorAnalysis(), "'step0', FactorAnalysis"),
        (make_pipeline(StandardScaler()), "'step0', Pipeline"),
        (Doubling(), "'step0', Doubling"),
    ],
)
def test_what_is_not_invertible_is_refused_by_name(transformer, words, X3):
    with pytest.raises(ValueError, match=words):
        pipeline(transformer, gaussian()).fit(X3)


def test_a_rotation_of_a_plane_in_space_is_refused(X3):
    flat = np.column_stack([X3[:, :2], X3[:, :2].sum(axis=1)])
    for whiten in (False, True):
        with pytest.raises(ValueError, match="'step0', PCA: the rows lie in fewer than 3"):
            pipeline(PCA(whiten=whiten), gaussian()).fit(flat)


@pytest.mark.parametrize("last", [LogisticRegression(), IsolationForest(), PCA(), "passthrough"])
def test_the_last_step_has_to_be_a_density(last, X3):
    with pytest.raises(ValueError, match="last step, 'density', must be a density"):
        pipeline(StandardScaler(), last).fit(X3)


@pytest.mark.filterwarnings("ignore:One or more of the test scores")
def test_a_search_over_scalers_compares_in_the_units_of_x(X3):
    scalers = [StandardScaler(), MinMaxScaler(), RobustScaler(), PCA(whiten=True), "passthrough"]
    search = GridSearchCV(pipeline("passthrough", gaussian()), {"step0": [*scalers, PCA(2)]}, cv=3)
    with pytest.warns(FitFailedWarning, match="step 'step0', PCA, keeps 2 of 3"):
        search.fit(X3)
    scores = search.cv_results_["mean_test_score"]
    np.testing.assert_allclose(scores[:-1], scores[0], rtol=1e-6)  # a Gaussian is a Gaussian
    assert np.isnan(scores[-1])
    # where the columns are wide, fewer of them win in a plain pipeline
    wide = 100.0 * X3
    plain = Pipeline([("step0", PCA(2)), ("density", gaussian())])
    assert (
        cross_val_score(plain, wide, cv=3).mean() > cross_val_score(gaussian(), wide, cv=3).mean()
    )


def test_rows_outside_of_the_domain_have_no_density():
    X = np.column_stack([RIGHT[:200], RIGHT[200:]])
    for transformer in (PowerTransformer("box-cox"), log_transformer()):
        density = pipeline(StandardScaler(with_mean=False), transformer, gaussian()).fit(X)
        rows = np.r_[X[:3], [[-1.0, 2.0], [1.0, 0.0]], X[3:5]]
        scores = density.score_samples(rows)
        assert np.isneginf(scores[3:5]).all()
        np.testing.assert_array_equal(np.delete(scores, [3, 4]), density.score_samples(X[:5]))
        assert np.isneginf(density.score_samples(rows[3:5])).all()
    density = pipeline(MinMaxScaler(clip=True), gaussian()).fit(X)
    assert np.isneginf(density.score_samples(X.max(axis=0, keepdims=True) + 1.0)).all()
    assert np.isfinite(density.score_samples(X)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_powers_that_overflow_have_no_density(sign):
    X = np.linspace(1.0, 2.0, 50)[:, None] ** 0.3
    for method in ("yeo-johnson", "box-cox") if sign > 0 else ("yeo-johnson",):
        density = pipeline(PowerTransformer(method), gaussian()).fit(sign * X)
        power = density[0].lambdas_[0]
        assert power > 1.5 if sign > 0 else power < 0.5
        scores = density.score_samples(sign * np.r_[X[:2], [[1e300]]])
        assert np.isfinite(scores[:2]).all()
        assert scores[2] == -np.inf


def test_a_density_with_no_mass_in_the_image_is_an_error():
    class Elsewhere(GaussianMixture):
        def sample(self, n_samples=1):
            return np.full((n_samples, 1), -5.0), None

    exp = InvertibleFunctionTransformer(np.exp, np.log, identity)
    with pytest.raises(ValueError, match="none of 20000 draws"):
        pipeline(exp, Elsewhere()).fit(EVEN)


def test_an_unusable_column_is_named(X3):
    pandas = pytest.importorskip("pandas")
    bad = pandas.DataFrame(X3, columns=["a", "b", "c"])
    density = pipeline(StandardScaler(), gaussian()).fit(bad)
    bad.loc[4, "b"] = np.inf
    for call in (density.score_samples, density.fit):
        with pytest.raises(ValueError, match="column 'b' of X"):
            call(bad)
    with pytest.raises(ValueError, match="X has 2 features"):
        density.score_samples(X3[:, :2])


# ---------------------------------------------------------------------- densities of ours


def test_units_and_standard_errors_of_ours(X3):
    tilted = base_alone(energy_model=Boosting(max_iter=5), base="gmm")
    density = pipeline(RobustScaler(), tilted).fit(X3)
    z, inner = density[0].transform(X3), density[-1]
    log_det = -np.log(density[0].scale_).sum()
    value, error = density.score_samples(X3, return_std=True)
    inside, own = inner.score_samples(z, return_std=True)
    np.testing.assert_allclose(value, inside + log_det)
    np.testing.assert_array_equal(error, own)
    assert density.offset_ == pytest.approx(inner.offset_ + log_det)
    np.testing.assert_allclose(density.out_of_fold_scores_, inner.out_of_fold_scores_ + log_det)
    np.testing.assert_allclose(density.decision_function(X3), value - density.offset_)
    np.testing.assert_array_equal(density.predict(X3), inner.predict(z))
    with pytest.raises(ValueError, match="return_std=True: GaussianMixture"):
        pipeline(StandardScaler(), gaussian()).fit(X3).score_samples(X3, return_std=True)


def test_the_error_of_the_mass_is_part_of_the_standard_error():
    density = pipeline(MinMaxScaler(clip=True), base_alone()).fit(EVEN)
    assert density.log_image_mass_std_error_ > 0
    error = density.score_samples(EVEN, return_std=True)[1]
    np.testing.assert_allclose(error, density.log_image_mass_std_error_)


def test_the_threshold_is_one_of_densities_of_x():
    """Behind a logarithm, the rows of lowest density are others than before it."""
    X = np.exp(np.random.default_rng(0).normal(size=(800, 1)))
    new = np.exp(np.random.default_rng(1).normal(size=(4000, 1)))
    density = pipeline(log_transformer(), base_alone()).fit(X)
    assert (density.predict(new) == -1).mean() == pytest.approx(0.05, abs=0.015)
    assert (density.fit_predict(X) == -1).mean() == pytest.approx(0.05, abs=0.002)
    scores = density.score_samples(new)
    np.testing.assert_array_equal(density.predict(new) == -1, scores < density.offset_)
    assert (density.predict(new) != density[-1].predict(np.log(new))).any()
    density.set_params(density__contamination=0.2)
    assert (density.fit_predict(X) == -1).mean() == pytest.approx(0.2, abs=0.002)
    assert (density.predict(X) == -1).mean() == pytest.approx(0.2, abs=0.002)


def test_p_values_are_those_behind_the_transformers():
    X = np.exp(np.random.default_rng(0).normal(size=(300, 2)))
    new = np.exp(np.random.default_rng(1).normal(size=(200, 2)))
    density = pipeline(log_transformer(), OutlierDetector(random_state=0)).fit(X)
    direct = OutlierDetector(random_state=0).fit(np.log(X))
    np.testing.assert_allclose(density.p_values(new), direct.p_values(np.log(new)))
    far = np.array([[1e4, 1e-4], [1.0, 1.0], [-1.0, 1.0]])  # the last one has no logarithm
    p_values = density.p_values(far)
    assert p_values[2] == direct._calibration.least
    np.testing.assert_array_equal(density.discoveries(far, fdr=0.1), [True, False, True])
    with pytest.raises(ValueError, match="fdr=2 must be a number between 0 and 1"):
        density.discoveries(far, fdr=2)
    assert not hasattr(pipeline(log_transformer(), base_alone()), "p_values")


@pytest.mark.parametrize(
    "scaler",
    [StandardScaler(), MinMaxScaler((0, 2)), RobustScaler(), MaxAbsScaler(), PowerTransformer()],
)
def test_constant_columns_are_a_point_mass(scaler, X3):
    X = np.insert(X3, 1, 0.1, axis=1)
    with_it = pipeline(clone(scaler), base_alone()).fit(X)
    without = pipeline(clone(scaler), base_alone()).fit(X3)
    difference = with_it.score_samples(X) - without.score_samples(X3)
    np.testing.assert_allclose(difference, difference[0], atol=1e-9)
    # the point mass may have a little less than one
    assert -0.01 < difference[0] <= 1e-9
    drawn = with_it.sample(20, random_state=0)
    assert (drawn[:, 1] == 0.1).all()
    np.testing.assert_allclose(with_it.score_samples(drawn) > -np.inf, True)


@pytest.mark.parametrize("scaler", [StandardScaler(), PowerTransformer()])
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_a_constant_column_is_met_within_the_precision_of_what_is_given(scaler, dtypes, X3):
    X = np.insert(X3.round(2), 1, 0.1, axis=1)
    density = pipeline(clone(scaler), base_alone()).fit(X.astype(dtypes[0]))
    same, other = (density.score_samples(X[:20].astype(dtype)) for dtype in dtypes)
    np.testing.assert_allclose(same, other, atol=1e-3)
    assert (density.score_samples(X[:20] + [0, 1e-3, 0, 0]) < same - 3.0).all()


def test_weights_reach_all_steps_and_zero_is_absence(X3):
    weight = np.random.default_rng(0).integers(0, 3, len(X3)).astype(float)
    X = X3.copy()
    X[weight == 0] *= 1e6
    used = weight > 0
    for scaler in (StandardScaler(), RobustScaler()):
        density = pipeline(clone(scaler), base_alone(contamination=0.1))
        left_out = clone(density).fit(X3[used], sample_weight=weight[used])
        density.fit(X, sample_weight=weight)
        np.testing.assert_array_equal(density.score_samples(X3), left_out.score_samples(X3))
        assert density.offset_ == left_out.offset_
        assert density.out_of_fold_scores_.shape == (used.sum(),)
    by_step = pipeline(RobustScaler(), base_alone()).fit(X, density__sample_weight=weight)
    both = pipeline(RobustScaler(), base_alone()).fit(X, sample_weight=weight)
    assert by_step.offset_ == both.offset_
    labels = density.fit_predict(X, sample_weight=weight)
    assert labels.shape == (len(X),)
    assert (labels[~used] == -1).all()
    with pytest.raises(TypeError, match="GaussianMixture.fit takes no weights"):
        pipeline(StandardScaler(), gaussian()).fit(X, sample_weight=weight)


def test_weights_are_routed(X3):
    weight = np.random.default_rng(0).integers(0, 3, len(X3)).astype(float)
    expected = pipeline(RobustScaler(), base_alone()).fit(X3, sample_weight=weight)
    with sklearn.config_context(enable_metadata_routing=True):
        inner = base_alone().set_fit_request(sample_weight=True)
        routed = pipeline(RobustScaler(), inner.set_score_request(sample_weight=False))
        routed.fit(X3, sample_weight=weight)
    assert routed.offset_ == expected.offset_


def test_it_is_a_pipeline(X3, tmp_path):
    density = DensityPipeline([("scale", StandardScaler()), ("density", KernelDensity())])
    assert density.get_params()["density__bandwidth"] == 1.0
    with pytest.raises(NotFittedError):
        density.score_samples(X3)
    with pytest.raises(AttributeError):
        density.predict(X3)
    assert not hasattr(density, "decision_function")
    density.set_params(density__bandwidth=0.3, memory=str(tmp_path)).fit(X3)
    assert type(density[:-1]) is Pipeline
    assert density[:-1].transform(X3).std() == pytest.approx(1.0)
    with pytest.raises(NotFittedError):
        density[1:].score_samples(X3)
    copy = clone(density).fit(X3)
    again = pickle.loads(pickle.dumps(density))
    for other in (copy, again):
        np.testing.assert_array_equal(other.score_samples(X3), density.score_samples(X3))
    # all rows of this one are drawn from different kernels, and none is lost or doubled
    assert len(np.unique(density.sample(500, random_state=0), axis=0)) == 500


def test_it_knows_its_columns_behind_a_passthrough(X3):
    density = pipeline("passthrough", StandardScaler(), gaussian()).fit(X3)
    assert density.n_features_in_ == 3
    assert not hasattr(density, "feature_names_in_")
    assert pipeline(None, gaussian()).fit(X3).n_features_in_ == 3


def test_a_refit_that_fails_leaves_no_old_figures(X3):
    density = pipeline(StandardScaler(), gaussian()).fit(X3)
    density.set_params(step0=Normalizer())
    with pytest.raises(ValueError, match="Normalizer"):
        density.fit(X3)
    with pytest.raises(NotFittedError):
        density.score_samples(X3)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames(library, X3):
    module = pytest.importorskip(library)
    X = np.exp(X3 / X3.std(axis=0))
    frame = module.DataFrame(dict(zip("abc", X.T, strict=True)))
    density = pipeline(log_transformer(), PowerTransformer(), SaysIt(), base_alone())
    bare = clone(density).fit(X)
    density[:-1].set_output(transform=library)
    density.fit(frame)
    assert list(density.feature_names_in_) == list("abc")
    assert list(density[-1].feature_names_in_) == list("abc")
    np.testing.assert_allclose(density.score_samples(frame), bare.score_samples(X))
    np.testing.assert_allclose(density.sample(5, 0), bare.sample(5, 0))
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame[["b", "a", "c"]])


def test_a_latent_variable_model_still_transforms(X3):
    vae = ImplicitVAE(n_components=2, max_epochs=0, n_importance_samples=20, random_state=0)
    density = pipeline(StandardScaler(), vae)
    latent = density.fit_transform(X3)
    assert latent.shape == (len(X3), 2)
    np.testing.assert_array_equal(density.transform(X3), latent)
    assert np.isfinite(density.score(X3[:20]))


def test_steps_of_the_sampler_are_passed_on(X3):
    density = pipeline(StandardScaler(), base_alone()).fit(X3)
    moved = density.sample(50, random_state=0, n_steps=5)
    assert (moved != density.sample(50, random_state=0)).any()
    with pytest.raises(ValueError, match="n_samples"):
        density.sample(0)
