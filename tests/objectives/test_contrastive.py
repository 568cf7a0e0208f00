import math

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from skebm.objectives import nce_losses, ranking_nce_losses, self_normalized_losses


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(*shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def test_nce_is_the_classic_loss_value_and_gradient(rng):
    """Literal transcription of Gutmann & Hyvärinen (2010) at nu = 1, base=None."""
    n = 50
    log_noise_data, log_noise_noise = (5 * randn(n, rng=rng) for _ in range(2))
    leaves = [5 * randn(n, rng=rng) for _ in range(2)] + [randn(rng=rng)]

    def literal(f_data, f_noise, log_z):
        def lse(a, b):
            return torch.logsumexp(torch.stack(torch.broadcast_tensors(a, b)), dim=0)

        of_data = f_data - lse(f_data, log_z + log_noise_data)
        of_noise = log_z + log_noise_noise - lse(f_noise, log_z + log_noise_noise)
        return -(of_data.mean() + of_noise.mean())

    def ours(f_data, f_noise, log_z):
        data, noise = nce_losses(f_data - log_noise_data, f_noise - log_noise_noise, log_z)
        assert data.shape == noise.shape == (n,)
        return data.mean() + noise.mean()

    results = []
    for function in (literal, ours):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        value = function(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_nce_noise_ratio_is_bernoulli_cross_entropy(rng):
    nu, log_z = 3.0, torch.tensor(0.7, dtype=torch.float64)
    r_data, r_noise = randn(20, rng=rng), randn(60, rng=rng)

    def is_data(r):
        model = torch.exp(r - log_z)
        return model / (model + nu)

    data, noise = nce_losses(r_data, r_noise, log_z, nu)
    torch.testing.assert_close(data, -torch.log(is_data(r_data)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(noise, -nu * torch.log1p(-is_data(r_noise)), rtol=1e-10, atol=1e-10)
    # with nu noise samples per row, the sum of the means is the mean over the data of everything
    torch.testing.assert_close(data.mean() + noise.mean(), (data.sum() + (noise / nu).sum()) / 20)


def test_nce_far_tails_are_exact():
    r = torch.tensor([-800.0, -30.0, 30.0, 800.0], dtype=torch.float64)
    data, noise = nce_losses(r, r, torch.zeros((), dtype=torch.float64))
    expected = np.logaddexp(0, -r.numpy())
    np.testing.assert_allclose(data.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(noise.numpy(), np.logaddexp(0, r.numpy()), rtol=1e-12)


def gaussian_problem():
    """Data N(.5, .8^2), noise N(0, 1): quadrature nodes, the model's log-ratio, and the truth."""
    nodes, weights = (torch.from_numpy(a) for a in hermegauss(120))
    weights = weights / weights.sum()
    mean, std = 0.5, 0.8
    data, noise = mean + std * nodes, nodes

    def log_ratio(x, theta):  # log p~ - log p_n
        return theta[0] * x**2 + theta[1] * x

    theta = torch.tensor([0.5 - 0.5 / std**2, mean / std**2], dtype=torch.float64)
    # at the truth log p~ - log Z is log p: Z undoes the terms that theta has not
    log_z = torch.tensor(0.5 * mean**2 / std**2 + math.log(std), dtype=torch.float64)
    return data, noise, weights, log_ratio, theta.requires_grad_(), log_z.requires_grad_()


@pytest.mark.parametrize("nu", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("objective", ["nce", "self_normalized"])
def test_optimum_is_the_truth_for_gaussian_against_gaussian(objective, nu):
    data, noise, weights, log_ratio, theta, log_z = gaussian_problem()
    ratios = log_ratio(data, theta), log_ratio(noise, theta)
    if objective == "nce":
        of_data, of_noise = nce_losses(*ratios, log_z, nu)
    else:
        of_data, of_noise = self_normalized_losses(*ratios, log_z)
    loss = (weights * of_data).sum() + (weights * of_noise).sum()
    first = torch.autograd.grad(loss, [theta, log_z], create_graph=True)
    for gradient in first:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
    flat = torch.cat([first[0], first[1].reshape(1)])
    rows = [
        torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(v, [theta, log_z], retain_graph=True)]
        )
        for v in flat
    ]
    assert torch.linalg.eigvalsh(torch.stack(rows)).min() > 0  # a minimum, and the only one near


def test_ranking_gradient_tends_to_maximum_likelihood(rng):
    """Its error against the exact gradient falls with the number of rivals."""
    data, noise, weights, log_ratio, _, _ = gaussian_problem()
    theta = torch.tensor([-0.1, 0.2], dtype=torch.float64, requires_grad=True)
    log_z = torch.logsumexp(log_ratio(noise, theta) + weights.log(), dim=0)
    (exact,) = torch.autograd.grad(log_z - (weights * log_ratio(data, theta)).sum(), theta)
    x = 0.5 + 0.8 * randn(100_000, rng=rng)
    (of_data,) = torch.autograd.grad(-log_ratio(x, theta).mean(), theta)
    (of_data_exact,) = torch.autograd.grad(-(weights * log_ratio(data, theta)).sum(), theta)
    exact = exact - of_data_exact + of_data  # the same data in both gradients

    def error(m):
        rivals = randn(100, 1, m, rng=rng)
        r_data, r_noise = log_ratio(x.view(100, 1000), theta), log_ratio(rivals, theta)
        (gradient,) = torch.autograd.grad(ranking_nce_losses(r_data, r_noise).mean(), theta)
        return (gradient - exact).norm()

    few, some, many = error(3), error(100), error(5000)
    assert few > 3 * some > 3 * many
    assert many < 5e-3


def test_ranking_is_cross_entropy_and_shares_rivals(rng):
    r_data = randn(4, 7, rng=rng)
    own = randn(4, 7, 5, rng=rng)
    logits = torch.cat([r_data.unsqueeze(-1), own], dim=-1)
    expected = -torch.log_softmax(logits, dim=-1)[..., 0]
    torch.testing.assert_close(ranking_nce_losses(r_data, own), expected)
    shared = own[:, :1]
    torch.testing.assert_close(
        ranking_nce_losses(r_data, shared), ranking_nce_losses(r_data, shared.expand(4, 7, 5))
    )
    zero = torch.zeros(6)
    torch.testing.assert_close(
        ranking_nce_losses(zero, torch.zeros(1, 9)), torch.full((6,), math.log(10))
    )


def test_self_normalized_bounds_the_log_likelihood_and_touches_it(rng):
    r_data, r_noise = randn(30, rng=rng), randn(200, rng=rng)
    log_z = r_noise.logsumexp(0) - math.log(200)
    exact = log_z - r_data.mean()

    def loss(c):
        return sum(part.mean() for part in self_normalized_losses(r_data, r_noise, c))

    torch.testing.assert_close(loss(log_z), exact)
    for shift in (-1.0, -0.1, 0.1, 1.0):
        assert loss(log_z + shift) > exact


@pytest.mark.parametrize("objective", [nce_losses, self_normalized_losses])
def test_members_on_leading_axes_equal_members_alone(objective, rng):
    r_data, r_noise = randn(3, 8, rng=rng), randn(3, 11, rng=rng)
    log_z = randn(3, rng=rng)
    together = objective(r_data, r_noise, log_z)
    for k in range(3):
        alone = objective(r_data[k], r_noise[k], log_z[k])
        for part, part_alone in zip(together, alone, strict=True):
            torch.testing.assert_close(part[k], part_alone)
