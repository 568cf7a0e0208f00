"""Every distribution of mixed tables sums and integrates to one, and matches its sampler."""

import inspect
import pickle
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import expit, softmax

pd = pytest.importorskip("pandas")

from skebm import datasets
from skebm.datasets import (
    MIXED_DISTRIBUTIONS,
    BayesianNetwork,
    LatentClasses,
    MissingByValue,
    ZeroInflatedAmounts,
)


@dataclass
class Axis:
    """What a column can hold: states, and numbers in cells between edges."""

    states: tuple = ()
    edges: tuple = ()  # (low, high, number of cells)
    log: bool = False

    @property
    def inner(self):
        low, high, n = self.edges
        ends = np.log([low, high]) if self.log else [low, high]
        return np.linspace(*ends, n + 1)

    def cells(self):
        """A cell for every state and the middle of every interval, and their weights."""
        if not self.edges:
            return np.array(self.states, dtype=object), np.ones(len(self.states))
        middle = (self.inner[1:] + self.inner[:-1]) / 2
        width = np.diff(self.inner)
        if self.log:
            middle, width = np.exp(middle), np.exp(middle) * width
        return np.r_[self.states, middle], np.r_[np.ones(len(self.states)), width]

    def index(self, column):
        """Which cell each value is in; a number beyond the ends is in the last one there."""
        out = np.full(len(column), -1)
        for i, state in enumerate(self.states):
            out[column.isna() if state is None or state != state else column == state] = i
        rest = out < 0
        if self.edges:
            x = column[rest].to_numpy()
            x = np.log(x) if self.log else x
            out[rest] = len(self.states) + np.searchsorted(self.inner[1:-1], x)
        assert (out >= 0).all()
        return out

    def groups(self, n=5):
        """A coarser label of every cell: the larger counts are one, numbers are n bins."""
        first = np.minimum(np.arange(len(self.states)), 6)
        numbers = np.arange(self.edges[2] if self.edges else 0)
        return np.r_[first, len(self.states) + numbers * n // max(len(numbers), 1)]


AXES = {
    "latent_classes": {
        "colour": Axis(("blue", "green", "red", None)),
        "member": Axis((False, True)),
        "visits": Axis(tuple(range(25))),
        "height": Axis(edges=(130, 210, 40)),
        "weight": Axis(edges=(20, 120, 40)),
    },
    "missing_by_value": {
        "age": Axis(edges=(-30, 130, 60)),
        "pressure": Axis((np.nan,), edges=(40, 200, 60)),
        "income": Axis((np.nan,), edges=(-30, 110, 60)),
    },
    "zero_inflated_amounts": {
        "segment": Axis(("basic", "plus", "premium")),
        "amount": Axis((0.0,), edges=(0.1, 4000, 400), log=True),
    },
    "bayesian_network": {
        "region": Axis(("east", "north", "south", "west")),
        "age": Axis(edges=(-5, 105, 30)),
        "plan": Axis(("basic", "plus", "premium")),
        "member": Axis((False, True)),
        "spend": Axis(edges=(2.0, 8000, 40), log=True),
        "visits": Axis(tuple(range(21))),
    },
}


def grid(truth, axes):
    """All combinations of the cells of the axes as a frame, with their weights and indices."""
    parts = {name: axis.cells() for name, axis in axes.items()}
    at = np.indices([len(values) for values, _ in parts.values()]).reshape(len(parts), -1)
    columns = {
        name: pd.Series(values[i]) for (name, (values, _)), i in zip(parts.items(), at, strict=True)
    }
    frame = pd.DataFrame(columns).astype(truth.sample(2, random_state=0)[list(axes)].dtypes)
    weight = np.prod([w[i] for (_, w), i in zip(parts.values(), at, strict=True)], axis=0)
    return frame, weight, at


@pytest.mark.parametrize("name", MIXED_DISTRIBUTIONS)
def test_sums_to_one_and_matches_the_sampler(name):
    """Sums over states and integrals over numbers give one; counts of rows fit by chi-square."""
    truth, axes = MIXED_DISTRIBUTIONS[name], AXES[name]
    frame, weight, at = grid(truth, axes)
    mass = np.exp(truth.log_density(frame)) * weight
    assert mass.sum() == pytest.approx(1.0, abs=2e-4)

    n = 50_000
    X = truth.sample(n, random_state=2)
    groups = [axis.groups() for axis in axes.values()]
    shape = [group.max() + 1 for group in groups]

    def label(index):
        parts = [group[i] for group, i in zip(groups, index, strict=True)]
        return np.ravel_multi_index(parts, shape)

    rows = label([axis.index(X[column]) for column, axis in axes.items()])
    observed = np.bincount(rows, minlength=np.prod(shape))
    expected = n * np.bincount(label(at), weights=mass, minlength=np.prod(shape))
    kept = expected > 5
    assert kept.sum() >= 12
    observed = np.r_[observed[kept], observed[~kept].sum()]
    expected = np.r_[expected[kept], n - expected[kept].sum()]
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 5.0)).sum()
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-3


@pytest.mark.parametrize("name", MIXED_DISTRIBUTIONS)
def test_means_match_the_sampler(name):
    """Means of numbers, and entropies of each column given those before it, by quadrature."""
    truth, axes = MIXED_DISTRIBUTIONS[name], AXES[name]
    frame, weight, _ = grid(truth, axes)
    mass = np.exp(truth.log_density(frame)) * weight
    X = truth.sample(50_000, random_state=9)
    log_p, log_drawn = truth.log_conditionals(frame), truth.log_conditionals(X)
    pairs = [*zip(log_p[mass > 0].T, log_drawn.T, strict=True)]
    for column, kind in truth.columns.items():
        if kind in (int, float):
            both = (part[column].fillna(0.0).to_numpy() for part in (frame[mass > 0], X))
            pairs.append(tuple(both))
    for on_grid, drawn in pairs:
        mean = mass[mass > 0] @ on_grid
        assert drawn.mean() == pytest.approx(mean, abs=4 * drawn.std() / np.sqrt(len(X)))


@pytest.mark.parametrize("name", MIXED_DISTRIBUTIONS)
def test_columns_given_those_before(name):
    """Each conditional sums to one over its column, and all of them give the log-density."""
    truth, axes = MIXED_DISTRIBUTIONS[name], AXES[name]
    X = truth.sample(6, random_state=3)
    parts = truth.log_conditionals(X)
    assert parts.shape == (6, truth.n_features)
    np.testing.assert_allclose(parts.sum(axis=1), truth.log_density(X), rtol=1e-12)
    for j, (column, axis) in enumerate(axes.items()):
        cells, weight = axis.cells()
        for i in range(len(X)):
            rows = X.iloc[[i] * len(cells)].reset_index(drop=True)
            rows[column] = pd.Series(cells).astype(X[column].dtype)
            total = (np.exp(truth.log_conditionals(rows)[:, j]) * weight).sum()
            assert total == pytest.approx(1.0, abs=2e-4)


def test_marginals_of_latent_classes():
    """They are sums and integrals of the joint density, and each column is its own mixture."""
    truth, axes = MIXED_DISTRIBUTIONS["latent_classes"], AXES["latent_classes"]
    frame, weight, at = grid(truth, axes)
    mass = np.exp(truth.log_density(frame)) * weight
    kept = ["visits", "colour", "height"]
    marginal, own_weight, _ = grid(truth, {name: axes[name] for name in kept})
    where = [list(axes).index(name) for name in kept]
    shape = [len(axes[name].cells()[0]) for name in kept]
    summed = np.bincount(np.ravel_multi_index(at[where], shape), weights=mass)
    np.testing.assert_allclose(
        np.exp(truth.log_marginal(marginal)) * own_weight, summed, rtol=2e-3, atol=1e-12
    )
    X = truth.sample(40_000, random_state=4)
    np.testing.assert_allclose(truth.log_marginal(X), truth.log_density(X), rtol=1e-12)
    weights = [0.5, 0.3, 0.2]
    for column, means, scale in (
        ("height", [160.0, 170.0, 180.0], 6.0),
        ("weight", [76.0, 58.0, 82.0], 8.0),
    ):
        values = X[column].to_numpy()
        parts = [w * stats.norm(m, scale).pdf(values) for w, m in zip(weights, means, strict=True)]
        np.testing.assert_allclose(truth.log_marginal(X[[column]]), np.log(np.sum(parts, axis=0)))

        def cdf(x, means=means, scale=scale):
            return sum(w * stats.norm(m, scale).cdf(x) for w, m in zip(weights, means, strict=True))

        assert stats.kstest(values, cdf).pvalue > 1e-3
    # Without a separation all columns are independent.
    alone = LatentClasses(separation=0.0)
    apart = sum(alone.log_marginal(X[[column]]) for column in X)
    np.testing.assert_allclose(alone.log_density(X), apart, rtol=1e-12)


@pytest.mark.parametrize("parameters", [{}, {"share": 0.1, "dependence": 3.0}])
def test_marginals_of_missing_values(parameters):
    truth, n = MissingByValue(**parameters), 40_000
    X = truth.sample(n, random_state=5)
    share, b = truth.share, truth.dependence
    a = stats.norm.ppf(share) * np.sqrt(1 + b**2)
    # The share of missing cells is what was asked for, in both columns.
    for column in ("pressure", "income"):
        missing = X[column].isna()
        assert missing.mean() == pytest.approx(share, abs=4 * np.sqrt(share / n))
    assert stats.kstest(X["age"], stats.norm(50, 15).cdf).pvalue > 1e-3
    # What is seen of income is N(40, 12^2), thinned by its own value.
    x = np.linspace(-40, 120, 4001)
    seen = stats.norm(40, 12).pdf(x) * stats.norm.sf(a + b * (x - 40) / 12)
    assert integrate.trapezoid(seen, x) == pytest.approx(1 - share, abs=1e-9)
    cdf = np.r_[0.0, np.cumsum((seen[1:] + seen[:-1]) / 2 * np.diff(x))] / (1 - share)
    income = X["income"].dropna()
    assert stats.kstest(income, lambda v: np.interp(v, x, cdf)).pvalue > 1e-3
    # What is seen of pressure depends on age alone.
    seen = X.dropna(subset=["pressure"])
    z = (seen["age"] - 50) / 15
    residual = (seen["pressure"] - 120 - 8 * z) / 12
    assert stats.kstest(residual, stats.norm.cdf).pvalue > 1e-3


def test_marginals_of_amounts():
    truth = ZeroInflatedAmounts(zero_shares=(0.8, 0.0, 0.2), log_means=(1.0, 2.0, 5.0))
    n = 40_000
    X = truth.sample(n, random_state=6)
    assert X["segment"].value_counts(normalize=True)["premium"] == pytest.approx(0.2, abs=0.01)
    for segment, zero, mean in zip(
        ("basic", "plus", "premium"), truth.zero_shares, truth.log_means, strict=True
    ):
        amount = X["amount"][X["segment"] == segment]
        assert (amount == 0).mean() == pytest.approx(zero, abs=4 * 0.5 / np.sqrt(len(amount)))
        positive = stats.lognorm(truth.log_scale, scale=np.exp(mean))
        assert stats.kstest(amount[amount > 0], positive.cdf).pvalue > 1e-3
    frame = pd.DataFrame({"segment": ["basic", "plus", "plus"], "amount": [0.0, 0.0, 9.0]})
    expected = [0.5 * 0.8, 0.0, 0.3 * stats.lognorm(0.8, scale=np.exp(2.0)).pdf(9.0)]
    np.testing.assert_allclose(np.exp(truth.log_density(frame)), expected, rtol=1e-12)


def test_bayesian_network_agrees_with_scipy():
    """The factors, row by row from their formulas."""
    truth = BayesianNetwork()
    X = truth.sample(30, random_state=7)
    region_logit = {
        "east": [1.0, 0.0, -1.0],
        "north": [0.5, 0.5, 0.0],
        "south": [0.0, 0.0, 1.0],
        "west": [-0.5, 1.5, 0.0],
    }
    mean_age = {"east": 38, "north": 44, "south": 50, "west": 58}
    share = {"east": 0.4, "north": 0.3, "south": 0.2, "west": 0.1}
    plans = ["basic", "plus", "premium"]
    for row, found in zip(X.itertuples(), truth.log_conditionals(X), strict=True):
        z, p = (row.age - 45) / 10, plans.index(row.plan)
        member = expit([-2.0, 0.0, 2.0][p] + z / 2)
        log_spend = 3.0 + p + row.member / 2 + z / 5
        rate = np.exp(0.2 + 0.8 * row.member + 0.3 * (np.log(row.spend) - 4))
        expected = [
            share[row.region],
            stats.norm(mean_age[row.region], 10).pdf(row.age),
            softmax(np.array(region_logit[row.region]) + np.array([-1, 0, 1]) * z)[p],
            member if row.member else 1 - member,
            stats.lognorm(0.5, scale=np.exp(log_spend)).pdf(row.spend),
            stats.poisson(rate).pmf(row.visits),
        ]
        np.testing.assert_allclose(found, np.log(expected), rtol=1e-9)


IMPOSSIBLE = {
    "latent_classes": {"colour": "pink", "visits": -1, "height": np.nan},
    "missing_by_value": {"age": np.nan, "pressure": np.inf},
    "zero_inflated_amounts": {"segment": None, "amount": -2.0},
    "bayesian_network": {"region": "up", "plan": None, "member": None, "spend": 0.0, "visits": 1.5},
}


@pytest.mark.parametrize("name", MIXED_DISTRIBUTIONS)
def test_cells_that_are_impossible(name):
    truth = MIXED_DISTRIBUTIONS[name]
    X = truth.sample(5, random_state=8)
    for column, value in IMPOSSIBLE[name].items():
        changed = X.astype({column: object})
        changed.loc[1, column] = value
        if truth.columns[column] in (int, float):
            changed = changed.astype({column: float})
        log_p = truth.log_density(changed)
        assert log_p[1] == -np.inf
        np.testing.assert_allclose(np.delete(log_p, 1), np.delete(truth.log_density(X), 1))


@pytest.mark.parametrize("name", MIXED_DISTRIBUTIONS)
def test_frames_as_people_have_them(name):
    truth = MIXED_DISTRIBUTIONS[name]
    X = truth.sample(200, random_state=7)
    assert list(X.columns) == list(truth.columns)
    for column, levels in truth.columns.items():
        dtype = X[column].dtype
        if levels in (int, float):
            assert dtype == {int: np.int64, float: np.float64}[levels]
        elif levels == (False, True):
            assert dtype.kind == "b"
        else:
            assert isinstance(dtype, pd.CategoricalDtype)
            assert list(dtype.categories) == list(levels)
    pd.testing.assert_frame_equal(X, truth.sample(200, random_state=7))
    assert not X.equals(truth.sample(200, random_state=8))
    log_p = truth.log_density(X)
    # Neither the order of columns and rows nor the dtypes of equal values matter.
    np.testing.assert_array_equal(truth.log_density(X.iloc[::-1, ::-1]), log_p[::-1])
    np.testing.assert_array_equal(truth.log_density(X.convert_dtypes()), log_p)
    np.testing.assert_array_equal(truth.log_density(X.astype(object)), log_p)

    make = getattr(datasets, f"make_{name}")
    Y, log_q = make(200, random_state=7, return_log_density=True)
    pd.testing.assert_frame_equal(X, Y)
    np.testing.assert_array_equal(log_p, log_q)
    own = inspect.signature(type(truth)).parameters
    for key, parameter in inspect.signature(make).parameters.items():
        assert key in make.__doc__
        if key in own:
            assert parameter.default == own[key].default
    assert "DataFrame" in make.__doc__
    assert pickle.loads(pickle.dumps(make)) is make
    assert pickle.loads(pickle.dumps(truth)) == truth

    with pytest.raises(ValueError, match=f"{name} needs a DataFrame with the columns"):
        truth.log_density(X.iloc[:, 1:])
    with pytest.raises(ValueError, match=f"{name} needs a DataFrame with the columns"):
        truth.log_density(X.to_numpy())


def test_needs_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        datasets.make_latent_classes(10)
