"""Objectives of variational inference against closed forms and independent implementations."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from skebm.latents import perceptron
from skebm.objectives import (
    calibrated_scores,
    draw_directions,
    entropy_surrogates,
    gaussian_divergences,
    sliced_score_matching_losses,
    sliced_score_network_losses,
    stein_scores,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(*shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# A Gaussian encoder u = m + A eps with correlated columns. Its entropy is log |det A| and a
# constant, so that the gradient in A is A^-T.
MEAN = tensor([0.7, -1.0])
FACTOR = tensor([[0.8, 0.0], [0.9, 0.6]])
EXACT = torch.linalg.inv(FACTOR).mT


def encoder_score(u):
    precision = torch.linalg.inv(FACTOR @ FACTOR.mT)
    return -(u - MEAN) @ precision


def entropy_gradient(noise, score, mean=MEAN, factor=FACTOR):
    """Gradients in mean and factor of the average surrogate over draws (..., 2)."""
    mean, factor = mean.clone().requires_grad_(), factor.clone().requires_grad_()
    u = mean + noise @ factor.mT
    entropy_surrogates(u, score(u)).mean().backward()
    return mean.grad, factor.grad


# ---------------------------------------------------------------------- closed forms


def test_gaussian_divergences_are_those_of_torch(rng):
    location, log_scale = randn(4, 5, 3, rng=rng), randn(4, 5, 3, rng=rng)
    law = Normal(location, log_scale.exp())
    prior = Normal(torch.zeros(3).double(), torch.ones(3).double())
    expected = kl_divergence(law, prior).sum(-1)
    torch.testing.assert_close(gaussian_divergences(location, log_scale), expected, **CLOSE)


def test_entropy_gradient_with_the_exact_score(rng):
    noise = randn(40_000, 2, rng=rng)
    of_mean, of_factor = entropy_gradient(noise, encoder_score)
    # draws of the gradient in A are -s eps^T: their spread gives the error of the mean
    score = encoder_score(MEAN + noise @ FACTOR.mT)
    error = (score[:, :, None] * noise[:, None]).std(0) / math.sqrt(len(noise))
    assert ((of_factor - EXACT).abs() < 4 * error).all()
    assert (error < 0.02).all()
    assert (of_mean.abs() < 4 * score.std(0) / math.sqrt(len(noise))).all()


def test_no_gradient_goes_through_the_score():
    weight = torch.ones(2, requires_grad=True)
    u = torch.tensor([[1.0, 2.0]], requires_grad=True)
    entropy_surrogates(u, weight * u).sum().backward()
    assert weight.grad is None
    # the score itself, with the sign of an entropy
    torch.testing.assert_close(u.grad, -torch.tensor([[1.0, 2.0]]))


# ---------------------------------------------------------------------- sliced score matching


class Quartic(torch.nn.Module):
    """An energy that is no quadratic, and the score that is its gradient."""

    def __init__(self, d):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.mix = torch.nn.Parameter(randn(d, d, rng=rng))

    def forward(self, u):
        return (u @ self.mix).sin().sum(-1) - 0.25 * u.pow(4).sum(-1)

    def score(self, u):
        return (u @ self.mix).cos() @ self.mix.mT - u.pow(3)


@pytest.mark.parametrize("shape", [(7, 3), (2, 7, 3), (2, 3, 7, 1)])
def test_sliced_losses_of_a_score_are_those_of_its_energy(shape, rng):
    energy = Quartic(shape[-1])
    u = randn(*shape, rng=rng)
    directions = draw_directions(u, rng, n_projections=4, projection="gaussian")
    losses = sliced_score_network_losses(energy.score, u, directions)
    expected = sliced_score_matching_losses(energy, u, directions)
    assert losses.shape == shape[:-1]
    torch.testing.assert_close(losses, expected, **CLOSE)
    gradients = [torch.autograd.grad(v.sum(), energy.mix)[0] for v in (losses, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)


def swirl(u):
    """A field that is the gradient of nothing."""
    x, y, z = u.unbind(-1)
    return torch.stack([y * z + x.sin(), -3 * x + y * y, x * x * y - z], -1)


def test_all_signs_together_give_the_exact_trace(rng):
    u = randn(6, 3, rng=rng)
    # the eight vectors of signs have E[v v'] = I exactly
    signs = tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    losses = sliced_score_network_losses(swirl, u, signs[:, None].expand(8, 6, 3))
    jacobians = torch.func.vmap(torch.func.jacrev(swirl))(u)
    trace = jacobians.diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(losses, 0.5 * swirl(u).square().sum(-1) + trace, **CLOSE)


def test_random_directions_are_right_on_average(rng):
    u = randn(1, 3, rng=rng).expand(20_000, 3)
    directions = draw_directions(u, rng)
    losses = sliced_score_network_losses(swirl, u, directions)
    jacobian = torch.func.jacrev(swirl)(u[0])
    exact = 0.5 * swirl(u[0]).square().sum() + jacobian.trace()
    assert abs(losses.mean() - exact) < 4 * losses.std() / math.sqrt(len(u))


def test_the_best_linear_score_is_minus_the_inverse_covariance(rng):
    # the loss is tr(W S W') / 2 + tr W for second moments S, and its gradient W S + I
    u = randn(50, 3, rng=rng) @ randn(3, 3, rng=rng)
    moments = u.mT @ u / len(u)
    basis = math.sqrt(3) * torch.eye(3).double()  # E[v v'] = I again
    directions = basis[:, None].expand(3, 50, 3)

    def gradient(weight):
        weight = weight.clone().requires_grad_()
        losses = sliced_score_network_losses(lambda v: v @ weight.mT, u, directions)
        return torch.autograd.grad(losses.mean(), weight)[0]

    anywhere = randn(3, 3, rng=rng)
    expected = anywhere @ moments + torch.eye(3).double()
    torch.testing.assert_close(gradient(anywhere), expected, **CLOSE)
    best = -torch.linalg.inv(moments)
    torch.testing.assert_close(gradient(best), torch.zeros(3, 3).double(), rtol=0, atol=1e-10)


def test_no_gradient_goes_through_the_samples(rng):
    u = randn(4, 3, rng=rng).requires_grad_()
    weight = randn(3, 3, rng=rng).requires_grad_()
    directions = draw_directions(u, rng)
    losses = sliced_score_network_losses(lambda v: v @ weight, u, directions)
    losses.sum().backward()
    assert u.grad is None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():  # it switches gradients on where it needs them
        again = sliced_score_network_losses(lambda v: v @ weight, u, directions)
    torch.testing.assert_close(again, losses.detach(), **CLOSE)


def test_entropy_gradient_with_a_learned_score(rng):
    network = perceptron(2, 2, (32,), seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    n_steps = 600

    def score(u):
        return network(u) - u

    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / n_steps)
        u = (MEAN + randn(512, 2, rng=rng) @ FACTOR.mT).float()
        loss = sliced_score_network_losses(score, u, draw_directions(u, rng)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = randn(40_000, 2, rng=rng)
    of_mean, of_factor = entropy_gradient(noise, lambda u: score(u.float()).double())
    draws = encoder_score(MEAN + noise @ FACTOR.mT)[:, :, None] * noise[:, None]
    error = draws.std(0) / math.sqrt(len(noise))
    # what is left of learning: 5 % of the gradient, which spans a factor of A^-T of 3
    assert ((of_factor - EXACT).abs() < 4 * error + 0.05 * EXACT.norm()).all()
    error = encoder_score(MEAN + noise @ FACTOR.mT).std(0) / math.sqrt(len(noise))
    assert (of_mean.abs() < 4 * error + 0.05 * EXACT.norm()).all()


# ---------------------------------------------------------------------- Stein's identity


def reference(u, mass=0.99):
    """Shi et al. (2018), sample by sample, without the correction at the end."""
    m = len(u)
    pairs = torch.stack([(u[i] - u[j]).square().sum() for i in range(m) for j in range(i)])
    # the lower one of two middle pairs, as torch.median has it
    width = pairs.sort().values[(len(pairs) - 1) // 2]

    def kernel(a, b):
        return torch.exp(-0.5 * (a[:, None] - b).square().sum(-1) / width)

    values, vectors = np.linalg.eigh(kernel(u, u).numpy())
    values, vectors = values[::-1], vectors[:, ::-1]
    n_used = 1 + int((np.cumsum(values) / values.sum() < mass).sum())
    score = torch.zeros_like(u)
    for j in range(n_used):
        w = torch.tensor(vectors[:, j].copy())
        points = u.clone().requires_grad_()
        # Nystroem: psi_j(x) = sqrt(M) / lambda_j sum_n w_jn k(x, u_n)
        psi = math.sqrt(m) / values[j] * (kernel(points, u) @ w).sum()
        (gradients,) = torch.autograd.grad(psi, points)
        # psi_j(u_m) = sqrt(M) w_jm
        score -= math.sqrt(m) * w[:, None] * gradients.mean(0)
    return score


@pytest.mark.parametrize("shape", [(16, 1), (16, 3), (40, 2)])
def test_stein_scores_are_those_of_the_paper(shape, rng):
    u = randn(*shape, rng=rng)
    centered = u - u.mean(0)
    expected = reference(u)
    # the multiple of u - mean that makes E[s_j (u_j - mean)] = -(1 - 1/M)
    missing = -(1 - 1 / len(u)) - (expected * centered).mean(0)
    expected = expected + missing / centered.square().mean(0) * centered
    torch.testing.assert_close(stein_scores(u), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(16, 3), (50, 8, 2), (3, 4, 20, 1)])
def test_identity_of_stein_holds_over_all_laws(shape, rng):
    u = randn(*shape, rng=rng).exp()
    centered = u - u.mean(-2, keepdim=True)
    products = (stein_scores(u) * centered).flatten(0, -2).mean(0)
    torch.testing.assert_close(products, torch.full_like(products, 1 / shape[-2] - 1), **CLOSE)


def test_identity_of_stein_holds_for_one_sample_of_each_law(rng):
    # around zero: what a score estimated at single draws is calibrated with
    u, score = 2 + randn(200, 1, 3, rng=rng), randn(200, 1, 3, rng=rng)
    found = calibrated_scores(score, u)
    torch.testing.assert_close((found * u).mean((0, 1)), -torch.ones(3).double(), **CLOSE)
    # by the same multiple of u in all laws
    multiples = (found - score) / u
    torch.testing.assert_close(multiples, multiples[:1].expand_as(u), rtol=1e-7, atol=1e-7)


def test_stein_scores_move_with_the_samples(rng):
    u = randn(4, 20, 3, rng=rng)
    score = stein_scores(u)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(stein_scores(u + 30.0), score, **close)
    torch.testing.assert_close(stein_scores(0.01 * u), 100 * score, **close)
    torch.testing.assert_close(stein_scores(-u), -score, **close)
    order = torch.randperm(20, generator=rng)
    torch.testing.assert_close(stein_scores(u[:, order]), score[:, order], **close)
    columns = torch.tensor([2, 0, 1])
    torch.testing.assert_close(stein_scores(u[..., columns]), score[..., columns], **close)


def test_leading_axes_of_stein_scores(rng):
    u = randn(2, 3, 16, 2, rng=rng)
    score = stein_scores(u)
    torch.testing.assert_close(stein_scores(u.flatten(0, 1)).view(2, 3, 16, 2), score, **CLOSE)
    torch.testing.assert_close(stein_scores(u[0, 0][None])[0], stein_scores(u[0, 0]), **CLOSE)
    # other laws bear on one only by a multiple of u - mean, the same in all
    centered = u - u.mean(-2, keepdim=True)
    alone = torch.stack([stein_scores(law) for law in u.flatten(0, 1)]).view_as(u)
    shares = ((score - alone) / centered).flatten(0, 1)
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicated_samples_do_no_harm(dtype, rng):
    u = randn(3, 16, 2, rng=rng).to(dtype)
    pairs = torch.cat([u, u], dim=1)
    mostly = u.clone()
    mostly[0, 2:] = mostly[0, :1]
    for values in (pairs, mostly, torch.zeros(2, 16, 2, dtype=dtype)):
        assert stein_scores(values).isfinite().all()
    assert stein_scores(u.requires_grad_()).requires_grad is False


def two_bells(m, rng):
    signs = torch.where(torch.rand(m, 1, generator=rng) < 0.5, -2.0, 2.0).double()
    return signs + 0.8 * randn(m, 1, rng=rng)


def two_bells_score(u):
    parts = torch.stack([-0.5 * ((u - c) / 0.8).square() for c in (-2.0, 2.0)])
    share = parts.softmax(0)
    return -(share[0] * (u + 2) + share[1] * (u - 2)) / 0.64


def test_error_on_a_law_of_two_modes_falls_with_the_samples(rng):
    errors = []
    for m, n_laws in ((25, 80), (100, 20), (400, 5)):
        squares = []
        for _ in range(n_laws):
            u = two_bells(m, rng)
            squares.append((stein_scores(u) - two_bells_score(u)).square().mean())
        errors.append(torch.stack(squares).mean().sqrt().item())
    assert errors[0] > errors[1] > errors[2]
    # and it sees both modes: the score of the normal law with the same moments is off by more
    u = two_bells(10_000, rng)
    normal = -u / (4 + 0.64)
    assert errors[2] < 0.5 * (normal - two_bells_score(u)).square().mean().sqrt()


def test_entropy_gradient_in_the_scale_with_stein_scores(rng):
    # For u = m + s eps the gradient in log s is -E[s(u) (u - m)], exactly 1. The correction makes
    # it 1 - 1/M around the samples' own mean; what the mean itself adds is at most 1/M.
    m, n_laws = 16, 2000
    noise = randn(n_laws, m, 2, rng=rng)
    u = MEAN + noise * tensor([0.5, 2.0])
    score = stein_scores(u)
    draws = -(score * (u - MEAN)).mean(1)
    error = draws.std(0) / math.sqrt(n_laws)
    assert ((draws.mean(0) - 1).abs() < 1 / m + 4 * error).all()
    assert (error < 0.02).all()
    # none in the location
    means = score.mean(1)
    assert (means.mean(0).abs() < 4 * means.std(0) / math.sqrt(n_laws)).all()


def test_entropy_gradient_in_the_correlation_with_stein_scores(rng):
    # Only the diagonal is corrected. Off it the estimate falls short: it does not see the samples'
    # own mean (1/M), and the eigenfunctions left out come down as fast. Measured over seeds, the
    # bias is 2/M of the gradient at M = 16 and just below 4/M at 256.
    biases = []
    for m, n_laws in ((16, 400), (64, 100), (256, 25)):
        noise = randn(n_laws, m, 2, rng=rng)
        scores = stein_scores(MEAN + noise @ FACTOR.mT)
        draws = torch.stack(
            [
                entropy_gradient(of_law, lambda u, score=score: score)[1]
                for of_law, score in zip(noise, scores, strict=True)
            ]
        )
        error = (draws.std(0) / math.sqrt(n_laws)).norm() / EXACT.norm()
        biases.append((draws.mean(0) - EXACT).norm() / EXACT.norm())
        assert biases[-1] < 4 / m + 4 * error
    assert biases[0] > biases[1] > biases[2]


def test_stein_scores_of_a_normal_law(rng):
    law = MultivariateNormal(MEAN, FACTOR @ FACTOR.mT)
    points = (MEAN + randn(600, 2, rng=rng) @ FACTOR.mT).requires_grad_()
    (exact,) = torch.autograd.grad(law.log_prob(points).sum(), points)
    error = (stein_scores(points) - exact).square().sum()
    assert error < 0.05 * exact.square().sum()
