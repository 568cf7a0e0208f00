"""Pipelines before a density with values of their own and missing cells."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import MinMaxScaler, PowerTransformer, StandardScaler

from skebm import NCEDensity
from skebm.compose import DensityPipeline

DENSITY = {"base": "gmm", "energy_model": None, "n_members": 2, "random_state": 0}


def table(n=800, seed=0):
    """An amount that often is zero, an age with holes, and a number; positive."""
    rng = np.random.default_rng(seed)
    amount = np.where(rng.random(n) < 0.3, 0.0, rng.lognormal(1.0, 0.5, n))
    age = np.where(rng.random(n) < 0.2, np.nan, rng.normal(40.0, 5.0, n))
    return np.c_[amount, age, rng.gamma(3.0, size=n)]


@pytest.mark.parametrize("scaler", [StandardScaler(), MinMaxScaler((-1, 2), clip=True)])
def test_units_of_x_come_back_where_there_is_a_value(scaler):
    X = table()
    direct = NCEDensity(**DENSITY).fit(X)
    pipeline = DensityPipeline([("scale", scaler), ("density", NCEDensity(**DENSITY))]).fit(X)
    assert pipeline[-1].columns_[0].atoms
    assert pipeline[-1].columns_[1].missing
    gap = pipeline.score_samples(X) - direct.score_samples(X) + pipeline.log_image_mass_
    np.testing.assert_allclose(gap, 0.0, atol=1e-6)
    np.testing.assert_allclose(
        pipeline.decision_function(X), direct.decision_function(X), atol=1e-6
    )
    np.testing.assert_array_equal(pipeline.predict(X), direct.predict(X))
    drawn = pipeline.sample(400, random_state=0)
    assert np.isnan(drawn[:, 1]).mean() == pytest.approx(0.2, abs=0.08)
    assert (np.abs(drawn[:, 0]) < 1e-9).mean() == pytest.approx(0.3, abs=0.08)


def test_the_mass_of_an_atom_is_no_density():
    """Behind a map of single columns the probability of zero is what it was."""
    X = table()[:, [0, 2]] + [1.0, 0.0]
    pipeline = DensityPipeline(
        [("power", PowerTransformer("box-cox")), ("density", NCEDensity(**DENSITY))]
    ).fit(X)
    grid = np.linspace(1e-3, 25.0, 8_001)
    rows = np.c_[np.ones_like(grid), grid]
    total = np.exp(pipeline.score_samples(rows)).sum() * (grid[1] - grid[0])
    assert total == pytest.approx((X[:, 0] == 1.0).mean(), abs=0.02)


def test_missing_cells_where_they_have_no_place():
    X = table()
    with pytest.raises(ValueError, match="NaN"):
        DensityPipeline([("pca", PCA()), ("density", NCEDensity(**DENSITY))]).fit(X)
    refusing = NCEDensity(**DENSITY, handle_missing="error")
    with pytest.raises(ValueError, match="column 1 of X contains NaN or infinity"):
        DensityPipeline([("scale", StandardScaler()), ("density", refusing)]).fit(X)
