import pickle

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity, NearestNeighbors

from skebm import NCEDensity, OutlierDetector
from skebm.datasets import make_two_moons
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.training import views

pd = pytest.importorskip("pandas")

QUICK = {"n_members": 2, "random_state": 0}
both = pytest.mark.parametrize("training", ["clean", "contaminated"])


def clusters(n, seed=0):
    """Two clusters of correlated columns."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1)) + rng.normal(0.0, 0.2, (n, 2))
    return x + 8.0 * rng.integers(2, size=(n, 1))


ODD = {"gap": [4.0, 4.0], "off the correlation": [1.0, -1.0], "outside": [20.0, 20.0]}


@pytest.fixture(scope="module", params=["clean", "contaminated"])
def fitted(request):
    return OutlierDetector(**QUICK, training=request.param).fit(clusters(600))


def test_it_integrates_to_one(fitted):
    u = np.linspace(-8.0, 8.0, 301)
    side, length = 4.0 + 2.0 * np.sinh(u), 2.0 * np.cosh(u) * (u[1] - u[0])
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    volume = np.outer(length, length).ravel()
    assert np.exp(fitted.score_samples(grid)) @ volume == pytest.approx(1.0, abs=0.02)
    assert fitted.effective_sample_size_.min() > 1_000


def test_each_kind_of_odd_row_is_found(fitted):
    assert (fitted.predict(list(ODD.values())) == -1).all()
    assert (fitted.predict(clusters(2_000, 1)) == -1).mean() == pytest.approx(0.05, abs=0.03)


def test_which_view_made_a_row_odd():
    clean, contaminated = (
        OutlierDetector(**QUICK, training=training).fit(clusters(600))
        for training in ("clean", "contaminated")
    )
    gap, off, outside = ODD.values()
    assert clean.views_[clean.view_scores([off]).argmin()] == "linear"
    assert clean.views_[clean.view_scores([gap]).argmin()] == "sharp"
    assert contaminated.views_[contaminated.view_scores([gap]).argmin()] == "local"
    assert contaminated.view_scores([outside]).shape == (1, 3)


def test_the_score_of_a_member_is_its_lowest_view(fitted):
    X = clusters(50, 1)
    members = fitted._member_scores(fitted._validate(X))
    assert members.shape == (2, 50)
    mean = np.logaddexp(*members) - np.log(2)
    np.testing.assert_allclose(fitted.score_samples(X), mean, rtol=1e-9)
    one = OutlierDetector(**QUICK | {"n_members": 1}, training=fitted.training).fit(clusters(200))
    np.testing.assert_allclose(one.view_scores(X).min(axis=1), one.score_samples(X), rtol=1e-9)


def test_rows_of_the_table_are_scored_by_their_judge(fitted):
    members = fitted._member_scores(fitted._validate(clusters(600)))
    own = members[fitted.out_of_fold_members_, np.arange(600)]
    np.testing.assert_allclose(fitted.out_of_fold_scores_, own, rtol=1e-9)


def test_units_of_columns_change_no_rank(fitted):
    scale, shift = np.array([1e3, 1e-2]), [5.0, -7.0]
    other = OutlierDetector(**fitted.get_params()).fit(clusters(600) * scale + shift)
    new = clusters(300, 1)
    gap = fitted.score_samples(new) - other.score_samples(new * scale + shift)
    np.testing.assert_allclose(gap, np.log(scale).sum(), atol=0.01)


def test_bad_rows_in_the_table_are_found_where_others_hide_them():
    # one in twenty, near each other, as far as the diameter of the rest
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(size=(570, 4)), rng.normal([4.0, 0.0, 0.0, 0.0], 0.3, (30, 4))]
    bad = np.arange(600) >= 570
    aucs = {
        training: roc_auc_score(
            bad,
            -OutlierDetector(**QUICK, training=training).fit(X).out_of_fold_scores_,
        )
        for training in ("clean", "contaminated")
    }
    nearest = NearestNeighbors(n_neighbors=5).fit(X).kneighbors()[0][:, -1]
    assert aucs["contaminated"] > roc_auc_score(bad, nearest) + 0.1
    assert aucs["contaminated"] > aucs["clean"]
    assert aucs["contaminated"] > 0.85


def test_new_rows_off_a_thin_sheet_are_found():
    rng = np.random.default_rng(0)

    def sheet(n):
        x = rng.normal(size=(n, 3))
        return np.c_[x, x.sum(axis=1) + rng.normal(0.0, 0.1, n)]

    X, new = sheet(500), sheet(500)
    off = new.copy()
    off[:, -1] += rng.choice([-1.2, 1.2], 500)
    detector = OutlierDetector(**QUICK).fit(X)
    labels = np.repeat([0, 1], 500)
    found = roc_auc_score(labels, -detector.score_samples(np.r_[new, off]))
    kernels = KernelDensity(bandwidth="scott").fit(X).score_samples(np.r_[new, off])
    assert found > 0.97
    assert found > roc_auc_score(labels, -kernels) + 0.1


@both
def test_a_density_is_one_more_view(training):
    density = NCEDensity(base="gmm", energy_model=None)
    detector = OutlierDetector(**QUICK, training=training, density=density).fit(clusters(400))
    assert detector.views_[-1] == "density"
    alone = NCEDensity(base="gmm", energy_model=None, **QUICK).fit(clusters(400))
    new = clusters(100, 1)
    # on the common scale it is an increasing function of the density itself
    own = detector.view_scores(new)[:, -1].argsort().argsort()
    assert np.corrcoef(own, alone.score_samples(new).argsort().argsort())[0, 1] > 0.95
    assert not hasattr(density, "model_")
    assert detector.view_scores(new).shape[1] == len(detector.views_)
    drawn = detector.sample(500, random_state=0)
    assert detector.score(drawn) > detector.offset_


def test_bad_settings_of_the_density_are_named():
    for bad, match in (
        ({"base": None, "energy_model": None}, "it needs a base"),
        ({"objective": "likelihood"}, "'objective' parameter of NCEDensity"),
    ):
        with pytest.raises(ValueError, match=match):
            OutlierDetector(density=NCEDensity(**bad)).fit(clusters(50))


def test_the_density_is_smoothed():
    coarse, fine = (
        OutlierDetector(
            **QUICK, density=NCEDensity(base="gmm", energy_model=None, smoothing=h)
        ).fit(clusters(300))
        for h in (2.0, 0.0)
    )
    both = [d.model_.density.log_prob(d._tensor(clusters(300))).std() for d in (coarse, fine)]
    assert both[0] < 0.7 * both[1]


@both
def test_tables_with_categories_and_holes(training):
    rng = np.random.default_rng(0)
    n = 600
    kind = rng.choice(["small", "large"], n)
    size = np.where(kind == "small", 1.0, 10.0) + rng.normal(0.0, 0.3, n)
    size[rng.random(n) < 0.1] = np.nan
    X = pd.DataFrame({"kind": pd.Categorical(kind), "size": size, "other": rng.normal(size=n)})
    detector = OutlierDetector(**QUICK, training=training, contamination=0.1).fit(X)
    odd = pd.DataFrame({"kind": ["small", "large"], "size": [10.0, 10.0], "other": [0.0, 0.0]})
    np.testing.assert_array_equal(detector.predict(odd), [-1, 1])
    assert detector.sample(5, random_state=0).dtypes.equals(X.dtypes)
    with pytest.warns(UserWarning, match="which fit has not met"):
        scores = detector.score_samples(odd.assign(kind=["tiny", "large"]))
    assert np.isfinite(scores).all()


def test_many_columns_are_warned_of_and_ranked():
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(200, 60)), rng.normal(size=(100, 60))
    with pytest.warns(LowEffectiveSampleSizeWarning, match="The ranking does not suffer"):
        detector = OutlierDetector(**QUICK).fit(X)
    scores = detector.score_samples(np.r_[new, 2.0 * new])
    assert roc_auc_score(np.repeat([0, 1], 100), -scores) > 0.99


def test_log_z_is_annealed_where_draws_are_too_few(monkeypatch):
    monkeypatch.setattr(views, "MIN_ESS_SHARE", 2.0)  # they always are
    detector = OutlierDetector(**QUICK).fit(make_two_moons(n_samples=300, random_state=0))
    first, second = np.linspace(-3.0, 4.0, 281), np.linspace(-2.5, 3.0, 221)
    grid = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2)
    mass = np.exp(detector.score_samples(grid)).sum() * 0.025**2
    (error,) = np.unique(detector.log_partition_std_error_)
    assert 0 < error < 0.3
    assert abs(np.log(mass)) < 3 * error + 0.005
    assert len(np.unique(detector.log_partition_)) == 1


def test_fits_do_not_depend_on_the_number_of_jobs(fitted):
    again = OutlierDetector(**fitted.get_params()).set_params(n_jobs=2).fit(clusters(600))
    np.testing.assert_array_equal(again.out_of_fold_scores_, fitted.out_of_fold_scores_)


def test_pickles_score_alike(fitted):
    X = clusters(50, 1)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(fitted)).score_samples(X), fitted.score_samples(X)
    )


def test_a_detector_answers_what_is_asked_of_some_cells():
    """Its marginal beside quadrature of its density, and the odd cell of a row."""
    detector = OutlierDetector(**QUICK).fit(make_two_moons(n_samples=300, random_state=0))
    grid = np.linspace(-5.0, 5.0, 4001)
    rows = np.column_stack([np.full(4001, 0.4), grid])
    mass = np.trapezoid(np.exp(detector.score_samples(rows)), grid)
    given = detector.condition({0: 0.4})
    assert given.log_density_given[0] == pytest.approx(np.log(mass), abs=5e-3)
    assert detector.explain([[4.0, 0.3]]).of_row(0)[0].columns == (0,)
