"""Laws that every estimator obeys. A new estimator joins by one line in ESTIMATORS."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Event

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from skebm import (
    AdversarialEBM,
    ContrastiveDivergenceEBM,
    FlowContrastiveDensity,
    ImplicitVAE,
    NCEDensity,
    ScoreMatchingEBM,
)
from skebm.bases import _flow_training
from skebm.datasets import make_two_moons
from skebm.estimators import _flow_based, adversarial, flow_contrastive
from skebm.estimators._progress import Progress

UNTRAINED = {"nce-base-alone", "nce-multiscale"}

COMMON = {"base": "gaussian", "n_members": 2, "random_state": 0, "learning_rate": 0.1}
TREES = {"energy_model": "boosting", "max_epochs": 20, "noise_ratio": 4}
NETWORK = {
    "energy_model": "mlp", "hidden_layer_sizes": (16,), "learning_rate": 0.01, "max_epochs": 60,
    "batch_size": 64, "patience": 1000,
}  # fmt: skip

SCORE = {
    "hidden_layer_sizes": (16,), "learning_rate": 0.02, "max_epochs": 60, "batch_size": 64,
    "patience": 1000,
}  # fmt: skip

CHAINS = SCORE | {"n_steps": 3, "max_epochs": 40}

VAE = {
    "n_components": 2, "random_state": 0, "hidden_layer_sizes": (16,), "learning_rate": 0.02,
    "max_epochs": 60, "batch_size": 64, "patience": 1000, "n_importance_samples": 50,
    "validation_fraction": 0.5,
}  # fmt: skip

FLOW = SCORE | {"base": "flow", "max_epochs": 40, "batch_size": 128}

ESTIMATORS = {
    "nce-trees": lambda: NCEDensity(**COMMON | TREES),
    "nce-network": lambda: NCEDensity(**COMMON | NETWORK),
    "nce-no-base": lambda: NCEDensity(**COMMON | NETWORK | {"base": None, "noise": "gaussian"}),
    "nce-base-alone": lambda: NCEDensity(**COMMON | {"max_epochs": 0}),
    "nce-multiscale": lambda: NCEDensity(**COMMON | {"smoothing": "multiscale", "max_epochs": 10}),
    "sm-exact": lambda: ScoreMatchingEBM(**COMMON | SCORE | {"method": "exact"}),
    "sm-sliced": lambda: ScoreMatchingEBM(**COMMON | SCORE | {"method": "sliced"}),
    "sm-denoising": lambda: ScoreMatchingEBM(
        **COMMON | SCORE | {"method": "denoising", "energy_model": "mlp"}
    ),
    "cd-persistent": lambda: ContrastiveDivergenceEBM(**COMMON | CHAINS),
    "cd-from-rows": lambda: ContrastiveDivergenceEBM(
        **COMMON | CHAINS | {"persistent": False, "sampler": "hmc", "n_steps": 1}
    ),
    "cd-no-base": lambda: ContrastiveDivergenceEBM(
        **COMMON | CHAINS | {"base": None, "sampler": "random_walk"}
    ),
    "fce": lambda: FlowContrastiveDensity(**COMMON | FLOW),
    "fce-no-base": lambda: FlowContrastiveDensity(
        **COMMON | FLOW | {"base": None, "batch_size": 64}
    ),
    "adversarial": lambda: AdversarialEBM(**COMMON | FLOW | {"gradient_penalty": 0.5}),
}
"""Name -> factory of an estimator at a setting that fits 400 rows in about a second."""

LATENT = {"vae": lambda: ImplicitVAE(**VAE)}
"""Those without bases, members and log Z: each row has an integral of its own."""

every_tilted = pytest.mark.parametrize("name", ESTIMATORS)
ESTIMATORS = ESTIMATORS | LATENT
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
pytestmark = pytest.mark.filterwarnings(
    # the settings are meant to be quick
    "ignore:the learned log Z differs",
    "ignore:the standard error of log Z",
)


@pytest.fixture(autouse=True, scope="module")
def small_flows():
    """Flows that fit in a fraction of a second, and leave the energies something to learn."""
    with pytest.MonkeyPatch.context() as patch:
        small = partial(_flow_based.build_flow, n_layers=2, hidden=(16,), n_bins=4)
        patch.setattr(_flow_based, "build_flow", small)
        patch.setattr(_flow_training, "FLOW_STEPS", 1)
        patch.setattr(_flow_training, "FLOW_EPOCHS", 10)
        for module in (adversarial, flow_contrastive):
            patch.setattr(module, "HEAD_START", 20)
        patch.setattr(adversarial, "SETTLING_STEPS", 30)
        patch.setattr(adversarial, "SETTLING_SAMPLES", 128)
        yield


def two_humps(n, seed):
    """Rows of a mixture of two normal laws, one column."""
    rng = np.random.default_rng(seed)
    left = rng.random(n) < 0.5
    return np.where(left, rng.normal(-2.0, 0.5, n), rng.normal(1.0, 0.8, n))[:, None]


@cache
def data(d):
    return two_humps(400, 0) if d == 1 else make_two_moons(400, random_state=0)


@cache
def fresh(d, n=4000):
    return two_humps(n, 1) if d == 1 else make_two_moons(n, random_state=1)


@cache
def fitted(name, d=2):
    return ESTIMATORS[name]().fit(data(d))


def grid(name, d):
    """Cell centres of a fine grid that holds all the mass, (m, d), and the volume of a cell."""
    if d == 1:
        t = np.linspace(-14.0, 14.0, 8001)
        return t[:, None], t[1] - t[0]
    # every density of a latent-variable model is an integral, dear but smooth
    finer = 1 if name in LATENT else 2
    across, up = np.linspace(-7.0, 8.0, 180 * finer + 1), np.linspace(-5.0, 5.5, 140 * finer + 1)
    points = np.stack(np.meshgrid(across, up, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, (across[1] - across[0]) * (up[1] - up[0])


@cache
def masses_and_errors(name, d):
    """Probability of each cell of `grid`, and the standard error of each."""
    points, volume = grid(name, d)
    log_density, error = fitted(name, d).score_samples(points, return_std=True)
    mass = np.exp(log_density) * volume
    return mass, mass * error


def masses(name, d):
    """Probability of each cell of `grid`."""
    return masses_and_errors(name, d)[0]


def log_z_error(name, d):
    """Standard error of the log of the integral: the mean of independent members, or of rows."""
    if name in LATENT:
        return np.sqrt(np.square(masses_and_errors(name, d)[1]).sum())
    error = fitted(name, d).log_partition_std_error_
    return np.sqrt(np.square(error).sum()) / len(error)


# ---------------------------------------------------------------------- density


@every_estimator
def test_the_quick_settings_learn_something(name):
    # otherwise the laws below would be about bases only
    if name in UNTRAINED:
        pytest.skip("nothing to learn beyond the base")
    # a flow sees Gaussianised columns: a single one is learned already
    for d in (2,) if name in ("fce", "adversarial") else (1, 2):
        if name in LATENT:
            base = ESTIMATORS[name]().set_params(max_epochs=0).fit(data(d)).score(fresh(d))
        else:
            base = fitted(name, d).base_score_samples(fresh(d)).mean()
        assert fitted(name, d).n_iter_ > 0
        assert fitted(name, d).score(fresh(d)) > base + 0.05


@every_estimator
@pytest.mark.parametrize("d", [1, 2])
def test_density_integrates_to_one(name, d):
    error = log_z_error(name, d)
    assert error < 0.02
    # .003: quadrature, next to jumps of the trees
    assert abs(math.log(masses(name, d).sum())) < 3.5 * error + 0.003


@every_estimator
def test_score_is_the_mean_of_score_samples(name):
    estimator = fitted(name)
    scores = estimator.score_samples(fresh(2))
    assert scores.dtype == np.float64
    assert scores.shape == (len(fresh(2)),)
    assert estimator.score(fresh(2)) == pytest.approx(scores.mean(), abs=1e-12)


@every_estimator
def test_scores_do_not_depend_on_the_batch(name):
    estimator, rows = fitted(name), fresh(2)[:30]
    one_by_one = [estimator.score_samples(row[None])[0] for row in rows]
    np.testing.assert_allclose(estimator.score_samples(rows), one_by_one, atol=1e-7, rtol=0)
    many = estimator.score_samples(np.tile(rows, (400, 1)))  # more than one chunk
    np.testing.assert_allclose(many, np.tile(one_by_one, 400), atol=1e-7, rtol=0)


@every_tilted
def test_energy_is_minus_the_log_density_up_to_a_constant(name):
    estimator = fitted(name)
    total = estimator.energy(fresh(2)) + estimator.score_samples(fresh(2))
    np.testing.assert_allclose(total, total[0], atol=1e-9)


@every_estimator
def test_scale_of_the_columns_changes_scores_by_a_constant(name):
    scale = np.array([8.0, 0.25])  # powers of two: not a bit is lost
    other = ESTIMATORS[name]().fit(data(2) * scale)
    expected = fitted(name).score_samples(fresh(2)) - np.log(scale).sum()
    np.testing.assert_allclose(other.score_samples(fresh(2) * scale), expected, atol=1e-9)
    np.testing.assert_allclose(
        other.sample(50, random_state=0), fitted(name).sample(50, random_state=0) * scale
    )
    assert other.offset_ == pytest.approx(fitted(name).offset_ - np.log(scale).sum(), abs=1e-9)


@every_estimator
def test_offset_of_the_columns_changes_nothing(name):
    # three decimals, so that adding loses next to nothing; training amplifies what it does lose
    rows, new, offset = data(2).round(6), fresh(2)[:500].round(6), np.array([64.0, -128.0])
    scores = ESTIMATORS[name]().fit(rows).score_samples(new)
    moved = ESTIMATORS[name]().fit(rows + offset).score_samples(new + offset)
    np.testing.assert_allclose(moved, scores, atol=1e-3)


@every_estimator
def test_constant_column_is_a_point_mass(name):
    rows = np.insert(data(2), 1, 5.0, axis=1)
    estimator = ESTIMATORS[name]().fit(rows)
    new = np.insert(fresh(2)[:100], 1, 5.0, axis=1)
    np.testing.assert_array_equal(
        estimator.score_samples(new), fitted(name).score_samples(fresh(2)[:100])
    )
    new[:50, 1] = 5.0 + 1e-9
    scores, std = estimator.score_samples(new, return_std=True)
    assert (scores[:50] == -np.inf).all()
    assert np.isfinite(scores[50:]).all()
    assert np.isfinite(std).all()
    assert (estimator.predict(new[:50]) == -1).all()
    assert (estimator.sample(20)[:, 1] == 5.0).all()
    if name not in LATENT:
        assert (estimator.stein_score(new)[:, 1] == 0.0).all()


@every_tilted
def test_never_below_the_base(name):
    if fitted(name).smoothing != 0.0:
        pytest.skip("smoothing is for ranking, not for likelihood")
    gains = fitted(name).score_samples(fresh(2)) - fitted(name).base_score_samples(fresh(2))
    assert gains.mean() > -2.0 * gains.std() / math.sqrt(len(gains)) - 1e-9


@every_tilted
@pytest.mark.parametrize("seed", [0, 1])
def test_not_below_a_base_that_is_right(name, seed):
    if fitted(name).base is None or fitted(name).smoothing != 0.0:
        pytest.skip("the confining law is no model of the data; smoothing is not for likelihood")
    rng = np.random.default_rng(seed)
    estimator = ESTIMATORS[name]().set_params(random_state=seed).fit(rng.normal(size=(300, 2)))
    new = rng.normal(size=(4000, 2))
    gains = estimator.score_samples(new) - estimator.base_score_samples(new)
    assert gains.mean() > -0.01


# ---------------------------------------------------------------------- errors of log Z


@every_tilted
def test_std_is_the_delta_method(name):
    estimator = fitted(name)
    rows = fresh(2)[:50]
    _, std = estimator.score_samples(rows, return_std=True)
    variance, step = 0.0, 1e-5
    for k, error in enumerate(estimator.log_partition_std_error_):
        up, down = copy.deepcopy(estimator), copy.deepcopy(estimator)
        up.model_.log_partition[k] += step
        down.model_.log_partition[k] -= step
        if estimator.model_.is_untilted:
            slope = 0.0
        else:
            slope = (up.score_samples(rows) - down.score_samples(rows)) / (2 * step)
        variance += np.square(slope * error)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-6, atol=1e-12)


@every_tilted
def test_std_is_honest(name):
    estimator = copy.deepcopy(fitted(name)).set_params(n_partition_samples=1000)
    if estimator.model_.is_untilted:
        pytest.skip("log Z is exact")
    row, scores, claims = fresh(2)[:1], [], []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            estimator._measure(estimator.model_, generator, Progress(0))
        score, claim = estimator.score_samples(row, return_std=True)
        scores.append(score[0])
        claims.append(claim[0])
    # the spread of 30 has itself an error of 13 %, and of few batches the larger error is claimed
    assert 0.5 < np.std(scores) / np.sqrt(np.mean(np.square(claims))) < 1.5


# ---------------------------------------------------------------------- sampling


def uniform_order_statistic_test(name, rows):
    """p-value of rows of one column against the model's own distribution function."""
    points, _ = grid(name, 1)
    cdf = np.cumsum(masses(name, 1)) - 0.5 * masses(name, 1)
    u = np.interp(rows[:, 0], points[:, 0], cdf / masses(name, 1).sum())
    return stats.kstest(u, "uniform").pvalue


@every_estimator
def test_sample_follows_the_model(name):
    # 1-D: Kolmogorov-Smirnov against the integrated density
    p = [
        uniform_order_statistic_test(name, fitted(name, 1).sample(3000, random_state=seed))
        for seed in range(6)
    ]
    assert min(p) > 1e-5
    assert np.median(p) > 0.01


@every_estimator
def test_sample_follows_the_model_in_two_dimensions(name):
    points, _ = grid(name, 2)
    edges = []
    for column in points.T:  # cells of the test are made of whole cells of the grid
        centres = np.unique(column)
        borders = 0.5 * (centres[1:] + centres[:-1])
        low, high = np.quantile(data(2), [0.02, 0.98], axis=0)[:, len(edges)]
        edges.append(borders[(borders > low) & (borders < high)][:: 5 if name in LATENT else 10])
    shape = tuple(len(edge) + 1 for edge in edges)

    def counts(rows, weights=None):
        index = [np.searchsorted(edge, rows[:, j]) for j, edge in enumerate(edges)]
        cell = np.ravel_multi_index(index, shape)
        return np.bincount(cell, weights=weights, minlength=math.prod(shape))

    n, expected, p = 4000, counts(points, masses(name, 2)), []
    expected *= n / expected.sum()
    order = np.argsort(expected)
    # small cells are put together, the rest tested one by one
    start = max(2, np.searchsorted(np.cumsum(expected[order]) > 5, True), (expected < 5).sum())
    starts = np.r_[0, np.arange(start, len(order))]
    for seed in range(4):
        drawn = counts(fitted(name).sample(n, random_state=seed))
        observed, mean = (np.add.reduceat(a[order], starts) for a in (drawn, expected))
        p.append(stats.chisquare(observed, mean).pvalue)
    # repeated rows are not independent, which lowers p; a wrong law has p < 1e-30
    assert min(p) > 1e-10
    assert max(p) > 0.01


@every_tilted
def test_langevin_steps_keep_the_law(name):
    estimator = fitted(name, 1)
    rows = estimator.sample(2000, random_state=0, n_steps=10)
    assert uniform_order_statistic_test(name, rows) > 1e-3
    # and they do move
    still = estimator.sample(2000, random_state=0)
    assert (rows != still).mean() > 0.9


@every_estimator
def test_sample_is_reproducible(name):
    estimator = fitted(name)
    first = estimator.sample(100, random_state=3)
    assert first.shape == (100, 2)
    assert first.dtype == np.float64
    np.testing.assert_array_equal(first, estimator.sample(100, random_state=3))
    if name not in LATENT:
        np.testing.assert_array_equal(
            estimator.sample(20, random_state=3, n_steps=2),
            estimator.sample(20, random_state=3, n_steps=2),
        )
    assert (first != estimator.sample(100, random_state=4)).any()
    assert (estimator.sample(5) != estimator.sample(5)).any()
    assert estimator.sample().shape == (1, 2)


@every_tilted
@pytest.mark.parametrize("d", [1, 2])
def test_stein_score_is_the_gradient(name, d):
    estimator = fitted(name, d)
    assert getattr(estimator.model_.energy, "softness", None) != 0.0  # hard trees have none
    rows, step = fresh(d)[:200], 1e-5
    gradient = estimator.stein_score(rows)
    assert gradient.shape == rows.shape
    for j in range(d):
        move = step * np.eye(d)[j]
        rise = estimator.score_samples(rows + move) - estimator.score_samples(rows - move)
        error = np.abs(rise / (2 * step) - gradient[:, j]) / (1 + np.abs(gradient[:, j]))
        # a row in a hundred may sit on a kink of a piecewise-linear embedding
        assert np.quantile(error, 0.98) < 1e-4


@every_estimator
@pytest.mark.parametrize("contamination", ["auto", 0.1])
def test_rows_of_weight_zero_do_not_move_the_threshold(name, contamination):
    X, bad = data(2), np.full((60, 2), 50.0)
    # the bad rows also carry a flag that is constant in the others
    table = np.r_[np.c_[X, np.zeros(len(X))], np.c_[bad, np.ones(60)]]
    weight = np.r_[np.ones(len(X)), np.zeros(60)]
    estimator = ESTIMATORS[name]().set_params(contamination=contamination)
    estimator.fit(table, sample_weight=weight)
    assert np.isfinite(estimator.offset_)
    assert estimator.offset_ == clone(estimator).fit(table[: len(X)]).offset_


@every_estimator
def test_contamination_is_a_share_of_the_weight(name):
    weight = np.where(np.arange(400) % 4 == 0, 3.0, 0.5)
    estimator = ESTIMATORS[name]().set_params(contamination=0.1).fit(data(2), sample_weight=weight)
    flagged = weight[estimator.predict(data(2)) == -1].sum() / weight.sum()
    assert abs(flagged - 0.1) <= weight.max() / weight.sum()


@every_estimator
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_a_constant_column_is_met_within_the_precision_of_what_is_given(name, dtypes):
    X = np.c_[data(1).astype("float32"), np.full(400, 0.1)]
    given, asked = (X.astype(dtype) for dtype in dtypes)
    estimator = ESTIMATORS[name]().fit(given)
    np.testing.assert_array_equal(estimator.score_samples(asked), estimator.score_samples(given))
    moved = X + [0.0, 1e-3]
    assert (estimator.score_samples(moved) == -np.inf).all()


# ---------------------------------------------------------------------- determinism and state


@every_estimator
def test_fits_are_bit_identical_also_in_threads(name):
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        fits = list(pool.map(lambda _: ESTIMATORS[name]().fit(data(2)), range(2)))
    assert torch.get_num_threads() == threads
    for other in fits:
        np.testing.assert_array_equal(
            other.score_samples(fresh(2)), fitted(name).score_samples(fresh(2))
        )
        if name not in LATENT:
            np.testing.assert_array_equal(other.log_partition_, fitted(name).log_partition_)
        assert other.offset_ == fitted(name).offset_


class Noisy(torch.nn.Module):
    """A user's energy that draws on torch's global generator while it trains."""

    def __init__(self, n_features):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(n_features, 16), torch.nn.SiLU(), torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, z):
        return self.layers(z)


def test_fits_are_bit_identical_beside_other_estimators_that_use_the_global_generators():
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    quick = {"n_members": 1, "random_state": 0, "n_partition_samples": 2000}

    def with_dropout():
        estimator = NCEDensity(
            energy_model=Noisy, base="gaussian", max_epochs=20, early_stopping=False, **quick
        )
        return estimator.fit(data(2)).history_["train_loss"]

    def on_a_distribution():
        options = quick | {"hidden_layer_sizes": (8,), "max_epochs": 2, "early_stopping": False}
        return NCEDensity(base=normal, energy_model="mlp", **options).fit(data(2))

    alone, state = with_dropout(), torch.get_rng_state()
    stop = Event()

    def others():
        while not stop.is_set():
            on_a_distribution()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(others)
        try:
            beside = [with_dropout() for _ in range(3)]
        finally:
            stop.set()
        other.result()
    for losses in beside:
        np.testing.assert_array_equal(losses, alone)
    assert torch.equal(torch.get_rng_state(), state)


@every_estimator
def test_another_seed_gives_another_fit(name):
    other = ESTIMATORS[name]().set_params(random_state=1).fit(data(2))
    assert (other.score_samples(fresh(2)) != fitted(name).score_samples(fresh(2))).any()


@every_estimator
def test_global_generators_are_as_found(name):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    estimator = ESTIMATORS[name]().fit(data(1)[:50])
    if name in LATENT:
        estimator.sample(10, random_state=0)
        estimator.reconstruct(data(1))
    else:
        estimator.sample(10, random_state=0, n_steps=2)
        estimator.stein_score(data(1))
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32


@every_estimator
def test_refit_forgets_the_first_fit(name):
    estimator = ESTIMATORS[name]().fit(data(1)[:50]).fit(data(2))
    np.testing.assert_array_equal(
        estimator.score_samples(fresh(2)), fitted(name).score_samples(fresh(2))
    )
    assert estimator.n_features_in_ == 2
    assert set(vars(estimator)) == set(vars(fitted(name)))


@every_estimator
@pytest.mark.filterwarnings("ignore:log Z rests")  # little data
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_fit_leaves_the_estimator_as_it_was(name, error, monkeypatch):
    rows = data(1)[:50]
    quick = ESTIMATORS[name]()
    quick.set_params(max_epochs=min(2, quick.max_epochs))
    steps = ["_report", "_set_offset"]
    if name not in LATENT:
        quick.set_params(n_partition_samples=1000)
        steps.append("_measure")
    unfitted, estimator = clone(quick), clone(quick).fit(rows)
    scores, state = estimator.score_samples(rows), dict(vars(estimator))

    def interrupt(*args, **kwargs):
        raise error("now")

    for step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(type(estimator), step, interrupt)
            for victim in (unfitted, estimator):
                with pytest.raises(error, match="now"):
                    victim.fit(data(2)[:50])
        assert vars(unfitted) == vars(quick)
        assert vars(estimator) == state
    with pytest.raises(NotFittedError):
        unfitted.score_samples(rows)
    np.testing.assert_array_equal(estimator.score_samples(rows), scores)


# ---------------------------------------------------------------------- weights, ties, smoothing


@every_estimator
def test_rows_of_weight_zero_are_left_out(name):
    weight = (np.arange(400) % 4 > 0).astype(float)
    rows = data(2).copy()
    rows[weight == 0] += 100.0
    estimator = ESTIMATORS[name]().fit(rows, sample_weight=8.0 * weight)
    other = ESTIMATORS[name]().fit(rows[weight > 0])
    np.testing.assert_array_equal(estimator.score_samples(fresh(2)), other.score_samples(fresh(2)))
    assert estimator.offset_ == other.offset_


@every_estimator
def test_weights_stand_for_repeated_rows(name):
    # 400 rows, those of the right hump three times as heavy; the truth is known
    rows = data(1)
    weight = np.where(rows[:, 0] > -0.5, 3, 1)
    new = fresh(1)
    heavy = np.where(new[:, 0] > -0.5, 3.0, 1.0)
    weighted = ESTIMATORS[name]().fit(rows, sample_weight=weight.astype(float))
    repeated = ESTIMATORS[name]().fit(np.repeat(rows, weight, axis=0))
    plain = fitted(name, 1)
    scores = [e.score(new, sample_weight=heavy) for e in (weighted, repeated, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=0.12)
    # weights do matter
    assert scores[0] > scores[2] + 0.02
    share, other = ((e.sample(4000, random_state=0) > -0.5).mean() for e in (weighted, repeated))
    assert share == pytest.approx(other, abs=0.04)
    if not weighted.smoothing:  # a smoothed law has moved some mass across -0.5
        assert share == pytest.approx(np.average(rows[:, 0] > -0.5, weights=weight), abs=0.05)


@every_estimator
def test_ties_make_no_spike(name):
    rows = np.random.default_rng(0).poisson(6.0, size=(400, 1)).astype(float)
    estimator = ESTIMATORS[name]().fit(rows)
    # probability of the cell of an integer: what a histogram would say
    t = np.arange(0.5, 14.5, 0.01)
    cells = np.exp(estimator.score_samples(t[:, None])).reshape(14, 100).mean(axis=1)
    truth = stats.poisson(6.0).pmf(np.arange(1, 15))
    assert np.abs(cells - truth).sum() < 0.25
    # density at the integers is about that of their cells
    peaks = np.exp(estimator.score_samples(np.arange(1.0, 15.0)[:, None]))
    assert (peaks < 2.0 * truth.max()).all()


@every_estimator
@pytest.mark.parametrize("h", [0.7, "scott"])
def test_smoothing_adds_noise_of_that_width(name, h):
    estimator = ESTIMATORS[name]().set_params(smoothing=h)
    estimator.set_params(max_epochs=min(10, estimator.max_epochs)).fit(data(1))
    width = 400 ** (-1 / 5) if h == "scott" else h
    points, volume = grid(name, 1)
    mass = np.exp(estimator.score_samples(points)) * volume
    mean = mass @ points[:, 0] / mass.sum()
    variance = mass @ np.square(points[:, 0] - mean) / mass.sum()
    assert mean == pytest.approx(data(1).mean(), abs=0.15)
    assert variance == pytest.approx(data(1).var() * (1 + width**2), rel=0.15)


# ---------------------------------------------------------------------- outlier detector


@every_estimator
@pytest.mark.parametrize("contamination", [0.05, 0.5])
def test_contamination_is_the_share_of_flagged_training_rows(name, contamination):
    estimator = ESTIMATORS[name]().set_params(contamination=contamination)
    estimator.set_params(max_epochs=min(10, estimator.max_epochs))
    labels = estimator.fit_predict(data(2))
    assert (labels == -1).sum() == contamination * 400
    np.testing.assert_array_equal(labels, estimator.predict(data(2)))


@every_estimator
def test_auto_contamination_flags_a_twentieth_of_new_rows(name):
    # the quantile of 400 rows has an error of 1.1 %
    for d in (1, 2):
        assert 0.02 < (fitted(name, d).predict(fresh(d)) == -1).mean() < 0.085


@every_estimator
@pytest.mark.filterwarnings("ignore:log Z rests")  # little data
def test_auto_threshold_counts_weights(name):
    # a twentieth of the weight, not of the rows
    rows = data(1)
    weight = np.where(rows[:, 0] > -0.5, 1.0, 0.02)
    estimator = ESTIMATORS[name]().fit(rows, sample_weight=weight)
    held = np.isfinite(estimator.out_of_fold_scores_)
    flagged = estimator.out_of_fold_scores_[held] < estimator.offset_
    assert np.average(flagged, weights=weight[held]) == pytest.approx(0.05, abs=0.01)


@every_estimator
def test_decision_function_is_the_score_minus_the_offset(name):
    estimator = fitted(name)
    decision = estimator.decision_function(fresh(2))
    np.testing.assert_array_equal(decision, estimator.score_samples(fresh(2)) - estimator.offset_)
    np.testing.assert_array_equal(estimator.predict(fresh(2)), np.where(decision < 0, -1, 1))
    assert estimator.predict(np.full((1, 2), 50.0)) == -1


@every_tilted
def test_out_of_fold_scores_are_of_members_that_have_not_seen_the_row(name):
    estimator = fitted(name)
    scores = estimator.out_of_fold_scores_
    assert np.isfinite(scores).all()
    # each is the score of one of the members
    x = torch.as_tensor(estimator._columns.standardize(data(2))[0])
    with torch.no_grad():
        members = estimator.model_.log_members(x).numpy() + estimator._columns.log_det
    which = np.abs(members - scores).argmin(axis=0)
    np.testing.assert_allclose(members[which, np.arange(400)], scores, atol=1e-9)
    assert np.bincount(which).tolist() == [200, 200]
    # and, on average, of the one that likes the row less
    assert scores.mean() <= members.mean()


# ---------------------------------------------------------------------- bad input


def bad_inputs():
    rows = make_two_moons(30, random_state=0)
    with_nan, with_inf, huge = rows.copy(), rows.copy(), rows.copy()
    with_nan[3, 1], with_inf[3, 1], huge[3, 1] = np.nan, np.inf, 1e200
    tiny = rows * [1.0, 1e-320]
    weight = np.ones(30)
    weight[3] = -1.0
    yield "nan", with_nan, None, "NaN"
    yield "inf", with_inf, None, "infinity"
    yield "one row", rows[:1], None, r"1 sample.*minimum of 2"
    yield "one distinct row", rows[[0] * 10], None, "every column of X is constant"
    yield "one axis", rows[:, 0], None, "Expected 2D array"
    yield "no column", rows[:, :0], None, "0 feature"
    yield "strings", np.array([["a", "b"], ["c", "d"]]), None, "could not convert string"
    yield "huge", huge, None, "column 1 spans"
    yield "tiny", tiny, None, "column 1 varies by less than"
    yield "negative weight", rows, weight, "Negative values in data passed to `sample_weight`"
    yield "wrong weights", rows, weight[:7], "sample_weight.shape"
    yield "one weight", rows, np.eye(30)[0], "positive for at least 2 samples"
    yield "nan weight", rows, np.full(30, np.nan), "sample_weight contains NaN"


@every_estimator
@pytest.mark.parametrize(
    ("X", "weight", "message"), [pytest.param(*case, id=what) for what, *case in bad_inputs()]
)
def test_bad_rows_are_refused_by_name(name, X, weight, message):
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name]().fit(X, sample_weight=weight)


def test_bad_column_of_a_frame_is_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"good": [0.0, 1.0, 2.0], "bad": [0.0, 1.0, 1e200]})
    for factory in ESTIMATORS.values():
        with pytest.raises(ValueError, match="column 'bad' spans"):
            factory().fit(frame)


@every_estimator
@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("base", "nonsense"), ("base", 3), ("energy_model", "nonsense"), ("n_members", 0),
        ("n_members", 1.5), ("hidden_layer_sizes", 3), ("learning_rate", -1.0),
        ("weight_decay", -1.0), ("batch_size", 0), ("max_epochs", -1), ("patience", 0),
        ("early_stopping", "yes"), ("validation_fraction", 1.0), ("n_partition_samples", 10),
        ("smoothing", -0.1), ("smoothing", "silverman"), ("contamination", 0.6),
        ("callbacks", "print"), ("device", 3), ("device", "nonsense"), ("random_state", "seed"),
        ("warm_start", "yes"), ("verbose", -1), ("base", []), ("base", ["gaussian", "nonsense"]),
    ],
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(name, parameter, value):
    estimator = ESTIMATORS[name]()
    if parameter not in estimator.get_params():
        pytest.skip("a parameter of tilted bases")
    estimator.set_params(**{parameter: value})
    with pytest.raises(ValueError, match=parameter):
        estimator.fit(data(1)[:50])


@every_estimator
def test_new_rows_of_another_width_are_refused(name):
    methods = ("energy", "stein_score", "base_score_samples")
    if name in LATENT:
        methods = ("transform", "reconstruct")
    for method in ("score_samples", "predict", *methods):
        with pytest.raises(ValueError, match="expecting 2 features"):
            getattr(fitted(name), method)(data(1))


@every_estimator
def test_bad_sample_sizes_are_refused(name):
    for n in (0, -3, 2.5, "ten"):
        with pytest.raises(ValueError, match="n_samples"):
            fitted(name).sample(n)
    if name not in LATENT:
        for n in (-1, 2.5):
            with pytest.raises(ValueError, match="n_steps"):
                fitted(name).sample(3, n_steps=n)


@every_estimator
def test_unfitted_estimators_say_so(name):
    estimator = clone(fitted(name))
    methods = ("transform", "reconstruct") if name in LATENT else ("energy",)
    for method in ("score_samples", "predict", "decision_function", "score", *methods):
        with pytest.raises(NotFittedError):
            getattr(estimator, method)(data(2))
    with pytest.raises(NotFittedError):
        estimator.sample()


# ---------------------------------------------------------------------- small data


@every_estimator
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [2, 5])
def test_a_handful_of_rows(name, n):
    estimator = ESTIMATORS[name]()
    if name not in LATENT:
        estimator.set_params(n_members=4)
    estimator.fit(data(2)[:n])
    assert np.isfinite(estimator.score_samples(fresh(2))).all()
    assert np.isfinite(estimator.sample(10)).all()
