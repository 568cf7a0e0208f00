import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture

from skebm.bases import (
    AffineTransform,
    GaussianMixtureBase,
    KernelDensityBase,
    MarginalGaussianization,
    SklearnDensityBase,
    StackedBase,
    TransformedBase,
    UniformBase,
)

COVARIANCE = [[1.0, 0.6], [0.6, 1.0]]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=400):
    rng = np.random.default_rng(0)
    x = rng.gamma(2.0, size=(n, 2))
    return np.column_stack([x[:, 0], 0.5 * x[:, 0] + x[:, 1]])


def gaussian():
    return GaussianMixtureBase([1.0], [[0.0, 0.0]], [COVARIANCE])


def mixture():
    return GaussianMixtureBase([0.4, 0.6], [[-1.5, 0.0], [1.0, 0.5]], [COVARIANCE, COVARIANCE])


def affine():
    return TransformedBase(AffineTransform([1.0, -2.0], [2.0, 0.5]), mixture())


def gaussianized():
    return TransformedBase(MarginalGaussianization.fit(rows()), mixture())


def stacked():
    kernels = KernelDensityBase(rows(40), 0.5)
    box = UniformBase([-1.0, -1.0], [4.0, 5.0])
    return StackedBase([mixture(), kernels, gaussianized(), box], [0.3, 0.4, 0.2, 0.1])


DISTRIBUTIONS = {"affine": affine, "gaussianized": gaussianized, "stacked": stacked}


@pytest.fixture(params=DISTRIBUTIONS)
def law(request):
    return DISTRIBUTIONS[request.param]()


def conditional_cdf(base, x, grid):
    """P(X_1 <= x_1), and P(X_2 <= x_2 | X_1 = x_1), by quadrature on a grid."""
    step = grid[1] - grid[0]
    density = base.log_prob(torch.cartesian_prod(grid, grid)).exp().view(len(grid), -1)
    marginal = density.sum(1) * step
    first = np.interp(x[:, 0], grid + 0.5 * step, marginal.cumsum(0) * step)
    lines = torch.stack([torch.as_tensor(x[:, 0])[:, None].expand(-1, len(grid)),
                         grid.expand(len(x), -1)], dim=-1)  # fmt: skip
    along = base.log_prob(lines.reshape(-1, 2)).exp().view(len(x), -1)
    along = along.cumsum(1) / along.sum(1, keepdim=True)
    edges = (grid + 0.5 * step).numpy()
    second = np.array([np.interp(t, edges, c) for t, c in zip(x[:, 1], along.numpy(), strict=True)])
    return first, second


def test_integrates_to_one(law):
    grid = torch.linspace(-9.0, 21.0, 501, dtype=torch.float64)
    total = 0.0
    for part in grid.split(100):
        total += law.log_prob(torch.cartesian_prod(part, grid)).exp().sum().item()
    # the box has edges, which a grid of this step sees to about step / width
    tolerance = 6e-3 if isinstance(law, StackedBase) else 1e-4
    assert total * (grid[1] - grid[0]).item() ** 2 == pytest.approx(1.0, abs=tolerance)


def test_samples_follow_the_density(law):
    # Rosenblatt: both conditional distribution functions are uniform at samples
    x = law.sample(300, rng(5)).numpy()
    assert x.shape == (300, 2)
    grid = torch.linspace(-9.0, 21.0, 501, dtype=torch.float64)
    for u in conditional_cdf(law, x, grid):
        assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_samples_of_another_law_are_told_apart(law):
    # so that the test above can fail
    x = 1.4 * law.sample(300, rng(5)).numpy()
    grid = torch.linspace(-9.0, 21.0, 501, dtype=torch.float64)
    assert min(stats.kstest(u, "uniform").pvalue for u in conditional_cdf(law, x, grid)) < 1e-3


@pytest.mark.parametrize("transform", ["affine", "gaussianized"])
def test_change_of_variables_in_one_dimension(transform):
    if transform == "affine":
        g = AffineTransform([3.0], [0.25])
    else:
        g = MarginalGaussianization.fit(rows()[:, :1])
    base = TransformedBase(g, GaussianMixtureBase([1.0], [[0.3]], [[[1.2]]]))
    x = torch.linspace(-80.0, 120.0, 400_001, dtype=torch.float64)
    density = base.log_prob(x[:, None]).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1.0, abs=1e-5)
    sample = base.sample(2000, rng()).numpy()[:, 0]
    cdf = torch.cumulative_trapezoid(density, x)
    assert stats.kstest(np.interp(sample, x[1:], cdf), "uniform").pvalue > 1e-3


def test_gradient_against_finite_differences(law):
    x = torch.as_tensor(rows(12)) + 0.013
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(law.log_prob, x, atol=1e-5)


# ---------------------------------------------------------------- affine


def test_affine_against_scipy():
    base = TransformedBase(AffineTransform([1.0, -2.0], [2.0, 0.5]), gaussian())
    inverse = np.diag([0.5, 2.0])
    x = torch.as_tensor(rows(50))
    expected = stats.multivariate_normal(
        inverse @ [-1.0, 2.0], inverse @ COVARIANCE @ inverse
    ).logpdf(x)
    np.testing.assert_allclose(base.log_prob(x), expected)


def test_affine_inverse():
    g = AffineTransform([1.0, -2.0], [2.0, 0.5])
    x = torch.as_tensor(rows())
    z, log_det = g(x)
    torch.testing.assert_close(g.inverse(z), x)
    torch.testing.assert_close(log_det, torch.zeros(len(x)).double())  # log 2 + log 1/2
    assert g(x[:0])[1].shape == (0,)


# ---------------------------------------------------------------- transformed


def test_components_of_a_transformed_mixture():
    base = gaussianized()
    x = torch.as_tensor(rows(30))
    assert base.n_components == 2
    assert base.n_features == 2
    torch.testing.assert_close(
        base.responsibilities(x), mixture().responsibilities(base.transform(x)[0])
    )
    box = TransformedBase(AffineTransform([0.0], [1.0]), UniformBase([0.0], [1.0]))
    assert box.n_components == 1


# ---------------------------------------------------------------- stacked


def test_stack_against_its_formula():
    base = stacked()
    x = torch.as_tensor(rows(60))
    q = np.stack([component.log_prob(x).exp().numpy() for component in base.components], axis=1)
    joint = q * [0.3, 0.4, 0.2, 0.1]
    np.testing.assert_allclose(base.log_prob(x), np.log(joint.sum(1)))
    np.testing.assert_allclose(base.responsibilities(x), joint / joint.sum(1, keepdims=True))
    assert (base.n_components, base.n_features) == (4, 2)


def test_weights_of_a_stack_are_normalised():
    base = StackedBase([gaussian(), mixture()], [2, 6])
    np.testing.assert_allclose(base.weights, [0.25, 0.75])


def test_stack_draws_components_by_weight_in_random_order():
    boxes = [UniformBase([a], [a + 0.5]) for a in (0.0, 1.0, 2.0)]
    x = StackedBase(boxes, [0.5, 0.2, 0.3]).sample(4000, rng())[:, 0]
    which = x.floor().long()
    assert stats.chisquare(which.bincount(minlength=3), 4000 * np.array([0.5, 0.2, 0.3])).pvalue > (
        1e-3
    )
    changes = (which.diff() != 0).double().mean().item()
    assert changes == pytest.approx(1 - (0.25 + 0.04 + 0.09), abs=0.03)
    assert stats.kstest(2 * (x - which), "uniform").pvalue > 1e-3


def test_a_component_of_weight_zero_does_not_count():
    base = StackedBase([gaussian(), mixture()], [1.0, 0.0])
    x = torch.as_tensor(rows(20)).requires_grad_(True)
    torch.testing.assert_close(base.log_prob(x), gaussian().log_prob(x))
    (gradient,) = torch.autograd.grad(base.log_prob(x).sum(), x)
    assert gradient.isfinite().all()


def test_outside_of_one_component():
    base = StackedBase([UniformBase([0.0, 0.0], [1.0, 1.0]), gaussian()], [0.5, 0.5])
    x = torch.tensor([[7.0, 7.0]], dtype=torch.float64, requires_grad=True)
    log_prob = base.log_prob(x)
    torch.testing.assert_close(log_prob, gaussian().log_prob(x) + np.log(0.5))
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(gaussian().log_prob(x).sum(), x)[0])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_rows(n):
    # scikit-learn's mixture refuses to draw 0 rows, which most components have to give here
    theirs = SklearnDensityBase(GaussianMixture(2, random_state=0).fit(rows()))
    base = StackedBase([gaussian(), theirs, stacked(), gaussianized()], [1, 1, 1, 1])
    for seed in range(8):
        assert base.sample(n, rng(seed)).shape == (n, 2)


def test_reproducible_and_picklable(law):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = law.sample(40, rng(1))
    assert torch.equal(torch.get_rng_state(), state)
    copy = pickle.loads(pickle.dumps(law))
    assert torch.equal(copy.sample(40, rng(1)), first)
    assert torch.equal(copy.log_prob(first), law.log_prob(first))
    assert not torch.equal(law.sample(40, rng(2)), first)


def test_rows_do_not_depend_on_their_batch(law):
    x = law.sample(70, rng())
    single = torch.cat([law.log_prob(row[None]) for row in x])
    torch.testing.assert_close(single, law.log_prob(x), atol=1e-11, rtol=0)
