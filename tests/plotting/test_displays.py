import sys

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import KernelDensity

pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt

from skebm.plotting import (
    AnomalyScoreDisplay,
    DensityDisplay,
    ExplanationDisplay,
    SamplesDisplay,
    TrainingCurveDisplay,
    _density,
)


class StandardNormal(BaseEstimator):
    """Just enough of an estimator: everything about it is known."""

    offset_ = -4.0
    n_iter_ = 2

    def fit(self, X):
        self.n_features_ = np.shape(X)[1]
        names = getattr(X, "columns", None)
        if names is not None:
            self.feature_names_in_ = np.asarray(names, dtype=object)
        return self

    def score_samples(self, X):
        if hasattr(self, "feature_names_in_"):
            assert list(X.columns) == list(self.feature_names_in_)
        X = np.asarray(X)
        return -0.5 * (X**2).sum(axis=1) - 0.5 * X.shape[1] * np.log(2 * np.pi)

    def decision_function(self, X):
        return self.score_samples(X) - self.offset_

    def sample(self, n_samples, random_state=None):
        return np.random.default_rng(random_state).normal(size=(n_samples, self.n_features_))

    @property
    def history_(self):
        return {
            "n_iter": np.arange(4),
            "held_out_log_likelihood": np.array([-3.0, -2.6, -2.5, -2.55]),
        }


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def X():
    return np.random.default_rng(0).normal(size=(150, 2))


# -- DensityDisplay ---------------------------------------------------------------------------


def test_density_is_the_log_density_on_the_grid_and_covers_the_data(X):
    display = DensityDisplay.from_estimator(
        StandardNormal().fit(X), X, grid_resolution=120, margin=1.0, plot=False
    )
    assert not hasattr(display, "ax_")
    assert display.xx0.min() < X[:, 0].min()
    assert display.xx1.max() > X[:, 1].max()
    expected = -0.5 * (display.xx0**2 + display.xx1**2) - np.log(2 * np.pi)
    np.testing.assert_allclose(display.log_density, expected)
    cell = np.diff(display.xx0[0, :2]).item() * np.diff(display.xx1[:2, 0]).item()
    assert np.exp(display.log_density).sum() * cell == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("log", [False, True])
def test_density_draws_truth_and_estimate_on_one_scale(X, log):
    est = StandardNormal().fit(X)
    display = DensityDisplay.from_estimator(
        est, X, true_log_density=lambda x: est.score_samples(x) - 1.0, grid_resolution=20, log=log
    )
    assert [ax.get_title() for ax in display.ax_] == ["truth", "estimate"]
    assert display.ax_[0].figure is display.figure_
    truth, estimate = display.surfaces_
    assert truth.get_clim() == estimate.get_clim()
    np.testing.assert_allclose(display.true_log_density, display.log_density - 1.0)


def test_density_draws_into_a_given_axes(X):
    _, ax = plt.subplots()
    display = DensityDisplay.from_estimator(
        StandardNormal().fit(X), X, grid_resolution=20, show_data=True, ax=ax
    )
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    assert len(ax.collections) == 2  # the surface and the rows


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_density_of_a_frame_uses_its_names(X, library):
    frame_type = pytest.importorskip(library).DataFrame
    X = frame_type({"length": X[:, 0], "width": X[:, 1]})
    display = DensityDisplay.from_estimator(StandardNormal().fit(X), X, grid_resolution=20)
    assert display.ax_.get_xlabel() == "length"
    assert display.ax_.get_ylabel() == "width"


def test_density_errors_say_what_was_given(X):
    est = StandardNormal().fit(X)
    with pytest.raises(ValueError, match="X has 3"):
        DensityDisplay.from_estimator(est, np.zeros((5, 3)))
    display = DensityDisplay.from_estimator(est, X, grid_resolution=20, plot=False)
    with pytest.raises(ValueError, match="Expected 1 axes"):
        display.plot(ax=plt.subplots(1, 2)[1])


class Slow(StandardNormal):
    """An estimator on a clock of its own, which a row moves on, and the first call as well."""

    def __init__(self, seconds, at_first=0.0):
        self.seconds, self.at_first = seconds, at_first
        self.now, self.rows = 0.0, 0

    def score_samples(self, X):
        self.now += len(X) * self.seconds + (self.at_first if not self.rows else 0.0)
        self.rows += len(X)
        return super().score_samples(X)


def test_the_grid_is_coarser_for_slow_estimators_and_says_so(X, monkeypatch):
    est = Slow(0.009).fit(X)
    monkeypatch.setattr(_density, "perf_counter", lambda: est.now)
    with pytest.warns(UserWarning, match=r"47 x 47 points.*Slow takes 9 ms.*200 x 200.*6 min") as w:
        display = DensityDisplay.from_estimator(est, X, plot=False)
    assert w[0].filename == __file__
    assert display.log_density.shape == (47, 47)
    assert est.now < 25.0
    expected = -0.5 * (display.xx0**2 + display.xx1**2) - np.log(2 * np.pi)
    np.testing.assert_allclose(display.log_density, expected)
    est.seconds = 1.0
    with pytest.warns(UserWarning, match="30 x 30"):
        DensityDisplay.from_estimator(est, X, plot=False)


def test_the_grid_is_fine_where_there_is_time_or_where_it_is_asked_for(X, monkeypatch, recwarn):
    for est, resolution in ((Slow(1e-5), "auto"), (Slow(1e-5, 60.0), "auto"), (Slow(1.0), 200)):
        est.fit(X)
        monkeypatch.setattr(_density, "perf_counter", lambda est=est: est.now)
        display = DensityDisplay.from_estimator(est, X, grid_resolution=resolution, plot=False)
        assert display.log_density.shape == (200, 200)
    assert est.rows == 200 * 200
    assert not recwarn.list
    for wrong in (1, 20.5, "fine"):
        with pytest.raises(ValueError, match="grid_resolution="):
            DensityDisplay.from_estimator(est, X, grid_resolution=wrong)


# -- SamplesDisplay ---------------------------------------------------------------------------


def by_row(points):
    return np.array(sorted(np.asarray(points).tolist()))


def shown(ax):
    """The points of a scatter, without their order."""
    return by_row(ax.collections[0].get_offsets())


def test_samples_of_two_columns_is_one_scatter(X):
    display = SamplesDisplay.from_estimator(
        StandardNormal().fit(X), X, n_samples=40, random_state=0
    )
    assert display.samples.shape == (40, 2)
    np.testing.assert_allclose(shown(display.ax_), by_row(np.r_[X, display.samples]))
    assert display.ax_.get_xlabel() == "x0"


def test_samples_takes_names_for_an_array_without_them(X):
    display = SamplesDisplay.from_estimator(
        StandardNormal().fit(X), X, columns=["b", "a"], feature_names=["a", "b"]
    )
    assert display.names == ["b", "a"]
    np.testing.assert_allclose(display.data, X[:, ::-1])


def test_samples_of_more_columns_is_the_lower_triangle_of_pairs():
    pd = pytest.importorskip("pandas")
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(80, 4)), columns=list("abcd"))
    display = SamplesDisplay.from_estimator(StandardNormal().fit(X), X, columns=["d", "a", 1])
    assert display.names == ["d", "a", "b"]
    assert [[panel is None for panel in row] for row in display.ax_] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert display.ax_[2, 0].get_xlabel() == "d"
    assert display.ax_[2, 0].get_ylabel() == "b"
    expected = np.r_[X[["d", "a"]].to_numpy(), display.samples[:, :2]]
    np.testing.assert_allclose(shown(display.ax_[1, 0]), by_row(expected))


def test_samples_of_one_column_is_a_histogram():
    X = np.random.default_rng(0).normal(size=(80, 1))
    display = SamplesDisplay.from_estimator(StandardNormal().fit(X), X)
    assert display.ax_.get_xlabel() == "x0"
    assert display.data.shape == display.samples.shape == (80, 1)


def test_samples_projection_is_the_plane_of_largest_variance():
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(200, 2)), 2, axis=1) + 0.01 * rng.normal(size=(200, 4))
    display = SamplesDisplay.from_estimator(StandardNormal().fit(X), X, projection="pca")
    assert display.data.shape == (200, 2)
    # Four unit columns, two directions: all the variance lies in the plane.
    assert display.data.var(axis=0).sum() == pytest.approx(4.0, rel=1e-3)


def test_samples_max_points_limits_the_scatter_only(X):
    display = SamplesDisplay.from_estimator(StandardNormal().fit(X), X, max_points=10)
    assert len(display.data) == 150
    assert len(shown(display.ax_)) == 20
    # Spread over the table, from the first row to the last: rows are often sorted.
    assert {tuple(X[0]), tuple(X[-1])} <= set(map(tuple, shown(display.ax_)))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"columns": ["nowhere"]}, "No column named 'nowhere'"),
        ({"projection": "tsne"}, "got 'tsne'"),
        ({"projection": "pca", "columns": [0]}, "exclude each other"),
    ],
)
def test_samples_errors_say_what_was_given(X, params, match):
    with pytest.raises(ValueError, match=match):
        SamplesDisplay.from_estimator(StandardNormal().fit(X), X, **params)


# -- AnomalyScoreDisplay ----------------------------------------------------------------------


def test_anomaly_scores_count_what_lies_below_the_threshold(X):
    est = StandardNormal().fit(X)
    expected = int((est.decision_function(X) < 0).sum())
    assert expected > 0
    for method, threshold in [("score_samples", -4.0), ("decision_function", 0.0)]:
        display = AnomalyScoreDisplay.from_estimator(est, X, response_method=method)
        assert display.threshold == threshold
        assert display.n_outliers_ == expected
        assert f"{expected} of 150" in display.ax_.get_legend().get_texts()[-1].get_text()


def test_anomaly_scores_of_training_rows_are_out_of_fold(X):
    est, y = StandardNormal().fit(X), np.arange(len(X)) % 3
    # as with one member: a third of the rows has been held out
    scores = np.where(y == 0, est.score_samples(X) - 1.0, np.nan)
    est.out_of_fold_offset_ = -3.5
    est.out_of_fold_decision_function_ = scores + 3.5
    held = scores[y == 0]
    for method, threshold in [("score_samples", -3.5), ("decision_function", 0.0)]:
        display = AnomalyScoreDisplay.from_estimator(est, None, y, response_method=method)
        np.testing.assert_allclose(display.scores, held + 3.5 + threshold)
        assert display.threshold == threshold
        assert display.n_outliers_ == (held < -3.5).sum() > 0
        assert (display.labels == 0).all()


def test_anomaly_scores_by_class_share_their_bins(X):
    y = (np.arange(len(X)) % 10 == 0).astype(int)
    display = AnomalyScoreDisplay.from_estimator(StandardNormal().fit(X), X, y)
    texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert texts[:2] == ["0", "1"]
    assert display.ax_.get_ylabel() == "density"
    edges = np.linspace(display.scores.min(), display.scores.max(), 41)
    few = np.histogram(display.scores[y == 1], bins=edges, density=True)[0]
    drawn = display.ax_.patches[1].get_xy()[:, 1]
    assert drawn.max() == pytest.approx(few.max())


def test_scores_far_below_all_others_share_a_bar_and_are_counted():
    scores = np.append(np.random.default_rng(0).normal(size=500), [-400.0, -1e6])
    display = AnomalyScoreDisplay(scores, threshold=-2.0).plot()
    assert display.ax_.get_xlabel().startswith("score\n2 rows below -7")
    heights = display.ax_.patches[0].get_xy()[:, 1]
    assert 20 < heights.max() < 120
    assert display.ax_.get_xlim()[0] > -20
    assert display.n_outliers_ == (scores < -2.0).sum()
    plain = AnomalyScoreDisplay(scores[:500]).plot()
    assert plain.ax_.get_xlabel() == "score"


class WithPValues(StandardNormal):
    """Its p-values are exact: minus twice the log-density beyond its mode is chi-square."""

    def p_values(self, X):
        return np.exp(-0.5 * (np.asarray(X) ** 2).sum(axis=1))


def test_p_values_of_each_class_are_a_density_beside_the_uniform_one():
    X = np.random.default_rng(0).normal(size=(2000, 2))
    y = np.arange(len(X)) % 10 == 0
    X[y] *= 4.0
    display = AnomalyScoreDisplay.from_estimator(
        WithPValues().fit(X), X, y, response_method="p_values"
    )
    texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert texts == ["False", "True", "uniform"]
    assert display.threshold is None
    assert display.n_outliers_ is None
    assert list(display.ax_.get_lines()[0].get_ydata()) == [1.0, 1.0]
    tops = [patch.get_xy()[:, 1].max() for patch in display.ax_.patches]
    assert tops[0] == pytest.approx(1.0, abs=0.4)  # 20 bins of 90 rows: uniform but for chance
    assert tops[1] > 10.0  # most of the 200 odd rows are in the first
    share = AnomalyScoreDisplay(display.scores, threshold=0.05, p_values=True).plot(bins=10)
    assert share.n_outliers_ == (display.scores < 0.05).sum()


def test_p_values_of_training_rows_are_out_of_fold(X):
    est = WithPValues().fit(X)
    est.out_of_fold_p_values_ = np.where(np.arange(len(X)) % 3 == 0, est.p_values(X), np.nan)
    display = AnomalyScoreDisplay.from_estimator(est, response_method="p_values")
    np.testing.assert_array_equal(display.scores, est.p_values(X)[::3])


def test_anomaly_scores_refuse_what_cannot_be_drawn(X):
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        AnomalyScoreDisplay(np.array([0.0, -np.inf, 1.0])).plot()
    with pytest.raises(ValueError, match="got 'predict'"):
        AnomalyScoreDisplay.from_estimator(StandardNormal().fit(X), X, response_method="predict")
    with pytest.raises(ValueError, match="StandardNormal has none: take an OutlierDetector"):
        AnomalyScoreDisplay.from_estimator(StandardNormal().fit(X), X, response_method="p_values")
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        AnomalyScoreDisplay.from_estimator(StandardNormal().fit(X), X, [0, 1])


# -- TrainingCurveDisplay ---------------------------------------------------------------------


def test_training_curve_shows_base_and_kept_state(X):
    display = TrainingCurveDisplay.from_estimator(StandardNormal().fit(X))
    curve = display.ax_.get_lines()[0]
    np.testing.assert_allclose(curve.get_ydata(), [-3.0, -2.6, -2.5, -2.55])
    texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert texts == ["held-out rows", "the base", "kept: 2"]
    assert display.loss_ax_ is None


def test_a_training_curve_needs_a_fit_with_a_history(X):
    with pytest.raises(NotFittedError):
        TrainingCurveDisplay.from_estimator(KernelDensity())
    with pytest.raises(TypeError, match="KernelDensity has no history_"):
        TrainingCurveDisplay.from_estimator(KernelDensity().fit(X))


def test_training_curve_puts_the_loss_on_its_own_scale():
    display = TrainingCurveDisplay([1, 2], [-3.0, -2.0], train_loss=[1.4, 1.2]).plot()
    assert display.loss_ax_ is not display.ax_
    np.testing.assert_allclose(display.loss_ax_.get_lines()[0].get_ydata(), [1.4, 1.2])


def test_training_curve_joins_the_points_that_were_judged():
    display = TrainingCurveDisplay(
        [0, 1, 2, 3], [-3.0, np.nan, -2.0, -2.1], train_loss=[np.nan, 1.4, 1.3, 1.2]
    ).plot()
    np.testing.assert_allclose(display.ax_.get_lines()[0].get_xdata(), [0, 2, 3])
    np.testing.assert_allclose(display.loss_ax_.get_lines()[0].get_xdata(), [1, 2, 3])


# -- without matplotlib -----------------------------------------------------------------------


def test_missing_matplotlib_is_named_with_the_remedy(X, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    display = DensityDisplay.from_estimator(
        StandardNormal().fit(X), X, grid_resolution=10, plot=False
    )
    with pytest.raises(ImportError, match=r"DensityDisplay.plot needs.*skebm\[plot\]"):
        display.plot()


def test_samples_of_categories_are_bars_and_missing_cells_are_left_out():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {"kind": rng.choice(["a", "b", "c"], 60), "yes": rng.random(60) < 0.5,
         "x": np.where(rng.random(60) < 0.3, np.nan, rng.normal(size=60))}
    )  # fmt: skip

    class Copies:
        def sample(self, n_samples, random_state):
            return frame.sample(n_samples, random_state=random_state)

    display = SamplesDisplay.from_estimator(Copies(), frame, random_state=0)
    assert [None if own is None else list(own) for own in display.levels] == [
        ["a", "b", "c"], ["False", "True"], None]  # fmt: skip
    heights = [bar.get_height() for bar in display.ax_[0, 0].patches[:3]]
    shares = frame["kind"].value_counts(normalize=True).sort_index()
    np.testing.assert_allclose(heights, shares)
    ticks = [tick.get_text() for tick in display.ax_[2, 0].get_xticklabels()]
    assert ticks == ["a", "b", "c"]
    with pytest.raises(ValueError, match="needs numbers in all cells"):
        SamplesDisplay.from_estimator(Copies(), frame, projection="pca")


# ---------------------------------------------------------------------- two columns of many


class ThreeNormals(StandardNormal):
    """Three independent standard normal columns, and what is asked of some of them."""

    def marginal(self, columns, *, n_draws):
        class Marginal:
            @staticmethod
            def score_samples(table):
                assert list(table) == list(columns)
                values = np.column_stack([table[name] for name in columns]).astype(float)
                return -0.5 * (values**2 + np.log(2 * np.pi)).sum(1)

        return Marginal()

    def condition(self, given):
        class Conditional:
            log_density_given = np.array(
                [sum(-0.5 * (v**2 + np.log(2 * np.pi)) for v in given.values())]
            )

        return Conditional()


def test_density_of_two_columns_of_three():
    X = np.random.default_rng(0).normal(size=(50, 3))
    X[3, 2] = np.nan  # a row that lacks one of them
    options = {"features": [2, 0], "grid_resolution": 5, "show_data": True}
    display = DensityDisplay.from_estimator(ThreeNormals(), X, **options)
    assert display.data.shape == (49, 2)
    assert display.ax_.get_xlabel() == "2"
    wanted = -0.5 * (display.xx0**2 + display.xx1**2) - np.log(2 * np.pi)
    np.testing.assert_allclose(display.log_density, wanted)
    given = DensityDisplay.from_estimator(ThreeNormals(), X, given={1: 2.0}, **options)
    np.testing.assert_allclose(given.log_density, wanted)  # independent of it


def test_which_two_columns_has_to_be_said():
    X = np.zeros((4, 3))
    with pytest.raises(ValueError, match="name two of them in features"):
        DensityDisplay.from_estimator(ThreeNormals(), X)
    with pytest.raises(ValueError, match="given needs features"):
        DensityDisplay.from_estimator(ThreeNormals(), X, given={1: 2.0})
    for features in ([0], [0, 0]):
        with pytest.raises(ValueError, match="must name two columns"):
            DensityDisplay.from_estimator(ThreeNormals(), X, features=features)
    with pytest.raises(ValueError, match="given has 1, which is one of features"):
        DensityDisplay.from_estimator(ThreeNormals(), X, features=[0, 1], given={1: 2.0})
    with pytest.raises(ValueError, match="X has no row with two numbers"):
        DensityDisplay.from_estimator(ThreeNormals(), np.full((4, 3), np.nan), features=[0, 1])


@pytest.mark.parametrize("column", [["x"] * 4, [True] * 4])
def test_a_plane_is_one_of_numbers(column):
    frame = pytest.importorskip("pandas").DataFrame({0: np.zeros(4), 1: column, 2: np.zeros(4)})
    with pytest.raises(ValueError, match="features has 1, a column of X that holds something"):
        DensityDisplay.from_estimator(ThreeNormals(), frame, features=[0, 1])


def test_a_single_row_has_a_grid_around_it(recwarn):
    display = DensityDisplay.from_estimator(StandardNormal().fit(np.zeros((1, 2))), [[2.0, -1.0]])
    assert (display.xx0.min(), display.xx0.max()) == (1.5, 2.5)
    assert (display.xx1.min(), display.xx1.max()) == (-1.5, -0.5)
    assert not recwarn.list


# ---------------------------------------------------------------------- explanations


def test_bars_of_a_row_are_sorted_by_excess():
    display = ExplanationDisplay(np.array([[-0.5, 7.0, 1.0]]), ["age", "income", "region"]).plot()
    labels = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert labels == ["age", "region", "income"]  # from below
    np.testing.assert_allclose([bar.get_width() for bar in display.ax_.patches], [-0.5, 1.0, 7.0])


def test_many_columns_are_cut_and_the_title_says_so():
    display = ExplanationDisplay(np.arange(30.0)[None], [f"c{j}" for j in range(30)]).plot()
    assert len(display.ax_.patches) == 12
    assert "12 of 30 columns" in display.ax_.get_title(loc="left")


def test_a_heat_map_has_a_name_for_every_row_and_column():
    excess = np.array([[0.0, 3.0], [50.0, 1.0], [-1.0, 2.0]])
    display = ExplanationDisplay(excess, ["a", "b"], row_names=["x", "y", "z"]).plot()
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in display.ax_.get_yticklabels()] == ["x", "y", "z"]
    np.testing.assert_array_equal(display.ax_.images[0].get_array(), excess)
    assert len(display.plot(row=1).ax_.patches) == 2
