"""Encoders: what their draws are, and the moments that they state."""

import math

import pytest
import torch
from torch import nn

from skebm.latents import GaussianEncoder, ImplicitEncoder, perceptron

D, K = 3, 2


def encoder(kind, seed=0, trained=True):
    rng = torch.Generator().manual_seed(seed)
    network = nn.Linear(D, 2 * K).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng))
    if kind == "gaussian":
        return GaussianEncoder(network, K)
    residual = perceptron(D + 2 * K, K, (16,), seed=1).double()
    score = perceptron(D + K, K, (16,), seed=2).double()
    if trained:
        with torch.no_grad():
            for part in (residual, score):
                part[-1].weight.copy_(torch.randn(K, 16, generator=rng))
    return ImplicitEncoder(network, K, residual, score)


def rows(n=5, seed=3):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(coder, *shape, seed=4):
    rng = torch.Generator().manual_seed(seed)
    return coder.noise(*shape, rng=rng, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["gaussian", "implicit"])
def test_draws_are_location_and_scale_times_standardized(kind):
    coder, x = encoder(kind), rows()
    e = noise(coder, 7)
    assert e.shape == (7, coder.n_noise)
    location, log_scale = coder(x)
    assert location.shape == log_scale.shape == (5, K)
    u = coder.standardized(x, e)
    assert u.shape == (5, 7, K)
    expected = location[:, None] + log_scale.exp()[:, None] * u
    torch.testing.assert_close(coder.draw(x, e), expected)
    # noise of its own for each row, or one for all
    own = e.expand(5, *e.shape)
    torch.testing.assert_close(coder.standardized(x, own), u)
    other = noise(coder, 5, 7)
    each = coder.standardized(x, other)
    torch.testing.assert_close(each[2], coder.standardized(x[2:3], other[2])[0])


def test_scales_are_bounded():
    coder = encoder("gaussian")
    location, log_scale = coder(1e6 * rows())
    assert (log_scale.abs() <= 10).all()
    assert coder.moments(1e6 * rows(), noise(coder, 4))[1].isfinite().all()


def test_moments_of_the_gaussian_encoder_are_exact():
    coder, x = encoder("gaussian"), rows()
    mean, covariance = coder.moments(x, noise(coder, 4))
    location, log_scale = coder(x)
    assert torch.equal(mean, location)
    torch.testing.assert_close(covariance, (2 * log_scale).exp().diag_embed())
    z = coder.draw(x, noise(coder, 20_000))
    assert ((z.mean(1) - mean).abs() < 4.5 * z.std(1) / math.sqrt(20_000)).all()
    white = (z - mean[:, None]) / log_scale.exp()[:, None]
    assert (white.square().mean(1) - 1).abs().max() < 4.5 * math.sqrt(2 / 20_000)


def test_moments_of_the_implicit_encoder_are_those_of_its_draws():
    coder, x = encoder("implicit"), rows()
    n = 20_000
    mean, covariance = coder.moments(x, noise(coder, n))
    # other draws
    z = coder.draw(x, noise(coder, n, seed=5))
    spread = z.std(1)
    assert ((z.mean(1) - mean).abs() < 4.5 * math.sqrt(2 / n) * spread).all()
    centered = z - z.mean(1, keepdim=True)
    products = centered[..., None] * centered[..., None, :]
    error = math.sqrt(2 / n) * products.std(1)
    assert ((products.mean(1) - covariance).abs() < 4.5 * error).all()
    # no Gaussian any more
    location, log_scale = coder(x)
    assert (covariance - (2 * log_scale).exp().diag_embed()).abs().max() > 0.1


def test_moments_at_the_start_need_no_draws():
    # the noise that nothing bends is not drawn, its moments are known
    start, x = encoder("implicit", trained=False), rows()
    gaussian = GaussianEncoder(start.network, K)
    for mine, wanted in zip(
        start.moments(x, noise(start, 3)), gaussian.moments(x, None), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_moments_from_few_draws_are_regular():
    coder, x = encoder("implicit"), rows()
    for n in (1, 2, 8):
        mean, covariance = coder.moments(x, noise(coder, n))
        assert mean.isfinite().all()
        assert (torch.linalg.eigvalsh(covariance) > 0).all()


def test_the_implicit_encoder_starts_as_the_gaussian_one():
    start, x = encoder("implicit", trained=False), rows()
    gaussian = GaussianEncoder(start.network, K)
    n = 20_000
    u = start.standardized(x, noise(start, n)[:n])
    # standard normal, to its fourth moment
    assert (u.mean(1).abs() < 4.5 / math.sqrt(n)).all()
    assert ((u.square().mean(1) - 1).abs() < 4.5 * math.sqrt(2 / n)).all()
    assert ((u.pow(4).mean(1) - 3).abs() < 4.5 * math.sqrt(96 / n)).all()
    assert (u.prod(-1).mean(1).abs() < 4.5 / math.sqrt(n)).all()
    torch.testing.assert_close(start(x)[0], gaussian(x)[0])
    # and its score starts as that of the normal distribution
    torch.testing.assert_close(start.score(x, u), -u)


def test_the_residual_bends_all_but_the_normal_noise_of_its_own():
    # which keeps the density of u smooth
    coder, x = encoder("implicit"), rows()
    e = noise(coder, 7)
    u = coder.standardized(x, e)
    moved = e.clone()
    moved[:, :K] += 1.5
    torch.testing.assert_close(coder.standardized(x, moved), u + 1.5)
    for part in (e[:, K : 2 * K], e[:, 2 * K :]):
        part.neg_()
        assert not torch.allclose(coder.standardized(x, e), u)
        part.neg_()


def test_rows_do_not_bear_on_each_other():
    coder, x = encoder("implicit"), rows()
    e = noise(coder, 7)
    torch.testing.assert_close(coder.draw(x, e)[3:4], coder.draw(x[3:4], e))
    u = coder.standardized(x, e)
    torch.testing.assert_close(coder.score(x, u)[3:4], coder.score(x[3:4], u[3:4]))
    # but their score and their distribution depend on the row
    assert not torch.allclose(u[0], u[1])
    assert not torch.allclose(coder.score(x[:1], u[:1]), coder.score(x[1:2], u[:1]))


@pytest.mark.parametrize("kind", ["gaussian", "implicit"])
def test_noise_is_reproducible_and_private(kind):
    coder = encoder(kind)
    before = torch.get_rng_state()
    assert torch.equal(noise(coder, 6), noise(coder, 6))
    assert not torch.equal(noise(coder, 6), noise(coder, 6, seed=9))
    assert noise(coder, 2, 3).shape == (2, 3, coder.n_noise)
    assert torch.equal(before, torch.get_rng_state())
