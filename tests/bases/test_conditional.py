"""Conditionals of mixtures, beside their joint and marginal densities."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from skebm.bases import (
    CouplingSplineFlow,
    GaussianMixtureBase,
    KernelDensityBase,
    MarginalGaussianization,
    StackedBase,
    TransformedBase,
    condition,
    marginal,
    mixture_part,
)

from .test_mixed import DISTRIBUTIONS, LAYOUT, doubles, rows_of


def _gaussians():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 3, 3))
    covariances = factors @ factors.transpose(0, 2, 1) + 0.3 * np.eye(3)
    return GaussianMixtureBase([0.5, 0.3, 0.2], 2.0 * rng.normal(size=(3, 3)), covariances)


def _kernel():
    rng = np.random.default_rng(1)
    covariance = [[1.0, 0.4, 0.0], [0.4, 0.8, -0.2], [0.0, -0.2, 0.5]]
    return KernelDensityBase(rng.normal(size=(40, 3)), 0.5, rng.uniform(size=40), covariance)


def _gaussianized():
    rng = np.random.default_rng(2)
    transform = MarginalGaussianization.fit(np.exp(rng.normal(size=(300, 3))))
    return TransformedBase(transform, _gaussians())


def _kernel_of_many_widths():
    rng = np.random.default_rng(3)
    centers, widths = rng.normal(size=(30, 3)), rng.uniform(0.3, 1.0, size=30)
    return KernelDensityBase(centers, widths, covariance=[[1, 0.4, 0], [0.4, 0.8, 0], [0, 0, 0.5]])


NUMBERS = {
    "gaussians": _gaussians,
    "kernel": _kernel,
    "kernel of many widths": _kernel_of_many_widths,
    "gaussianized": _gaussianized,
    "stack": lambda: StackedBase([_kernel(), _gaussians(), _gaussianized()], [0.2, 0.5, 0.3]),
}


@pytest.fixture(params=NUMBERS)
def numbers(request):
    with torch.no_grad():
        yield NUMBERS[request.param]()


ROWS = doubles([[0.3, 1.0, 0.7], [1.4, 0.2, 2.0]])


def _uniform(n, d):
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kept", [[], [0], [2], [0, 2]])
def test_known_cells_have_their_marginal_density(numbers, kept):
    known = torch.zeros(3, dtype=torch.bool)
    known[kept] = True
    found = condition(numbers, known).log_joint(ROWS).logsumexp(1)
    wanted = marginal(numbers, kept).log_prob(ROWS[:, kept]) if kept else torch.zeros(2)
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-9)


def test_a_single_open_number_has_the_ratio_of_joint_and_marginal(numbers):
    known = torch.tensor([True, False, True])
    conditional = condition(numbers, known)
    at = torch.linspace(-1.0, 3.0, 9, dtype=torch.float64).expand(2, 9)
    joint = conditional.log_joint(ROWS)
    n_components = joint.shape[1]
    row = torch.arange(2).repeat_interleave(n_components)
    which = torch.arange(n_components).repeat(2)
    share, log_density = (a.view(2, n_components, 9) for a in conditional.cdf(ROWS, row, which, at))
    filled = ROWS[:, None].repeat(1, 9, 1)
    filled[:, :, 1] = at
    wanted = numbers.log_prob(filled.flatten(0, 1)).view(2, 9)
    torch.testing.assert_close((joint[..., None] + log_density).logsumexp(1), wanted)

    def density(y, i):
        x = ROWS[i].clone()
        x[1] = y
        return numbers.log_prob(x[None]).exp().item()

    mass = quad(density, -1.0, 3.0, args=(0,), limit=200, epsabs=1e-7)[0]
    between = (share[0, :, -1] - share[0, :, 0]) @ joint[0].exp()
    assert between.item() == pytest.approx(mass, abs=1e-6)


def test_quantiles_invert_the_distribution_function(numbers):
    conditional = condition(numbers, torch.tensor([True, True, False]))
    n_components = conditional.log_joint(ROWS).shape[1]
    row = torch.zeros(n_components, dtype=torch.long)
    z = doubles([-1.0, 0.0, 0.7])
    for component in range(0, n_components, 7):
        which = torch.full((1,), component)
        at = conditional.quantiles(ROWS, row[:1], which, z)
        share, _ = conditional.cdf(ROWS, row[:1], which, at.expand(2, -1))
        np.testing.assert_allclose(share[0], stats.norm.cdf(z), atol=1e-7)


def test_draws_follow_the_conditional(numbers):
    """Of two open numbers the first given the known one, and the second given both."""
    n = 4000
    conditional = condition(numbers, torch.tensor([True, False, False]))
    shares = conditional.log_joint(ROWS[:1]).softmax(1)[0]
    which = torch.multinomial(
        shares, n, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    drawn = conditional.draw(ROWS[:1].expand(n, 3), which, _uniform(n, 3))
    assert (drawn[:, 0] == ROWS[0, 0]).all()
    x = marginal(numbers, [0, 1])
    one = condition(x, torch.tensor([True, False]))
    two = condition(numbers, torch.tensor([True, True, False]))
    for given, single, column in ((x, one, 1), (numbers, two, 2)):
        rows = drawn[:, : given.n_features]
        joint = single.log_joint(rows).softmax(1)
        row = torch.arange(n).repeat_interleave(joint.shape[1])
        every = torch.arange(joint.shape[1]).repeat(n)
        share = single.cdf(rows, row, every, rows[:, column : column + 1])[0].view(joint.shape)
        assert stats.kstest((joint * share).sum(1).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("known", [[0], [0, 1], [1, 2], [0, 3], [0, 1, 2]])
def test_draws_of_states_and_values_follow_the_conditional(name, known):
    """By moments of the draws beside those of draws of the joint, weighted by the known cells."""
    distribution = DISTRIBUTIONS[name]()
    mask = torch.zeros(LAYOUT.n_features, dtype=torch.bool)
    mask[known] = True
    with torch.no_grad():
        x = rows_of([1, 0], doubles([[0.5, 0.2]]))
        conditional = condition(distribution, mask)
        joint = conditional.log_joint(x)
        wanted = marginal(distribution, known).log_prob(x[:, known])
        torch.testing.assert_close(joint.logsumexp(1), wanted, rtol=0, atol=1e-9)
        n = 20_000
        rng = torch.Generator().manual_seed(3)
        which = torch.multinomial(joint.softmax(1)[0], n, replacement=True, generator=rng)
        drawn = conditional.draw(x.expand(n, -1), which, _uniform(n, LAYOUT.n_features))
        assert (drawn[:, known] == x[:, known]).all()
        # E[g(b) | a] of draws from q(b | a), and of uniform ones with weights q(a, b)
        values = drawn[:, 2:]
        there = ~values[:, 0].isnan()
        assert torch.equal(there, drawn[:, 1] == 0)
        codes = [(s, t) for s in range(3) for t in range(2)]
        grid = torch.linspace(-9.0, 9.0, 181, dtype=torch.float64)
        masses, means = {}, {}
        for s, t in codes:
            if (0 in known and s != 1) or (1 in known and t != 0):
                continue
            first = doubles([0.5]) if 2 in known or t else grid
            second = doubles([0.2]) if 3 in known else grid
            pairs = torch.cartesian_prod(first, second)
            density = distribution.log_prob(rows_of([s, t], pairs)).exp()
            density = density * (0.1 if len(first) > 1 else 1.0) * (0.1 if len(second) > 1 else 1.0)
            masses[s, t], means[s, t] = density.sum(), density @ pairs[:, 1]
        total = sum(masses.values())
        torch.testing.assert_close(total.log(), wanted[0], rtol=0, atol=2e-3)
        for (s, t), mass in masses.items():
            share = ((drawn[:, 0] == s) & (drawn[:, 1] == t)).double()
            assert share.mean() == pytest.approx((mass / total).item(), abs=0.015)
            found = (share * drawn[:, 3]).mean()
            assert found == pytest.approx((means[s, t] / total).item(), abs=0.05)


def test_what_has_no_closed_form_is_left_out():
    flow = TransformedBase(
        MarginalGaussianization.fit(np.random.default_rng(0).normal(size=(50, 3))),
        CouplingSplineFlow(3, rng=torch.Generator().manual_seed(0)).member(0),
    )
    assert condition(flow, torch.tensor([True, False, False])) is None
    assert mixture_part(flow) is None
    stack = StackedBase([_kernel(), flow, _gaussians()], [0.2, 0.3, 0.5])
    part = mixture_part(stack)
    assert part.n_components == 2
    torch.testing.assert_close(part.weights, doubles([2 / 7, 5 / 7]))
    known = torch.tensor([True, False, True])
    own, of_all = condition(part, known), condition(stack, known)
    torch.testing.assert_close(own.log_joint(ROWS), of_all.log_joint(ROWS))
    assert mixture_part(_gaussians()) is not None
