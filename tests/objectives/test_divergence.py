import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from skebm.objectives import contrastive_divergence_losses


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def tilted_normal():
    """q = N(0, 1) by quadrature, data N(.5, .8^2), f = theta . (x, x^2)."""
    nodes, weights = (torch.from_numpy(a) for a in hermegauss(100))
    weights = weights / weights.sum()

    def f(x, theta):
        return theta[0] * x + theta[1] * x**2

    return nodes, 0.5 + 0.8 * nodes, weights, f


@pytest.mark.parametrize("theta", [[0.0, 0.0], [0.3, -0.2], [0.78125, 0.5 - 0.5 / 0.64]])
def test_gradient_is_that_of_the_likelihood_where_chains_follow_the_model(theta):
    nodes, data, weights, f = tilted_normal()
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    log_z = (f(nodes, theta) + weights.log()).logsumexp(0)
    (expected,) = torch.autograd.grad(log_z - weights @ f(data, theta), theta)
    # expectations under the model in place of averages over its chains
    model = (f(nodes, theta) + weights.log()).softmax(0).detach()
    of_data, of_chains = contrastive_divergence_losses(f(data, theta), f(nodes, theta))
    (gradient,) = torch.autograd.grad(weights @ of_data + model @ of_chains, theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    if theta[0] == 0.78125:  # the truth: N(.5, .8^2) over N(0, 1)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


def test_exact_draws_give_it_but_for_noise(rng):
    # q = N(0, 1), f = .7 x: the model is N(.7, 1), and log Z = .7^2 / 2
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    data, noise = torch.randn(2, 40_000, generator=rng, dtype=torch.float64)
    of_data, of_chains = contrastive_divergence_losses(theta * data, theta * (0.7 + noise))
    (gradient,) = torch.autograd.grad(of_data.mean() + of_chains.mean(), theta)
    assert gradient.item() == pytest.approx(0.7 - data.mean().item(), abs=4 / math.sqrt(40_000))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_values_and_slopes_by_formula(alpha, rng):
    f_data = torch.randn(30, generator=rng, dtype=torch.float64, requires_grad=True)
    f_chains = torch.randn(50, generator=rng, dtype=torch.float64, requires_grad=True)
    data, chains = contrastive_divergence_losses(f_data, f_chains, alpha)
    torch.testing.assert_close(data, -f_data + alpha * f_data**2)
    torch.testing.assert_close(chains, f_chains + alpha * f_chains**2)
    # each value depends on its own f alone, and on nothing else
    slopes = torch.autograd.grad(data.sum() + chains.sum(), [f_data, f_chains])
    torch.testing.assert_close(slopes[0], -1 + 2 * alpha * f_data)
    torch.testing.assert_close(slopes[1], 1 + 2 * alpha * f_chains)


def test_regularisation_ends_a_climb_without_end():
    # data and chains that never overlap push f apart for ever, but not with alpha: +-1 / (2 alpha)
    f = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([f], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        sum(contrastive_divergence_losses(f[0], f[1], 0.25)).backward()
        optimizer.step()
    torch.testing.assert_close(f.detach(), torch.tensor([2.0, -2.0], dtype=torch.float64))


def test_whatever_moved_the_chains_is_not_differentiated(rng):
    # a chain computed from theta, taken as data as samplers hand it over
    theta = torch.tensor(0.7, requires_grad=True)
    start = torch.randn(20, generator=rng)
    moved = (start + 0.1 * theta).detach()
    of_data, of_chains = contrastive_divergence_losses(theta * start, theta * moved)
    (gradient,) = torch.autograd.grad(of_data.mean() + of_chains.mean(), theta)
    torch.testing.assert_close(gradient, moved.mean() - start.mean())


def test_members_on_leading_axes_equal_members_alone(rng):
    f_data, f_chains = (torch.randn(3, n, generator=rng) for n in (8, 11))
    together = contrastive_divergence_losses(f_data, f_chains, 0.1)
    assert [part.shape for part in together] == [(3, 8), (3, 11)]
    for k in range(3):
        alone = contrastive_divergence_losses(f_data[k], f_chains[k], 0.1)
        for part, part_alone in zip(together, alone, strict=True):
            torch.testing.assert_close(part[k], part_alone)
