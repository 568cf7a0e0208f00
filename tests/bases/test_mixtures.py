import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

from skebm.bases import GaussianMixtureBase, KernelDensityBase, _chunks
from skebm.bases._mixtures import log_sum_exp


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.array([[0.0, 0.0, 1.0], [3.0, -1.0, 0.0], [-2.0, 2.0, 4.0]])
FACTORS = np.random.default_rng(0).normal(size=(3, 3, 3)) + 2 * np.eye(3)
COVARIANCES = FACTORS @ FACTORS.transpose(0, 2, 1)
SHAPE = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])


def mixture():
    return GaussianMixtureBase(WEIGHTS, MEANS, COVARIANCES)


def kernels():
    rng = np.random.default_rng(1)
    return KernelDensityBase(
        rng.normal(size=(40, 3)), 0.7, weights=rng.uniform(0.1, 1.0, 40), covariance=SHAPE
    )


@pytest.fixture(params=[mixture, kernels])
def base(request):
    return request.param()


def points(n=200, scale=4.0):
    return torch.as_tensor(scale * np.random.default_rng(2).normal(size=(n, 3)))


def literal(weights, means, covariances, x):
    laws = [stats.multivariate_normal(m, c) for m, c in zip(means, covariances, strict=True)]
    return np.log(weights) + np.stack([law.logpdf(x) for law in laws], axis=1)


# ---------------------------------------------------------------- log-density


def test_mixture_against_scipy():
    x = points()
    joint = literal(WEIGHTS, MEANS, COVARIANCES, x.numpy())
    np.testing.assert_allclose(mixture().log_prob(x), logsumexp(joint, axis=1), atol=1e-10)
    expected = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    responsibilities = mixture().responsibilities(x)
    np.testing.assert_allclose(responsibilities, expected, atol=1e-12)
    np.testing.assert_allclose(responsibilities.sum(1), 1.0, atol=1e-12)


def test_mixture_against_sklearn():
    x = points(600).numpy()
    theirs = GaussianMixture(4, random_state=0).fit(x)
    ours = GaussianMixtureBase(theirs.weights_, theirs.means_, theirs.covariances_)
    np.testing.assert_allclose(ours.log_prob(torch.as_tensor(x)), theirs.score_samples(x))
    np.testing.assert_allclose(
        ours.responsibilities(torch.as_tensor(x)), theirs.predict_proba(x), atol=1e-10
    )
    assert (ours.n_components, ours.n_features) == (4, 3)


def test_one_component_in_one_dimension_is_a_gaussian():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)[:, None]
    base = GaussianMixtureBase([1.0], [[1.5]], [[[4.0]]])
    np.testing.assert_allclose(base.log_prob(x), stats.norm(1.5, 2.0).logpdf(x[:, 0]))


def test_weights_of_a_mixture_are_normalised():
    scaled = GaussianMixtureBase(7 * WEIGHTS, MEANS, COVARIANCES)
    torch.testing.assert_close(scaled.log_prob(points()), mixture().log_prob(points()))


@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_density_against_sklearn(weighted):
    rng = np.random.default_rng(3)
    centers, weights = rng.normal(size=(60, 3)), rng.uniform(0.1, 1.0, 60) if weighted else None
    theirs = KernelDensity(bandwidth=0.4, rtol=1e-12).fit(centers, sample_weight=weights)
    ours = KernelDensityBase(centers, 0.4, weights=weights)
    x = points(scale=1.5)
    np.testing.assert_allclose(ours.log_prob(x), theirs.score_samples(x.numpy()), atol=1e-9)


def test_shaped_kernels_against_scipy():
    base = kernels()
    x = points(50)
    joint = literal(
        base.weights.numpy(), base.centers.numpy(), np.tile(0.49 * SHAPE, (40, 1, 1)), x.numpy()
    )
    np.testing.assert_allclose(base.log_prob(x), logsumexp(joint, axis=1), atol=1e-9)


def test_kernels_with_widths_of_their_own_against_scipy():
    rng = np.random.default_rng(5)
    widths = rng.uniform(0.2, 2.0, 40)
    base = KernelDensityBase(kernels().centers, widths, kernels().weights, SHAPE)
    x = points(50)
    covariances = widths[:, None, None] ** 2 * SHAPE
    joint = literal(base.weights.numpy(), base.centers.numpy(), covariances, x.numpy())
    np.testing.assert_allclose(base.log_prob(x), logsumexp(joint, axis=1), atol=1e-9)
    part = literal(
        base.weights.numpy(), base.centers[:, 1:].numpy(), covariances[:, 1:, 1:], x[:, 1:].numpy()
    )
    np.testing.assert_allclose(
        base.marginal([1, 2]).log_prob(x[:, 1:]), logsumexp(part, axis=1), atol=1e-9
    )
    weight, centers = base.weights.numpy(), base.centers.numpy()
    mean = weight @ centers
    spread = (centers - mean).T @ (weight[:, None] * (centers - mean))
    expected = spread + np.tensordot(weight, covariances, axes=1)
    drawn = base.sample(200_000, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.05)


@pytest.mark.parametrize("kind", ["one width", "many"])
@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_kernel_density_keeps_its_digits_far_out(offset, kind):
    rng = np.random.default_rng(4)
    centers = rng.normal(size=(30, 2))
    centers[:5] += offset  # a far cluster, with its own neighbours
    x = torch.as_tensor(centers + 0.05 * rng.normal(size=centers.shape)).requires_grad_(True)
    base = KernelDensityBase(centers, 0.05 if kind == "one width" else np.full(30, 0.05))
    difference = (x.detach()[:, None] - torch.as_tensor(centers)) / 0.05
    logs = -0.5 * difference.square().sum(-1)
    expected = logs.logsumexp(1) - np.log(30 * 2 * np.pi * 0.05**2)
    log_prob = base.log_prob(x)
    torch.testing.assert_close(log_prob, expected, atol=1e-15 * offset / 0.05 * 30, rtol=0)
    rows = torch.cat([base.log_prob(row[None]) for row in x])
    torch.testing.assert_close(log_prob, rows, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    expected = -(logs.softmax(1)[:, :, None] * difference).sum(1) / 0.05
    torch.testing.assert_close(gradient, expected, atol=1e-12 * offset / 0.05**2, rtol=1e-6)


def test_gradients_against_finite_differences(base):
    x = points(10).requires_grad_(True)
    assert torch.autograd.gradcheck(base.log_prob, x, atol=1e-6, rtol=1e-6)


def test_hessian_against_finite_differences(base):
    x = points(3, scale=1.0).requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda x: base.log_prob(x).sum(), x, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("components", [[0], [1, 2], [0, 1, 2]])
def test_value_and_gradient_are_those_of_autograd(components, dtype):
    base = GaussianMixtureBase(WEIGHTS[components], MEANS[components], COVARIANCES[components])
    exact = points().requires_grad_(True)  # between the components and far from all of them
    expected = base.log_prob(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    value, gradient = base.to(dtype).value_and_gradient(exact.detach().to(dtype))
    assert value.dtype == gradient.dtype == dtype
    assert value.shape == (200,)
    assert gradient.shape == (200, 3)
    assert not value.requires_grad
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=10 * tolerance)


def test_gradient_in_one_column_by_formula():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)[:, None]
    value, gradient = GaussianMixtureBase([1.0], [[1.5]], [[[4.0]]]).value_and_gradient(x)
    np.testing.assert_allclose(value, stats.norm(1.5, 2.0).logpdf(x[:, 0]))
    np.testing.assert_allclose(gradient, -(x - 1.5) / 4.0)


@pytest.mark.parametrize("law", ["mixture", "kernels"])
def test_integrates_to_one(law):
    if law == "mixture":
        base = GaussianMixtureBase(
            [0.3, 0.7], [[0.0, 1.0], [2.0, -1.0]], [[[1, 0], [0, 1]], [[1, 0.8], [0.8, 1]]]
        )
    else:
        centers = np.random.default_rng(5).normal(size=(20, 2))
        base = KernelDensityBase(centers, 0.6, covariance=[[1.0, 0.4], [0.4, 0.7]])
    grid = torch.linspace(-9, 9, 401, dtype=torch.float64)
    log_prob = base.log_prob(torch.cartesian_prod(grid, grid))
    assert log_prob.exp().sum() * (grid[1] - grid[0]) ** 2 == pytest.approx(1.0, abs=1e-8)


# ---------------------------------------------------------------- sampling


def test_moments_of_samples(base):
    n = 40_000
    if isinstance(base, GaussianMixtureBase):
        weights, means, covariances = WEIGHTS, MEANS, COVARIANCES
    else:
        weights, means = base.weights.numpy(), base.centers.numpy()
        covariances = np.tile(0.49 * SHAPE, (len(means), 1, 1))
    mean = weights @ means
    second = np.einsum("j,jab->ab", weights, covariances + means[:, :, None] * means[:, None, :])
    x = base.sample(n, rng()).numpy()
    assert x.shape == (n, 3)
    assert x.dtype == np.float64
    error = np.abs(x.mean(0) - mean) / (x.std(0) / np.sqrt(n))
    assert error.max() < 4.0
    products = x[:, :, None] * x[:, None, :]
    error = np.abs(products.mean(0) - second) / (products.std(0) / np.sqrt(n))
    assert error.max() < 4.5


def test_projections_of_samples(base):
    # along any direction u, the sample must follow the mixture of the projected Gaussians
    x = base.sample(5000, rng(1)).numpy()
    if isinstance(base, GaussianMixtureBase):
        weights, means, covariances = WEIGHTS, MEANS, COVARIANCES
    else:
        weights, means = base.weights.numpy(), base.centers.numpy()
        covariances = np.tile(0.49 * SHAPE, (len(means), 1, 1))
    for u in np.random.default_rng(6).normal(size=(4, 3)):
        center, width = means @ u, np.sqrt(np.einsum("a,jab,b->j", u, covariances, u))
        cdf = lambda t, m=center, s=width: stats.norm.cdf((t[:, None] - m) / s) @ weights  # noqa: E731
        assert stats.kstest(x @ u, cdf).pvalue > 1e-3


def test_components_are_drawn_by_their_weights():
    base = GaussianMixtureBase(WEIGHTS, 50 * MEANS, COVARIANCES)
    x = base.sample(5000, rng())
    counts = base.responsibilities(x).argmax(1).bincount(minlength=3)
    assert stats.chisquare(counts, 5000 * WEIGHTS).pvalue > 1e-3
    # in random order: runs of one component are as short as they should be
    changes = (base.responsibilities(x).argmax(1).diff() != 0).double().mean()
    assert changes == pytest.approx(1 - np.square(WEIGHTS).sum(), abs=0.03)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(base, n):
    assert base.sample(n, rng()).shape == (n, 3)
    assert base.log_prob(torch.zeros(n, 3, dtype=torch.float64)).shape == (n,)


def test_samples_depend_on_the_generator_alone(base):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = base.sample(50, rng(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(base.sample(50, rng(3)), first)
    assert not torch.equal(base.sample(50, rng(4)), first)


# ---------------------------------------------------------------- chunks and copies


def test_chunks_do_not_matter(base, monkeypatch):
    x = points(333)
    whole = base.log_prob(x)
    shares = base.responsibilities(x) if isinstance(base, GaussianMixtureBase) else None
    calls = []
    monkeypatch.setattr(_chunks, "_CELLS", 1)
    monkeypatch.setattr(
        torch, "cat", lambda parts, *args, cat=torch.cat: calls.append(1) or cat(parts, *args)
    )
    torch.testing.assert_close(base.log_prob(x), whole, atol=1e-12, rtol=0)
    assert calls  # it was in chunks
    if shares is not None:
        torch.testing.assert_close(base.responsibilities(x), shares, atol=1e-12, rtol=0)
    monkeypatch.undo()
    rows = torch.cat([base.log_prob(row[None]) for row in x])
    torch.testing.assert_close(rows, whole, atol=1e-12, rtol=0)


def test_size_of_chunks(monkeypatch):
    monkeypatch.setattr(_chunks, "_CELLS", 1000)
    sizes = []
    x = torch.arange(105.0)[:, None]
    out = _chunks.in_chunks(lambda rows: sizes.append(len(rows)) or rows[:, 0], x, 20)
    assert sizes == [50, 50, 5]
    assert torch.equal(out, x[:, 0])


def test_pickle(base):
    x = points()
    copy = pickle.loads(pickle.dumps(base))
    assert torch.equal(copy.log_prob(x), base.log_prob(x))
    assert torch.equal(copy.sample(9, rng()), base.sample(9, rng()))


def test_everything_is_a_float64_buffer(base):
    assert not list(base.parameters())
    assert {buffer.dtype for buffer in base.buffers()} == {torch.float64}
    # so that another default precision does not change a law
    x = points(20)
    expected = base.log_prob(x)
    torch.set_default_dtype(torch.float64)
    try:
        again = mixture() if isinstance(base, GaussianMixtureBase) else kernels()
        assert torch.equal(again.log_prob(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_log_sum_exp_against_scipy():
    values = torch.as_tensor(np.random.default_rng(0).normal(-300.0, 400.0, (50, 40)))
    values[0], values[1, 3], values[2, 5] = -torch.inf, torch.inf, -torch.inf
    values[3] *= 1e4
    values[4] += 1e5
    values[5] = -1.234e25 * (1.0 + values[6].abs())  # rows far away
    for dim in (0, 1):
        with np.errstate(invalid="ignore"):
            expected = torch.as_tensor(logsumexp(values.numpy(), axis=dim))
        found = log_sum_exp(values.clone(), dim)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-12)
    leaf = values[6:].clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_sum_exp(leaf, 1).sum(), leaf)
    torch.testing.assert_close(slope, values[6:].softmax(1))
