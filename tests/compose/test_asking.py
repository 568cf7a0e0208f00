"""Questions about some cells through a pipeline: in the units of X, inside the image."""

import math
import pickle

import numpy as np
import pytest
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import MinMaxScaler, PowerTransformer, RobustScaler, StandardScaler

from skebm import UNKNOWN, ImplicitVAE, NCEDensity, Network
from skebm.compose import DensityPipeline, InvertibleFunctionTransformer
from skebm.exceptions import LowEffectiveSampleSizeWarning

pd = pytest.importorskip("pandas")

MEAN = np.array([1.0, 2.0, 0.5])
COVARIANCE = np.array([[0.25, 0.15, 0.02], [0.15, 0.16, 0.01], [0.02, 0.01, 0.09]])


def log_normal_rows(n=1500, seed=0):
    return np.exp(np.random.default_rng(seed).multivariate_normal(MEAN, COVARIANCE, n))


def minus_log(X):
    return -np.log(X)


def reciprocal(X):
    return 1.0 / X


def log_slope_of_reciprocal(X):
    return -2.0 * np.log(np.abs(X))


def log_transformer():
    return InvertibleFunctionTransformer(np.log, np.exp, minus_log)


def density(**particular):
    options = {"base": "gaussian", "energy_model": None, "n_members": 2, "random_state": 0}
    return NCEDensity(**options | particular)


def pipeline(transformer, last=None):
    return DensityPipeline([("map", transformer), ("density", last or density())])


def table(n=300, seed=0):
    """An amount that often is zero, an age with holes, one that hangs on both, and a constant."""
    rng = np.random.default_rng(seed)
    amount = np.where(rng.random(n) < 0.3, 0.0, rng.lognormal(1.0, 0.5, n))
    age = rng.normal(40.0, 5.0, n)
    other = rng.gamma(3.0, size=n) + 0.3 * amount + 0.2 * age
    age[rng.random(n) < 0.2] = np.nan
    return np.c_[amount, age, other, np.full(n, 0.1)]


@pytest.fixture(scope="module")
def log_normal():
    """Fitted to log-normal rows behind a logarithm, and the same density without it."""
    X = log_normal_rows()
    behind = density().fit(np.log(X))
    return pipeline(log_transformer()).fit(X), behind, X


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("transformer", [log_transformer(), PowerTransformer("box-cox")])
def test_moments_of_a_log_normal(transformer):
    """Mean and deviation are those of exp(b), and not exp of the mean of b."""
    fitted = pipeline(transformer).fit(log_normal_rows(20_000))
    x = np.array([2.0, 3.0, 5.0])
    gain = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    center = MEAN[1] + gain * (np.log(x) - MEAN[0])
    variance = COVARIANCE[1, 1] - gain * COVARIANCE[0, 1]
    wanted = np.exp(center + 0.5 * variance)
    given = fitted.condition({0: x})
    np.testing.assert_allclose(given.mean(1), wanted, rtol=0.02)
    np.testing.assert_allclose(given.std(1), wanted * math.sqrt(math.expm1(variance)), rtol=0.05)
    conditional = stats.lognorm(math.sqrt(variance), scale=np.exp(center))
    np.testing.assert_allclose(given.quantile(1, 0.9), conditional.ppf(0.9), rtol=0.03)
    np.testing.assert_allclose(
        given.probability(1, 4.0, 8.0), conditional.cdf(8.0) - conditional.cdf(4.0), atol=0.02
    )
    found = fitted.marginal([0]).score_samples(x[:, None])
    of_one = stats.lognorm(math.sqrt(COVARIANCE[0, 0]), scale=math.exp(MEAN[0]))
    np.testing.assert_allclose(found, of_one.logpdf(x), atol=0.05)


def test_one_open_cell_is_integrated_in_the_units_of_x(log_normal):
    """The moments of the Gaussians that were fitted, in closed form."""
    fitted, behind, X = log_normal
    columns, members = behind._columns, behind.model_.bases
    z = (np.log(X[:4]) - columns.center) / columns.scale
    first, weights = [], []
    for q in members:
        covariance = (q.scale_tril[0] @ q.scale_tril[0].mT).numpy()
        mean = q.means[0].numpy()
        slope = np.linalg.solve(covariance[:2, :2], covariance[:2, 2])
        center = columns.center[2] + columns.scale[2] * (mean[2] + (z[:, :2] - mean[:2]) @ slope)
        variance = columns.scale[2] ** 2 * (covariance[2, 2] - covariance[:2, 2] @ slope)
        first.append(np.exp(center + 0.5 * variance))
        weights.append(stats.multivariate_normal(mean[:2], covariance[:2, :2]).pdf(z[:, :2]))
    wanted = np.average(first, weights=weights, axis=0)
    given = fitted.condition({0: X[:4, 0], 1: X[:4, 1]})
    np.testing.assert_allclose(given.mean(2), wanted, rtol=2e-3)
    assert np.isinf(given.effective_sample_size).all()


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize("asked", [[0], [2], [0, 2], [0, 1, 2]])
def test_densities_are_those_of_transformed_columns_times_derivatives(log_normal, asked):
    fitted, behind, X = log_normal
    rows, others = X[:5], [j for j in range(3) if j not in asked]
    wanted = behind.marginal(asked).score_samples(np.log(rows[:, asked]))
    found = fitted.marginal(asked).score_samples(rows[:, asked])
    np.testing.assert_allclose(found, wanted - np.log(rows[:, asked]).sum(1), atol=1e-9)
    if others:
        given = fitted.condition({j: rows[:, j] for j in asked})
        of_logs = behind.condition({j: np.log(rows[:, j]) for j in asked})
        wanted = of_logs.score_samples(np.log(rows[:, others])) - np.log(rows[:, others]).sum(1)
        np.testing.assert_allclose(given.score_samples(rows[:, others]), wanted, atol=1e-9)
        np.testing.assert_allclose(
            given.quantile(others[0], [0.1, 0.9]),
            np.exp(of_logs.quantile(others[0], [0.1, 0.9])),
            rtol=1e-3,  # between two completions the one is straight in x, and the other in log x
        )
        np.testing.assert_allclose(given.log_density_given, found, atol=1e-9)


def test_chain_of_transformers_and_of_probabilities():
    X = log_normal_rows()
    fitted = DensityPipeline(
        [("log", log_transformer()), ("scale", RobustScaler()), ("power", PowerTransformer()),
         ("density", density())]
    ).fit(X)  # fmt: skip
    given = fitted.condition({0: X[:5, 0], 2: X[:5, 2]})
    np.testing.assert_allclose(
        given.log_density_given + given.score_samples(X[:5, [1]]),
        fitted.score_samples(X[:5]),
        atol=1e-9,
    )
    grid = np.linspace(0.3, 60.0, 4001)
    for i, row in enumerate(X[:5]):
        rows = np.repeat(row[None], len(grid), axis=0)
        rows[:, 1] = grid
        total = np.trapezoid(np.exp(fitted.score_samples(rows)), grid)
        assert given.log_density_given[i] == pytest.approx(math.log(total), abs=2e-3)


def test_a_falling_map_turns_quantiles_round():
    X = log_normal_rows()
    rising = pipeline(log_transformer()).fit(X)
    falling = DensityPipeline(
        [("turn", InvertibleFunctionTransformer(reciprocal, reciprocal, log_slope_of_reciprocal)),
         ("log", log_transformer()), ("density", density())]
    ).fit(X)  # fmt: skip
    one, other = rising.condition({0: 3.0}), falling.condition({0: 3.0})
    levels = [0.05, 0.5, 0.95]
    np.testing.assert_allclose(other.quantile(1, levels), one.quantile(1, levels), rtol=0.02)
    assert (np.diff(other.quantile(1, levels)) > 0).all()
    assert other.probability(1, 0.0, 8.0)[0] == pytest.approx(
        one.probability(1, 0.0, 8.0)[0], abs=0.01
    )
    np.testing.assert_allclose(other.mean(1), one.mean(1), rtol=0.01)
    np.testing.assert_allclose(
        other.score_samples([[6.0, 2.0]]), one.score_samples([[6.0, 2.0]]), atol=1e-3
    )


@pytest.mark.parametrize("scaler", [StandardScaler(), MinMaxScaler((-1, 2))])
def test_scalers_change_nothing(scaler):
    """With atoms, missing cells and a constant column."""
    X = table()
    direct = density(base="gmm").fit(X)
    fitted = pipeline(scaler, density(base="gmm")).fit(X)
    assert len(fitted[-1]._columns.states) == 2
    rows = X[:8]
    np.testing.assert_allclose(
        fitted.marginal([0, 1]).score_samples(rows[:, :2]),
        direct.marginal([0, 1]).score_samples(rows[:, :2]),
        atol=1e-6,
    )
    one, other = (est.condition({2: rows[:, 2], 1: rows[:, 1]}) for est in (direct, fitted))
    assert other.columns == one.columns == [0, 3]
    np.testing.assert_allclose(other.mean(0), one.mean(0), rtol=1e-6)
    np.testing.assert_allclose(other.std(0), one.std(0), rtol=1e-6)
    np.testing.assert_allclose(
        other.probability(0, -1e-6, 1e-6), one.probability(0, -1e-6, 1e-6), atol=1e-9
    )
    assert (other.probability(0, -1e-6, 1e-6) > 0.05).all()  # the atom
    np.testing.assert_allclose(
        other.score_samples(rows[:, [0, 3]]), one.score_samples(rows[:, [0, 3]]), atol=1e-6
    )
    one, other = direct.explain(rows), fitted.explain(rows)
    assert other.columns == one.columns
    for name in ("surprise", "excess", "expected", "values"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), atol=1e-5)
    drawn = fitted.sample(200, random_state=0, given={0: 0.0})
    assert (drawn[:, [0, 3]] == [0.0, 0.1]).all()
    assert 0.05 < np.isnan(drawn[:, 1]).mean() < 0.4
    complete = fitted.condition({0: 0.0}).sample(200, random_state=0, complete=True)
    assert not np.isnan(complete).any()


def test_atoms_keep_their_mass_behind_a_curved_map():
    """What is known of the cell is a probability, without a derivative."""
    X = table()[:, [0, 2]] + 1.0
    fitted = pipeline(PowerTransformer("box-cox"), density(base="gmm")).fit(X)
    other = fitted.marginal([0])
    share = (X[:, 0] == 1.0).mean()
    assert math.exp(other.score_samples([[1.0]])[0]) == pytest.approx(share, abs=0.02)
    grid = np.linspace(1.0001, 40.0, 801)
    numbers = np.trapezoid(np.exp(other.score_samples(grid[:, None])), grid)
    assert numbers + share == pytest.approx(1.0, abs=0.02)
    given = fitted.condition({1: [6.0]})
    drawn = given.sample(2000, random_state=0)[:, 0]
    assert np.isclose(drawn, 1.0, atol=1e-9).mean() == pytest.approx(
        given.probability(0, 1.0 - 1e-6, 1.0 + 1e-6)[0], abs=0.04
    )


# ---------------------------------------------------------------------- the image


@pytest.fixture(scope="module")
def clipped():
    """Much of the density is outside of the unit square: rows are nearly even, and depend."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1.0, 3.0, 500)
    X = np.column_stack([x, 5.0 + 4.0 * (0.6 * (x - 1.0) / 2.0 + 0.4 * rng.random(500))])
    fitted = pipeline(MinMaxScaler(clip=True)).fit(X)
    assert fitted.log_image_mass_ < -0.05
    return fitted, X


def test_conditionals_are_normalised_over_the_image(clipped):
    fitted, X = clipped
    low, high = X[:, 1].min(), X[:, 1].max()
    grid = np.linspace(low, high, 2001)[:, None]
    x = np.array([1.05, 2.0, 2.95])
    given = fitted.condition({0: x})
    marginal, error = fitted.marginal(0).score_samples(x[:, None], return_std=True)
    for i, one in enumerate(x):
        joint = np.exp(fitted.score_samples(np.column_stack([np.full(2001, one), grid])))
        total = np.trapezoid(joint, grid[:, 0])
        assert marginal[i] == pytest.approx(math.log(total), abs=0.01)
        mean = np.trapezoid(joint * grid[:, 0], grid[:, 0]) / total
        assert given.mean(1)[i] == pytest.approx(mean, abs=0.02)
        share = np.trapezoid(joint[:800], grid[:800, 0]) / total
        assert given.probability(1, low, grid[799, 0])[i] == pytest.approx(share, abs=0.01)
    np.testing.assert_allclose(given.log_density_given, marginal)
    assert (error >= fitted.log_image_mass_std_error_).all()
    # which no conditional depends on
    _, own = given.score_samples(np.full((3, 1), 7.0), return_std=True)
    np.testing.assert_allclose(
        np.square(own) + fitted.log_image_mass_std_error_**2, np.square(given.std_error_given)
    )


def test_stated_errors_of_what_is_cut_off(clipped):
    fitted, X = clipped
    grid = np.linspace(X[:, 1].min(), X[:, 1].max(), 2001)
    x = np.linspace(1.1, 2.9, 60)
    found, error = fitted.marginal(0).score_samples(x[:, None], return_std=True)
    rows = np.column_stack([np.repeat(x, 2001), np.tile(grid, 60)])
    joint = np.exp(fitted.score_samples(rows)).reshape(60, -1)
    gap = found - np.log(np.trapezoid(joint, grid, axis=1))
    own = np.sqrt(np.square(error) - fitted.log_image_mass_std_error_**2)  # which is in both
    cut = own > 1e-6
    assert 30 < cut.sum() < 60
    assert np.sqrt(np.mean(np.square(gap[cut] / own[cut]))) < 1.5
    assert np.abs(gap[cut]).max() < 0.01
    assert np.abs(gap[~cut]).max() < 2e-4


def log_slope_of_root(X):
    return -np.log(2.0 * np.sqrt(X))


@pytest.fixture(scope="module")
def roots():
    """A Gaussian of square roots, of which the second falls to zero where the first is near 1."""
    rng = np.random.default_rng(0)
    z = rng.random(500)
    z = np.column_stack([z, np.abs(1.0 - z + 0.1 * rng.normal(size=500))])
    root = InvertibleFunctionTransformer(np.sqrt, np.square, log_slope_of_root)
    return pipeline(root, density(n_members=1)).fit(np.square(z))


def test_conditionals_are_those_of_a_truncated_gaussian(roots):
    """Of which up to 97 % are outside of the image."""
    columns, (q,) = roots[-1]._columns, roots[-1].model_.bases
    covariance = (q.scale_tril[0] @ q.scale_tril[0].mT).numpy()
    covariance *= np.outer(columns.scale, columns.scale)
    mean = columns.center + columns.scale * q.means[0].numpy()
    z = np.array([0.5, 1.0, 1.1, 1.2])
    gain = covariance[0, 1] / covariance[0, 0]
    center = mean[1] + gain * (z - mean[0])
    deviation = math.sqrt(covariance[1, 1] - gain * covariance[0, 1])
    cut = stats.truncnorm(-center / deviation, np.inf, center, deviation)
    given = roots.condition({0: z**2}, n_draws=4096)
    share = stats.norm.sf(0.0, center, deviation)
    assert share[-1] < 0.03
    size = np.sqrt((1.0 - share) / (4096 * share)) + 1e-3
    assert (np.abs(given.mean(1) / (cut.mean() ** 2 + cut.var()) - 1.0) < 4.0 * size).all()
    found = given.score_samples(np.full((4, 1), 0.2**2))
    assert (np.abs(found - cut.logpdf(0.2) + math.log(2.0 * 0.2)) < 4.0 * size).all()
    drawn = np.sqrt(given.sample(500, random_state=0)).reshape(4, 500)
    for i, rows in enumerate(drawn):
        own = stats.truncnorm(-center[i] / deviation, np.inf, center[i], deviation)
        assert stats.kstest(rows, own.cdf).pvalue > 1e-3


def test_conditionals_that_have_nothing_in_the_image(roots):
    with pytest.warns(LowEffectiveSampleSizeWarning, match="fewer than 32 effective"):
        assert roots.marginal(0).score_samples([[9.0]])[0] == -np.inf
    with pytest.raises(ValueError, match="row 0 of given: hardly any completion of it has"):
        roots.condition({0: 9.0}).sample(3)
    rng = np.random.default_rng(1)
    z = rng.random(400)
    z = np.column_stack([z, np.abs(1.0 - z + 0.1 * rng.normal(size=400))])
    vae = ImplicitVAE(n_components=1, max_epochs=0, random_state=0)
    latent = pipeline(roots[0], vae).fit(np.square(z))
    with pytest.raises(ValueError, match="row 1 of given: hardly any completion of it has an x"):
        latent.condition({0: [0.25, 9.0]}).sample(3)


def test_draws_are_inside_the_image(clipped):
    fitted, X = clipped
    for given in (fitted.condition({0: [1.05, 2.95]}), fitted.condition({0: UNKNOWN, 1: X[0, 1]})):
        drawn = given.sample(1000, random_state=0)
        assert not np.isnan(drawn).any()
        j = given.columns[0]
        assert (drawn >= X[:, j].min()).all()
        assert (drawn <= X[:, j].max()).all()
        np.testing.assert_allclose(
            drawn.reshape(-1, 1000).mean(1), given.mean(j), atol=0.1 * X[:, j].std()
        )
        np.testing.assert_array_equal(drawn, given.sample(1000, random_state=0))


def test_what_is_outside_of_the_domain(log_normal, clipped):
    fitted, *_ = log_normal
    with pytest.raises(ValueError, match="row 1 of given: column 0 has -1, which is outside of"):
        fitted.condition({0: [2.0, -1.0]})
    with pytest.raises(ValueError, match="row 0 of X: column 2 has 0, which is outside of the dom"):
        fitted.explain([[1.0, 1.0, 0.0]])
    assert fitted.marginal([0]).score_samples([[2.0], [-1.0]])[1] == -np.inf
    assert fitted.condition({0: 2.0}).score_samples([[1.0, -1.0]])[0] == -np.inf
    with pytest.raises(ValueError, match="column 0 has 4, which is outside"):
        clipped[0].condition({0: 4.0})


# ---------------------------------------------------------------------- tables, and other densities


def test_columns_by_name():
    X = pd.DataFrame(log_normal_rows(), columns=["a", "b", "c"])
    for output in ("default", "pandas"):
        scaler = PowerTransformer("box-cox").set_output(transform=output)
        fitted = pipeline(scaler).fit(X)
        given = fitted.condition({"c": [1.0, 2.0]})
        assert given.columns == ["a", "b"]
        assert given.sample(3, random_state=0).shape == (6, 2)
        assert given.score_samples(X[["b", "a"]].head(2)) == pytest.approx(
            fitted.score_samples(X.head(2).assign(c=[1.0, 2.0])) - given.log_density_given
        )
        explanation = fitted.explain(X[["c", "a", "b"]].head(2))
        assert explanation.columns == [("a",), ("b",), ("c",)]
        np.testing.assert_array_equal(explanation.values, X.head(2))
    with pytest.raises(ValueError, match="given has a column 'd', which fit has not seen"):
        fitted.condition({"d": 1.0})
    with pytest.raises(ValueError, match="row 0 of X lacks a cell in column 'b'"):
        fitted.explain(X[["a", "c"]])


def test_explanations_name_the_altered_cell(log_normal):
    """A derivative that is large at small numbers makes no cell odd."""
    fitted, behind, X = log_normal
    found, wanted = fitted.explain(X[:20]), behind.explain(np.log(X[:20]))
    np.testing.assert_allclose(found.excess, wanted.excess, atol=1e-6)
    np.testing.assert_allclose(found.surprise, wanted.surprise + np.log(X[:20]), atol=1e-6)
    np.testing.assert_allclose(found.expected, np.exp(wanted.expected), rtol=2e-3)
    row = X[:1].copy()
    row[0, 1] *= 5.0
    assert fitted.explain(row).of_row(0)[0].columns == (1,)


def test_a_tilted_density():
    """The weights of completions are those of the density, whatever is in front of it."""
    X = np.exp(np.random.default_rng(0).uniform(-1.0, 1.0, (500, 2)))
    network = Network(hidden_layer_sizes=(32,), max_epochs=60)
    tilted = density(energy_model=network)
    fitted = pipeline(log_transformer(), tilted).fit(X)
    assert not fitted[-1].model_.is_untilted
    rows = X[:3]
    marginal, error = fitted.marginal(0).score_samples(rows[:, :1], return_std=True)
    grid = np.geomspace(1e-2, 1e2, 4001)
    for i, row in enumerate(rows):
        joint = np.exp(fitted.score_samples(np.column_stack([np.full(4001, row[0]), grid])))
        assert marginal[i] == pytest.approx(math.log(np.trapezoid(joint, grid)), abs=3e-3)
    assert (error > 0).all()
    given = fitted.condition({0: rows[:, 0]})
    _, error_given = given.score_samples(rows[:, 1:], return_std=True)
    assert (error_given < error + 1e-3).all()


def test_a_latent_variable_model(clipped):
    X = log_normal_rows()
    vae = ImplicitVAE(n_components=1, max_epochs=0, random_state=0)
    fitted, behind = pipeline(log_transformer(), vae).fit(X), pickle.loads(pickle.dumps(vae))
    behind.fit(np.log(X))
    np.testing.assert_allclose(
        fitted.marginal([0]).score_samples(X[:3, :1]),
        behind.marginal([0]).score_samples(np.log(X[:3, :1])) - np.log(X[:3, 0]),
        atol=1e-9,
    )
    # a part of it lies outside of an image
    cut = pipeline(MinMaxScaler(clip=True), vae).fit(clipped[1])
    value, error = cut.marginal(0).score_samples([[2.0]], return_std=True)
    grid = np.linspace(clipped[1][:, 1].min(), clipped[1][:, 1].max(), 801)
    joint = np.exp(cut.score_samples(np.column_stack([np.full(801, 2.0), grid])))
    assert abs(value[0] - math.log(np.trapezoid(joint, grid))) < 4 * error[0] + 0.01
    drawn = cut.condition({0: 2.0}).sample(500, random_state=0)
    assert (drawn >= grid[0]).all()
    assert (drawn <= grid[-1]).all()


def test_no_transformer_at_all():
    X = log_normal_rows(300)
    direct, fitted = density().fit(X), pipeline("passthrough").fit(X)
    np.testing.assert_allclose(
        fitted.condition({0: 2.0}).mean(1), direct.condition({0: 2.0}).mean(1)
    )


def test_transformers_that_mix_columns_are_refused():
    X = log_normal_rows(300)
    fitted = DensityPipeline([("turn", PCA()), ("density", density())]).fit(X)
    for ask in (
        lambda: fitted.condition({0: 1.0}),
        lambda: fitted.marginal([0]),
        lambda: fitted.explain(X[:2]),
        lambda: fitted.sample(2, given={0: 1.0}),
    ):
        with pytest.raises(ValueError, match="step 'turn', PCA, mixes columns"):
            ask()


def test_what_other_densities_do_not_know():
    fitted = pipeline(StandardScaler(), GaussianMixture(1)).fit(log_normal_rows(100))
    for question in ("condition", "marginal", "explain"):
        assert not hasattr(fitted, question)
    assert not hasattr(pipeline(StandardScaler()), "category_probabilities")
    with pytest.raises(ValueError, match="given: GaussianMixture has no conditionals"):
        fitted.sample(2, given={0: 1.0})
