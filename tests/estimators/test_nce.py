"""NCEDensity: closed forms, objectives, base and noise, energies, and what the knobs do."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity, KNeighborsClassifier
from skorch.callbacks import Callback
from torch import nn
from torch.distributions import Independent, Normal, Uniform

from skebm import Boosting, NCEDensity, Network
from skebm.bases import FlowBase, MarginalGaussianization
from skebm.datasets import Funnel, make_two_moons
from skebm.exceptions import DivergenceError
from skebm.models import FeatureMap, TiltedMixture
from skebm.training import Trained, automatic

QUICK = {"base": "gaussian", "n_members": 2, "noise_ratio": 3, "random_state": 0}


def network(module=None, **options):
    """Quick to train; a module has sizes of its own."""
    sizes = {} if module is not None else {"hidden_layer_sizes": (16,)}
    quick = {"batch_size": 64, "max_epochs": 40, "learning_rate": 0.01, "patience": 1000}
    return Network(module, **sizes | quick | options)


def normal(mean, std=1.0):
    """Independent normal columns as a torch distribution in float64."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return Independent(Normal(mean, torch.full_like(mean, std)), 1)


@pytest.fixture(scope="module")
def moons():
    return make_two_moons(400, random_state=0)


@pytest.fixture(scope="module")
def new_moons():
    return make_two_moons(1500, random_state=1)


def two_humps(n, seed):
    """Rows of a mixture of two normal distributions, and its log-density."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(n) < 0.5, rng.normal(-2.0, 0.5, n), rng.normal(1.0, 0.8, n))
    density = 0.5 * stats.norm(-2.0, 0.5).pdf(x) + 0.5 * stats.norm(1.0, 0.8).pdf(x)
    return x[:, None], np.log(density)


# ---------------------------------------------------------------------- a model known exactly


class Linear(nn.Module):
    """f_k(z) = a_k . z."""

    def __init__(self, slopes):
        super().__init__()
        self.register_buffer("slopes", torch.as_tensor(slopes, dtype=torch.float64))

    def forward(self, z):
        return (z * self.slopes[:, None]).sum(-1)

    def member(self, k):
        return Linear(self.slopes[k : k + 1])


def known(slopes):
    """Estimator whose members are N(0, I) tilted by a_k . x: normal distributions with means a_k.

    log Z_k is |a_k|^2 / 2. (Energies see coordinates clipped at five: that changes nothing here.)
    """
    n_members, d = np.shape(slopes)
    rng = np.random.default_rng(0)
    estimator = NCEDensity(base=normal([0.0] * d), n_members=n_members, energy_model=None)
    estimator.fit(rng.normal(size=(100, d)))
    identity = np.tile([-1.0, 0.0, 1.0], (d, 1))
    features = FeatureMap(MarginalGaussianization(identity, identity, np.ones((d, 3))))
    bases = list(estimator.model_.bases)
    # in standardised columns: X = c + s x, so that a . X = a . c + (a s) . x
    a, columns = np.array(slopes), estimator._columns
    estimator.model_ = TiltedMixture(bases, bases, features, Linear(a * columns.scale))
    estimator.log_partition_ = np.square(a).sum(1) / 2 - a @ columns.center
    estimator.model_.log_partition = torch.as_tensor(estimator.log_partition_)
    return estimator


MEANS = [[0.7, -0.3], [-0.2, 0.5], [0.0, 0.9]]


def log_mixture(X):
    logs = [stats.multivariate_normal(mean).logpdf(X) for mean in MEANS]
    return np.logaddexp.reduce(logs, axis=0) - math.log(len(MEANS))


def test_density_of_a_known_model():
    estimator = known(MEANS)
    X = np.random.default_rng(1).normal(size=(200, 2))
    np.testing.assert_allclose(estimator.score_samples(X), log_mixture(X), atol=1e-9)
    # gradient: mean of a_k - x under the posterior of the members
    logs = np.stack([stats.multivariate_normal(mean).logpdf(X) for mean in MEANS])
    share = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
    np.testing.assert_allclose(estimator.stein_score(X), share.T @ MEANS - X, atol=1e-9)


@pytest.mark.parametrize("n_steps", [0, 10])
def test_samples_of_a_known_model(n_steps):
    estimator, p = known(MEANS), []
    for seed in range(2):
        rows = estimator.sample(2000, random_state=seed, n_steps=n_steps)
        for direction in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, -0.8]):

            def cdf(t, direction=direction):
                return np.mean([stats.norm(np.dot(m, direction)).cdf(t) for m in MEANS], axis=0)

            p.append(stats.kstest(rows @ direction, cdf).pvalue)
    assert min(p) > 2e-3
    assert np.median(p) > 0.05


def test_energy_of_one_member_is_minus_base_and_tilt():
    estimator = known([[0.7, -0.3]])
    X = np.random.default_rng(1).normal(size=(50, 2))
    f = (X - estimator._columns.center) @ [0.7, -0.3]
    expected = -(stats.multivariate_normal([0.0, 0.0]).logpdf(X) + f)
    np.testing.assert_allclose(estimator.energy(X), expected, atol=1e-9)


# ---------------------------------------------------------------------- learning a known tilt


@pytest.mark.parametrize(
    ("objective", "noise_ratio"),
    [("nce", 1), ("nce", 5), ("nce", 0.5), ("ranking", 1), ("self_normalized", 2)],
)
def test_gaussian_against_gaussian(objective, noise_ratio):
    # log p - log q is linear, and so is the energy in its nearly linear coordinates
    mean = np.array([0.6, -0.4])
    rng = np.random.default_rng(0)
    estimator = NCEDensity(
        objective=objective, noise_ratio=noise_ratio, base=normal([0.0, 0.0]), n_members=1,
        energy_model=Network(lambda d: nn.Linear(d, 1), learning_rate=0.03, max_epochs=20),
        random_state=0,
    ).fit(rng.normal(mean, size=(2000, 2)))  # fmt: skip
    new = rng.normal(mean, size=(4000, 2))
    truth = stats.multivariate_normal(mean).logpdf(new)
    assert estimator.n_iter_ > 0
    assert (truth - estimator.score_samples(new)).mean() < 0.02  # of .26, that of the base
    np.testing.assert_allclose(estimator.stein_score(new[:100]), mean - new[:100], atol=0.25)
    if objective == "ranking":
        assert not hasattr(estimator, "log_partition_learned_")
    else:
        # f itself is known up to a constant, which log Z takes up
        learned = estimator.log_partition_learned_ - estimator.log_partition_
        assert np.abs(learned).max() < 0.15


def test_without_a_base():
    X, _ = two_humps(400, 0)
    new, truth = two_humps(1000, 1)
    model = network(max_epochs=60)
    estimator = NCEDensity(base=None, energy_model=model, n_members=2, random_state=0).fit(X)
    assert (truth - estimator.score_samples(new)).mean() < 0.05
    # the base is the confining distribution: a normal one with three times the standard deviation
    confining = stats.norm(X.mean(), 3.0 * X.std())
    np.testing.assert_allclose(
        estimator.base_score_samples(new), confining.logpdf(new[:, 0]), atol=1e-6
    )
    t = np.linspace(-25.0, 25.0, 2001)[:, None]
    total = np.exp(estimator.score_samples(t)).sum() * (t[1, 0] - t[0, 0])
    assert total == pytest.approx(1.0, abs=0.03)


# ---------------------------------------------------------------------- given base and noise


def distributions():
    X, _ = two_humps(500, 3)
    for kind in ("full", "tied", "diag", "spherical"):
        yield f"mixture-{kind}", GaussianMixture(2, covariance_type=kind, random_state=0).fit(X)
    yield "kernel", KernelDensity(bandwidth=0.3).fit(X)
    yield "torch", normal([-0.5], 2.0)


@pytest.mark.parametrize(
    ("kind", "given"), [pytest.param(*case, id=case[0]) for case in distributions()]
)
def test_fitted_distribution_as_base_is_in_the_units_of_X(kind, given):
    X, _ = two_humps(300, 0)
    estimator = NCEDensity(base=given, n_members=2, energy_model=None).fit(X)
    new, _ = two_humps(200, 1)
    if kind == "torch":
        expected = given.log_prob(torch.as_tensor(new)).numpy()
        cdf = stats.norm(-0.5, 2.0).cdf
    else:
        expected = given.score_samples(new)
        t = np.linspace(-12.0, 12.0, 4001)
        mass = np.cumsum(np.exp(given.score_samples(t[:, None]))) * (t[1] - t[0])
        cdf = lambda x: np.interp(x, t, mass)  # noqa: E731
    np.testing.assert_allclose(estimator.score_samples(new), expected, atol=1e-9)
    assert stats.kstest(estimator.sample(2000, random_state=0)[:, 0], cdf).pvalue > 1e-3
    assert estimator.log_partition_.tolist() == [0.0, 0.0]
    assert estimator.log_partition_std_error_.tolist() == [0.0, 0.0]


def test_fitted_mixture_in_three_columns():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3))
    for kind in ("full", "tied", "diag", "spherical"):
        mixture = GaussianMixture(3, covariance_type=kind, random_state=0).fit(X)
        estimator = NCEDensity(base=mixture, energy_model=None).fit(X[:100])
        np.testing.assert_allclose(estimator.score_samples(X), mixture.score_samples(X), atol=1e-9)


def test_unfitted_density_is_fitted_to_standardised_columns():
    X, _ = two_humps(300, 0)
    given = KernelDensity(bandwidth=0.25)
    estimator = NCEDensity(base=given, n_members=1, energy_model=None, random_state=0).fit(X)
    assert not hasattr(given, "tree_")
    held = ~np.isnan(estimator.out_of_fold_scores_)
    assert held.sum() == 30
    center, scale = np.median(X), np.subtract(*np.percentile(X, [75, 25])) / 1.349
    expected = KernelDensity(bandwidth=0.25).fit((X[~held] - center) / scale)
    new, _ = two_humps(100, 1)
    np.testing.assert_allclose(
        estimator.score_samples(new), expected.score_samples((new - center) / scale) - np.log(scale)
    )


def test_distribution_without_fit_as_base():
    class Wide:
        n_features_in_ = 1

        def score_samples(self, X):
            return stats.norm(1.0, 3.0).logpdf(X[:, 0])

        def sample(self, n, random_state=None):
            return stats.norm(1.0, 3.0).rvs(size=(n, 1), random_state=random_state)

    X, _ = two_humps(100, 0)
    estimator = NCEDensity(base=Wide(), energy_model=None).fit(X)
    np.testing.assert_allclose(estimator.score_samples(X), Wide().score_samples(X))


@pytest.mark.filterwarnings("ignore:the standard error of log Z")
@pytest.mark.parametrize(
    "noise",
    [
        normal([-0.5], 3.0),
        GaussianMixture(2, random_state=0).fit(two_humps(300, 5)[0]),
        KernelDensity(bandwidth=0.6).fit(two_humps(300, 5)[0]),
        KernelDensity(bandwidth=0.6, rtol=1e-4),
        "gmm",
        ["gaussian", "uniform"],
    ],
    ids=["torch", "mixture", "kernel", "unfitted kernel", "name", "names"],
)
def test_noise_need_not_be_the_base(noise):
    X, _ = two_humps(300, 0)
    new, truth = two_humps(1000, 1)
    # few samples for log Z: kernels are slow
    few = {"n_partition_samples": 16_384, "noise": noise}
    estimator = NCEDensity(**QUICK, energy_model=network(), **few).fit(X)
    assert estimator.n_iter_ > 0
    assert (truth - estimator.score_samples(new)).mean() < 0.08
    t = np.linspace(-15.0, 15.0, 601)[:, None]
    total = np.exp(estimator.score_samples(t)).sum() * (t[1, 0] - t[0, 0])
    assert total == pytest.approx(1.0, abs=0.03)
    assert abs(np.mean(estimator.sample(2000, random_state=0)) - X.mean()) < 0.15


def test_distributions_of_another_dimension_are_refused(moons):
    for where in ("base", "noise"):
        with pytest.raises(ValueError, match=f"{where} has 3 features, but 2 columns of X vary"):
            NCEDensity(**QUICK | {where: normal([0.0] * 3)}).fit(moons)


def test_a_base_must_be_able_to_sample(moons):
    with pytest.raises(ValueError, match="'base' parameter"):
        NCEDensity(base=IsolationForest()).fit(moons)


def unit_square():
    zeros = torch.zeros(2, dtype=torch.float64)
    return Independent(Uniform(zeros, zeros + 1.0), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda X: KernelDensity(kernel="tophat", bandwidth=0.1), "gives no density to .* held-"),
        (lambda X: unit_square(), r"gives no density to \d+ of the held-out rows"),
        (lambda X: KernelDensity(kernel="epanechnikov"), "cannot draw rows"),
        (lambda X: KernelDensity(kernel="epanechnikov").fit(X), "cannot draw rows"),
        (lambda X: KernelDensity(kernel="cosine", bandwidth=3.0).fit(X), "cannot draw rows"),
    ],
)
@pytest.mark.parametrize("where", ["base", "noise"])
def test_distributions_that_no_tilt_can_repair_are_refused(where, given, message, moons):
    with pytest.raises(ValueError, match=rf"(?s)^{where}=.*{message}"):
        NCEDensity(**QUICK | {where: given(moons)}).fit(moons)


def test_a_compact_kernel_that_covers_the_rows_is_taken(moons):
    base = KernelDensity(kernel="tophat", bandwidth=3.0)
    estimator = NCEDensity(**QUICK | {"base": base}, energy_model=None).fit(moons)
    assert np.isfinite(estimator.out_of_fold_scores_).all()


# ---------------------------------------------------------------------- energies


class Silu(nn.Module):
    """A user's module; its name for the last layer is a common one."""

    def __init__(self, n_features):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, 32), nn.SiLU(), nn.Linear(32, 32),
                                  nn.SiLU())  # fmt: skip
        self.classifier = nn.Linear(32, 1)

    def forward(self, z):
        return self.classifier(self.body(z)).squeeze(-1)


def seeded(make, *args):
    """A module that is the same in every process: torch seeds its generator by the clock."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args)


SMOOTH = {
    "boosting": Boosting(max_iter=30),
    "mlp": network(max_epochs=30),
    "periodic": network(embedding="periodic", max_epochs=20),
    "class": network(Silu, max_epochs=30),
    "factory": network(lambda d: nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, 1))),
    "instance": network(seeded(Silu, 2), max_epochs=30),
    "HistGradientBoosting": HistGradientBoostingClassifier(max_iter=20, random_state=0),
}
OPAQUE = {
    "GradientBoosting": GradientBoostingClassifier(n_estimators=30, random_state=0),
    "RandomForest": RandomForestClassifier(20, min_samples_leaf=5, random_state=0),
    "LogisticRegression": LogisticRegression(),
}


@cache
def fitted(name):
    """NCEDensity with that energy, on `moons`."""
    # logistic regression is linear: it can move a base, not bend it
    base = normal([1.0, 0.5]) if name == "LogisticRegression" else "gaussian"
    estimator = NCEDensity(**QUICK | {"base": base}, energy_model=(SMOOTH | OPAQUE)[name])
    return estimator.fit(make_two_moons(400, random_state=0))


@pytest.mark.parametrize("name", [*SMOOTH, *OPAQUE])
def test_every_energy_improves_on_the_base(name, moons, new_moons):
    model, opaque = (SMOOTH | OPAQUE)[name], name in OPAQUE
    given = copy.deepcopy(model)
    assert hasattr(NCEDensity(energy_model=model), "stein_score") != opaque
    estimator = fitted(name)
    assert hasattr(estimator, "stein_score") != opaque
    assert estimator.n_iter_ > 0
    gain = estimator.score_samples(new_moons) - estimator.base_score_samples(new_moons)
    assert gain.mean() > max(0.02, 3.0 * gain.std() / math.sqrt(len(gain)))
    # normalised, whatever the energy; those that jump take a finer grid
    finer = 4 if opaque else 3
    across, up = np.linspace(-7.0, 8.0, 60 * finer + 1), np.linspace(-5.0, 5.5, 50 * finer + 1)
    points = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    total = np.exp(estimator.score_samples(points)).sum() * np.diff(across)[0] * np.diff(up)[0]
    error = math.sqrt(np.square(estimator.log_partition_std_error_).sum()) / 2
    assert abs(math.log(total)) < 4.0 * error + 0.01  # .01: jumps between the points of the grid
    drawn = estimator.sample(500, random_state=0, n_steps=3)
    np.testing.assert_allclose(drawn.mean(axis=0), moons.mean(axis=0), atol=0.3)
    if opaque:
        with pytest.raises(AttributeError, match="stein_score"):
            estimator.stein_score(moons)
    # what the user gave is as it was
    if not isinstance(model, Network):
        assert repr(model.get_params()) == repr(given.get_params())
        assert not hasattr(model, "classes_")
    elif isinstance(model.module, nn.Module):
        for key, value in model.module.state_dict().items():
            assert torch.equal(value, given.module.state_dict()[key])


def test_logit_of_a_classifier_is_the_log_ratio(moons):
    # f is the logit plus log nu, whatever nu: log Z of a good classifier is then about zero
    for noise_ratio in (1, 10):
        estimator = NCEDensity(
            base=normal([0.8, 0.2]), n_members=1, energy_model=LogisticRegression(C=1e4),
            noise_ratio=noise_ratio, random_state=0,
        ).fit(np.random.default_rng(0).normal([0.2, 0.9], size=(2000, 2)))  # fmt: skip
        new = np.random.default_rng(1).normal([0.2, 0.9], size=(2000, 2))
        truth = stats.multivariate_normal([0.2, 0.9]).logpdf(new)
        assert (truth - estimator.score_samples(new)).mean() < 0.02  # of .43, that of the base
        assert np.abs(estimator.log_partition_).max() < 0.15


def test_classifiers_are_of_data_against_the_base(moons):
    for model in ("boosting", LogisticRegression()):
        for given in ({"noise": "uniform"}, {"base": None, "noise": "gaussian"}):
            with pytest.raises(ValueError, match="needs a base, and noise=None"):
                NCEDensity(**QUICK | given, energy_model=model).fit(moons[:60])


@pytest.mark.parametrize("objective", ["ranking", "self_normalized"])
@pytest.mark.parametrize("model", ["auto", Boosting(), LogisticRegression()], ids=repr)
def test_classifiers_have_one_objective(objective, model, moons):
    with pytest.raises(ValueError, match=f'objective="{objective}" trains networks only'):
        NCEDensity(objective=objective, energy_model=model).fit(moons)


def test_classifier_without_weights_says_so(moons):
    estimator = NCEDensity(**QUICK, energy_model=KNeighborsClassifier())
    estimator.fit(moons)
    with pytest.raises(ValueError, match="KNeighborsClassifier.* takes no sample_weight"):
        estimator.fit(moons, sample_weight=np.linspace(1.0, 2.0, len(moons)))


def test_module_of_the_wrong_shape_is_refused(moons):
    with pytest.raises(ValueError, match="energy_model must map"):
        NCEDensity(**QUICK, energy_model=lambda d: nn.Linear(d, 3)).fit(moons)
    with pytest.raises(ValueError, match="energy_model failed on rows of shape"):
        NCEDensity(**QUICK, energy_model=nn.Linear(5, 1)).fit(moons)


# ---------------------------------------------------------------------- training


def test_no_energy_is_the_base(moons, new_moons):
    estimator = NCEDensity(**QUICK, energy_model=None).fit(moons)
    assert estimator.n_iter_ == 0
    np.testing.assert_array_equal(
        estimator.score_samples(new_moons), estimator.base_score_samples(new_moons)
    )
    _, std = estimator.score_samples(new_moons, return_std=True)
    assert (std == 0).all()
    assert np.isinf(estimator.effective_sample_size_).all()
    # each member is a normal distribution fitted to half of the rows: nearly that of all rows
    expected = stats.multivariate_normal(moons.mean(axis=0), np.cov(moons.T)).logpdf(new_moons)
    assert np.abs(estimator.score(new_moons) - expected.mean()) < 0.02
    with pytest.raises(ValueError, match="energy_model=None is the base alone"):
        estimator.set_params(base=None).fit(moons)


@pytest.mark.parametrize("model", ["boosting", "mlp"])
def test_history(moons, model):
    estimator = fitted(model)
    history = estimator.history_
    level = history["held_out_log_likelihood"]
    assert len(history["n_iter"]) == len(level)
    assert history["n_iter"][0] == 0
    assert history["n_iter"][-1] <= 30
    # first the base, out of fold: about its score on the training rows
    assert level[0] == pytest.approx(estimator.base_score_samples(moons).mean(), abs=0.05)
    assert estimator.n_iter_ == history["n_iter"][np.nanargmax(level)]
    # before recalibration, and of single members: the out-of-fold scores are not worse
    assert estimator.out_of_fold_scores_.mean() > np.nanmax(level) - 0.02
    if model == "mlp":
        assert np.isfinite(history["train_loss"][1:]).all()
        assert history["train_loss"][-1] < history["train_loss"][1]


def test_without_early_stopping_the_last_state_counts(moons):
    trees = Boosting(max_iter=12, early_stopping=False)
    for model, n_iter in ((trees, 12), (network(patience=None), 40)):
        assert NCEDensity(**QUICK, energy_model=model).fit(moons).n_iter_ == n_iter


def test_few_rows_are_judged_before_patience_ends(moons):
    # an epoch of a network on few rows is a step or two; defaults must learn all the same
    estimator = NCEDensity(**QUICK, energy_model=Network(hidden_layer_sizes=(16,))).fit(moons)
    assert estimator.n_iter_ > 0


def test_one_member_holds_out_a_validation_split(moons, new_moons):
    estimator = NCEDensity(**QUICK | {"n_members": 1}, energy_model=Boosting(max_iter=30))
    estimator.fit(moons)
    assert (~np.isnan(estimator.out_of_fold_scores_)).sum() == 40
    assert estimator.log_partition_.shape == (1,)
    assert estimator.score(new_moons) > estimator.base_score_samples(new_moons).mean()


class Watch(Callback):
    def __init__(self, stop_after=None, break_in_batch=None):
        self.stop_after, self.break_in_batch = stop_after, break_in_batch
        self.epochs, self.batches, self.began, self.ended = 0, 0, 0, 0

    def on_train_begin(self, net, **kwargs):
        self.began += 1

    def on_train_end(self, net, **kwargs):
        self.ended += 1

    def on_batch_begin(self, net, **kwargs):
        self.batches += 1
        if self.batches == self.break_in_batch:
            raise KeyboardInterrupt("from a batch")

    def on_epoch_end(self, net, **kwargs):
        self.epochs += 1
        assert math.isfinite(net.history[-1, "train_loss"])
        if self.epochs == self.stop_after:
            raise KeyboardInterrupt


def test_callbacks_of_skorch_are_called(moons):
    watch = Watch()
    NCEDensity(**QUICK, energy_model=network(max_epochs=4, callbacks=[watch])).fit(moons)
    assert (watch.began, watch.epochs, watch.ended) == (1, 4, 1)
    assert watch.batches == 4 * round(200 / 64)


def test_history_of_skorch_is_left_behind(moons):
    estimator = NCEDensity(**QUICK, energy_model=network(max_epochs=4)).fit(moons)
    log = estimator.training_log_
    losses = [row["train_loss"] for row in log]
    np.testing.assert_array_equal(losses, estimator.history_["train_loss"][1:])
    assert not any(any(row["batches"]) for row in log)
    watched = NCEDensity(**QUICK, energy_model=network(max_epochs=4, callbacks=[Watch()]))
    batches = watched.fit(moons).training_log_[0]["batches"]
    assert len(batches) == round(200 / 64)
    np.testing.assert_allclose(np.mean([b["train_loss"] for b in batches]), losses[0], rtol=1e-6)
    trees = NCEDensity(**QUICK, energy_model=Boosting(max_iter=2)).fit(moons)
    assert not hasattr(trees, "training_log_")


def test_an_int_is_one_hidden_layer(moons):
    one, same = (
        NCEDensity(**QUICK, energy_model=network(hidden_layer_sizes=size, max_epochs=4)).fit(moons)
        for size in (16, (16,))
    )
    np.testing.assert_array_equal(one.history_["train_loss"], same.history_["train_loss"])


def test_callback_may_end_the_training(moons):
    watch = Watch(stop_after=3)
    estimator = NCEDensity(**QUICK, energy_model=network(callbacks=[watch])).fit(moons)
    assert (watch.epochs, watch.ended) == (3, 1)
    assert len(estimator.history_["n_iter"]) == 4


def test_interrupt_while_training_is_passed_on(moons):
    estimator = NCEDensity(**QUICK, energy_model=network())
    estimator.set_params(energy_model__callbacks=[Watch(break_in_batch=5)])
    with pytest.raises(KeyboardInterrupt, match="from a batch"):
        estimator.fit(moons)
    assert [name for name in vars(estimator) if name.endswith("_")] == []


def test_divergence_is_an_error_that_says_what_to_lower(moons):
    class Explosive(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))

        def forward(self, z):
            return torch.exp(1e3 * (z @ self.weight).square())

    estimator = NCEDensity(**QUICK, energy_model=network(Explosive))
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        estimator.fit(moons)
    assert not hasattr(estimator, "model_")


def test_progress_bar(moons, capsys):
    NCEDensity(**QUICK, energy_model=network(max_epochs=2), verbose=1).fit(moons)
    captured = capsys.readouterr()
    assert captured.out == ""
    for stage in ("base: gaussian", "energy", "log Z"):
        assert stage in captured.err
    NCEDensity(**QUICK, energy_model=network(max_epochs=2)).fit(moons)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_device_may_be_an_object(moons):
    scores = [
        NCEDensity(**QUICK, energy_model=network(max_epochs=5), device=device)
        .fit(moons)
        .score_samples(moons)
        for device in ("cpu", torch.device("cpu"))
    ]
    np.testing.assert_array_equal(*scores)


# ---------------------------------------------------------------------- warm start


def warm(**options):
    return NCEDensity(**QUICK | options, energy_model=network(max_epochs=15), warm_start=True)


@cache
def _first():
    return warm().fit(make_two_moons(400, random_state=0))


@pytest.fixture
def first():
    """A first fit, on `moons`."""
    estimator = copy.deepcopy(_first())
    assert estimator.n_iter_ > 0
    return estimator


def test_warm_start_goes_on(first, moons, new_moons):
    estimator = first
    before, columns = estimator.score(new_moons), estimator._columns
    base = estimator.base_score_samples(new_moons)
    reached = np.nanmax(estimator.history_["held_out_log_likelihood"])
    estimator.fit(moons)
    again = estimator.history_["held_out_log_likelihood"]
    # same rows, same folds: it starts where it was, and is not worse after
    assert again[0] == pytest.approx(reached, abs=0.03)
    assert np.nanmax(again) >= again[0]
    assert estimator.score(new_moons) > before - 0.05
    np.testing.assert_array_equal(estimator.base_score_samples(new_moons), base)
    for name in ("center", "scale", "spread"):
        np.testing.assert_allclose(getattr(estimator._columns, name), getattr(columns, name))


def test_warm_start_that_finds_nothing_better_keeps_its_tilt(first, moons, new_moons):
    before = first.score(new_moons)
    first.set_params(energy_model__learning_rate=1e-12, energy_model__max_epochs=1).fit(moons)
    assert first.score(new_moons) == pytest.approx(before, abs=0.05)
    assert (first.log_partition_ != 0).all()


def test_warm_start_with_other_members_starts_anew(first, moons, new_moons):
    estimator = first.set_params(n_members=3, energy_model__max_epochs=3).fit(moons)
    fresh = warm(n_members=3).set_params(energy_model__max_epochs=3).fit(moons)
    np.testing.assert_array_equal(
        estimator.score_samples(new_moons), fresh.score_samples(new_moons)
    )


def test_warm_start_is_for_the_same_columns(first, moons):
    estimator = first.set_params(energy_model__max_epochs=1)
    with pytest.warns(UserWarning, match="X has other columns: this fit starts anew"):
        estimator.fit(np.c_[moons, moons[:, :1] ** 2])
    assert estimator.n_features_in_ == 3


# ---------------------------------------------------------------------- smoothing


@pytest.mark.parametrize("smoothing", [0.5, "scott"])
def test_smoothing_of_a_gaussian_is_known(smoothing):
    covariance = [[4.0, 1.5], [1.5, 1.0]]
    X = np.random.default_rng(0).multivariate_normal([1.0, -2.0], covariance, size=2000)
    h = 2000 ** (-1 / 6) if smoothing == "scott" else smoothing
    estimator = NCEDensity(**QUICK, energy_model=None, smoothing=smoothing).fit(X)
    # X + h eps, eps independent with the standard deviations of the columns
    covariance = np.cov(X.T) + h**2 * np.diag(X.var(axis=0))
    expected = stats.multivariate_normal(X.mean(axis=0), covariance)
    new = expected.rvs(4000, random_state=1)
    gap = expected.logpdf(new) - estimator.score_samples(new)
    assert abs(gap.mean()) < 0.01


def test_a_flow_in_the_base():
    truth = Funnel(n_features=3)
    X, new = truth.sample(600, random_state=0), truth.sample(2000, random_state=1)
    settings = {"energy_model": None, "n_members": 2, "random_state": 0}
    mixtures = NCEDensity(base=["gmm", "gaussianized_gmm"], **settings).fit(X)
    estimator = NCEDensity(**settings).fit(X)
    *mixed, flow = estimator.model_.bases[0].components
    assert isinstance(flow.base, FlowBase)
    assert mixed
    scores, exact = estimator.score_samples(new), truth.log_density(new)
    assert np.mean(exact - scores) < 0.7 * np.mean(exact - mixtures.score_samples(new))
    one_by_one = np.concatenate([estimator.score_samples(row[None]) for row in new[:20]])
    np.testing.assert_allclose(one_by_one, scores[:20], atol=1e-7)
    drawn = estimator.sample(2000, random_state=0)
    assert stats.ks_2samp(drawn[:, 0], new[:, 0]).pvalue > 1e-3
    assert np.isfinite(estimator.stein_score(new[:5])).all()


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("law", ["normal", "gamma"])
def test_default_score_is_near_the_closed_form(law, d):
    rng = np.random.RandomState(0)
    draw = {"normal": rng.standard_normal, "gamma": lambda size: rng.gamma(3.0, size=size)}[law]
    X, new = draw((2000, d)), draw((1000, d))
    low, high = np.quantile(X, [0.05, 0.95], axis=0)
    new = new[((new > low) & (new < high)).all(axis=1)]
    exact = -new if law == "normal" else 2.0 / new - 1.0
    estimator = NCEDensity(energy_model=None, random_state=0).fit(X)

    def relative_error(**options):
        gap = estimator.stein_score(new, **options) - exact
        return math.sqrt(np.mean(gap**2) / np.mean(exact**2))

    assert relative_error() < 0.25
    assert relative_error() < relative_error(smoothing=0)


def test_smoothing_of_scores_is_for_few_columns():
    X = np.random.RandomState(0).standard_normal((80, 4))
    estimator = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(X)
    exact = estimator.stein_score(X, smoothing=0)
    np.testing.assert_array_equal(estimator.stein_score(X), exact)
    for wrong in (-1.0, 0.1, "much", None):
        with pytest.raises(ValueError, match="smoothing="):
            estimator.stein_score(X, smoothing=wrong)


def test_a_network_takes_the_place_of_trees_in_few_columns(monkeypatch):
    rng = np.random.RandomState(0)
    angle = np.pi * rng.uniform(size=400)
    X = np.c_[np.cos(angle), np.sin(angle)] * (1 + 0.1 * rng.standard_normal((400, 1)))
    options = {"base": "gaussian", "n_members": 2, "random_state": 0}
    trees = NCEDensity(energy_model="boosting", **options).fit(X)
    network = NCEDensity(**options).fit(X)
    assert trees.accepted_ == network.accepted_ == "tilt"
    assert hasattr(trees.model_.energy, "softness")
    assert not hasattr(network.model_.energy, "softness")
    assert network.held_out_gain_ > trees.held_out_gain_

    # a network that learns nothing: trees are better by more than two standard errors
    monkeypatch.setattr(
        automatic, "train_against_noise", lambda task, *_, **__: Trained.nothing(task)
    )
    kept = NCEDensity(**options).fit(X)
    assert kept.held_out_gain_ == trees.held_out_gain_


def test_trees_stay_in_many_columns(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(automatic, "train_against_noise", refuse)
    X = np.random.RandomState(0).standard_normal((120, 4))
    X[:, 1] += np.square(X[:, 0])
    estimator = NCEDensity(base="gaussian", n_members=2, random_state=0).fit(X)
    assert estimator.accepted_ == "tilt"
    assert estimator.model_.energy.softness is not None
