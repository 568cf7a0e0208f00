import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch.distributions import (
    Beta,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)

from skebm.bases._adapters import SklearnDensityBase, TorchDistributionBase, UniformBase

ONE, TWO = torch.ones((), dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=600):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 2))
    return np.column_stack([x[:, 0], 0.5 * x[:, 1] + np.abs(x[:, 0]) - 0.8])


def normal_mixture():
    centers = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    components = Independent(Normal(centers, torch.full_like(centers, 0.7)), 1)
    return MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7]).double()), components)


class Density:
    """Not of scikit-learn: no n_features_in_, sample draws on numpy's global generator."""

    def score_samples(self, x):
        return -0.5 * (x**2).sum(1) - math.log(2 * math.pi)

    def sample(self, n):
        return np.random.standard_normal((n, 2))  # noqa: NPY002


@pytest.fixture(params=["uniform", "mixture", "gaussian", "beta", "gmm", "kde", "own"])
def base(request):
    makers = {
        "uniform": lambda: UniformBase([-1.0, 0.0], [2.0, 3.0]),
        "mixture": lambda: TorchDistributionBase(normal_mixture()),
        "gaussian": lambda: TorchDistributionBase(
            MultivariateNormal(TWO, torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double())
        ),
        "beta": lambda: TorchDistributionBase(Beta(2 * ONE, 3 * ONE)),
        "gmm": lambda: SklearnDensityBase(GaussianMixture(3, random_state=0).fit(data())),
        "kde": lambda: SklearnDensityBase(KernelDensity(bandwidth=0.3).fit(data(100))),
        "own": lambda: SklearnDensityBase(Density()),
    }
    return makers[request.param]()


def test_density_integrates_to_one_and_samples_follow_it(base):
    if base.n_features == 1:
        grid = torch.linspace(-0.5, 1.5, 4001, dtype=torch.float64)[:, None]
        cell = 2 / 4000
    else:
        axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis) + 0.01
        cell = (18 / 300) ** 2
    density = base.log_prob(grid).exp()
    assert density.sum() * cell == pytest.approx(1.0, abs=0.02)

    x = base.sample(3000, rng(1))
    assert x.shape == (3000, base.n_features)
    assert x.dtype == torch.float64
    weights = (density / density.sum()).numpy()
    for j in range(base.n_features):
        u = grid[:, j].numpy()
        order = np.argsort(u, kind="stable")
        cdf = np.interp(x[:, j].numpy(), u[order], np.cumsum(weights[order]))
        assert stats.kstest(cdf, "uniform").statistic < 0.05
    assert base.log_prob(x).dtype == torch.float64
    # in random order: the first half is like the second
    assert stats.ks_2samp(x[:1500, 0], x[1500:, 0]).pvalue > 1e-3


def test_gradients(base):
    x = base.sample(20, rng(2)).requires_grad_()
    (gradient,) = torch.autograd.grad(base.log_prob(x).sum(), x)
    with torch.no_grad():
        for j in range(base.n_features):
            h = torch.zeros_like(x)
            h[:, j] = 1e-5
            slope = (base.log_prob(x + h) - base.log_prob(x - h)) / 2e-5
            torch.testing.assert_close(gradient[:, j], slope, rtol=1e-3, atol=1e-5)


def test_reproducible_and_global_state_as_found(base):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    x = base.sample(100, rng(5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    torch.manual_seed(2)
    g = rng(5)
    assert torch.equal(base.sample(100, g), x)
    assert not torch.equal(base.sample(100, g), x)
    results = {}

    def work(k):
        results[k] = base.sample(100, rng(5))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[k], x) for k in range(4))


def test_pickle_and_batches(base):
    x = base.sample(50, rng())
    whole = base.log_prob(x)
    one_by_one = torch.cat([base.log_prob(row[None]) for row in x])
    torch.testing.assert_close(whole, one_by_one, rtol=0, atol=1e-7)
    for twin in (pickle.loads(pickle.dumps(base)), copy.deepcopy(base)):
        assert twin.n_features == base.n_features
        assert torch.equal(twin.log_prob(x), whole)
        assert torch.equal(twin.sample(5, rng(3)), base.sample(5, rng(3)))


def test_uniform_box():
    base = UniformBase([0.0, 0.0], [2.0, 4.0])
    x = torch.tensor([[1.0, 1.0], [0.0, 4.0], [2.1, 1.0], [1.0, -0.1]], dtype=torch.float64)
    expected = torch.tensor([-math.log(8)] * 2 + [-math.inf] * 2, dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(x), expected)
    for low, high in [([0.0], [0.0]), ([0.0], [math.inf]), ([0.0], [1.0, 2.0]), (0.0, 1.0)]:
        with pytest.raises(ValueError, match="low"):
            UniformBase(low, high)


def test_torch_distributions_outside_of_their_support():
    base = TorchDistributionBase(Independent(Uniform(0 * TWO, TWO), 1))
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(x).exp(), torch.tensor([0.25, 0.0]).double())
    single = TorchDistributionBase(MultivariateNormal(torch.zeros(2), torch.eye(2)))
    assert single.log_prob(x).dtype == torch.float64
    with pytest.raises(ValueError, match="Independent"):
        TorchDistributionBase(Normal(TWO, TWO))
    with pytest.raises(ValueError, match="discrete"):
        TorchDistributionBase(Categorical(torch.ones(3)))


def test_sklearn_estimator_is_not_changed():
    gmm = GaussianMixture(2, random_state=np.random.RandomState(0)).fit(data())  # noqa: NPY002
    before = pickle.dumps(gmm)
    base = SklearnDensityBase(gmm)
    x = base.sample(100, rng()).requires_grad_()
    base.log_prob(x).sum().backward()
    assert pickle.dumps(gmm) == before
    np.testing.assert_allclose(base.log_prob(x).detach(), gmm.score_samples(x.detach().numpy()))
    with pytest.raises(TypeError, match="has no method"):
        SklearnDensityBase(object())
