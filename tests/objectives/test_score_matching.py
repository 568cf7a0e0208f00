"""Score matching losses against closed forms and quadrature, all in float64."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import roots_genlaguerre

from skebm.energies import MLPEnergy, PeriodicEmbedding
from skebm.objectives import (
    denoising_score_matching_losses,
    draw_directions,
    score_matching_losses,
    sliced_score_matching_losses,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(*shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def bell():
    """Equally spaced nodes for the standard normal law: exact for what is smooth, poles or not."""
    unit = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    return unit, (-0.5 * unit.square()).softmax(0)


def hermite(n=60, d=1):
    """Nodes (n^d, d) and weights (n^d,) of the standard normal law."""
    nodes, weights = (torch.from_numpy(a) for a in hermegauss(n))
    weights = weights / weights.sum()
    grids = torch.meshgrid(*[nodes] * d, indexing="ij")
    shares = torch.meshgrid(*[weights] * d, indexing="ij")
    nodes = torch.stack([g.flatten() for g in grids], dim=1)
    return nodes, torch.stack([s.flatten() for s in shares]).prod(0)


class Gaussian:
    """Normal law or energy, with all that score matching asks of it."""

    def __init__(self, mean, precision):
        self.mean, self.precision = tensor(mean), tensor(precision)

    def __call__(self, z):
        x = z - self.mean
        return -0.5 * ((x @ self.precision) * x).sum(-1)

    def score(self, z):
        return -(z - self.mean) @ self.precision

    def laplacian(self, z):
        return -self.precision.trace().expand(z.shape[:-1])


class Mixture:
    """A normal mixture in one column; `smoothed(s)` is its convolution with N(0, s^2)."""

    def __init__(self, weights, means, variances):
        self.weights, self.means, self.variances = map(tensor, (weights, means, variances))

    def __call__(self, z):
        logs = -0.5 * (z - self.means).square() / self.variances - 0.5 * self.variances.log()
        return (logs + self.weights.log()).logsumexp(-1)

    def score(self, z):
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(self(leaf).sum(), leaf)[0]

    def smoothed(self, sigma):
        law = Mixture([1.0], [0.0], [1.0])
        law.weights, law.means, law.variances = self.weights, self.means, self.variances + sigma**2
        return law

    def nodes(self):
        """Quadrature of the law itself."""
        x = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)[:, None]
        return x, self(x).softmax(0)


def wave(z):
    """An energy that is not separable, of which everything is known."""
    return torch.sin(z[..., 0] + 2.0 * z[..., 1]) + 0.3 * z[..., 0] * z[..., 2] ** 2


def wave_gradient(z):
    cosine = torch.cos(z[..., 0] + 2.0 * z[..., 1])
    return torch.stack(
        [cosine + 0.3 * z[..., 2] ** 2, 2.0 * cosine, 0.6 * z[..., 0] * z[..., 2]], dim=-1
    )


def wave_hessian(z):
    sine, zero = torch.sin(z[..., 0] + 2.0 * z[..., 1]), torch.zeros_like(z[..., 0])
    cross, last = 0.6 * z[..., 2], 0.6 * z[..., 0]
    rows = [[-sine, -2.0 * sine, cross], [-2.0 * sine, -4.0 * sine, zero], [cross, zero, last]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


ENERGY = Gaussian([0.3, -1.0, 0.5], [[2.0, 0.4, 0.0], [0.4, 1.0, -0.3], [0.0, -0.3, 0.7]])
BASE = Gaussian([0.0, 0.2, -0.1], [[1.0, -0.2, 0.1], [-0.2, 0.8, 0.0], [0.1, 0.0, 1.5]])


def hyvarinen(score, jacobian):
    """1/2 |s|^2 + tr grad s, as it stands in the paper."""
    return 0.5 * score.square().sum(-1) + jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)


# ---------------------------------------------------------------------- the exact form


def test_exact_loss_of_a_gaussian_energy_row_by_row(rng):
    z = randn(40, 3, rng=rng)
    expected = 0.5 * ENERGY.score(z).square().sum(-1) - (2.0 + 1.0 + 0.7)
    torch.testing.assert_close(score_matching_losses(ENERGY, z), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(40, 3), (2, 40, 3)])
def test_exact_loss_is_hyvarinens_without_the_terms_of_the_base(shape, rng):
    z = randn(*shape, rng=rng)
    gradient, hessian = wave_gradient(z), wave_hessian(z)
    torch.testing.assert_close(
        score_matching_losses(wave, z), hyvarinen(gradient, hessian), **CLOSE
    )
    base, curvature = BASE.score(z), -BASE.precision.expand(*shape, 3)
    expected = hyvarinen(gradient + base, hessian + curvature) - hyvarinen(base, curvature)
    torch.testing.assert_close(score_matching_losses(wave, z, base), expected, **CLOSE)


def test_no_tilt_has_no_loss(rng):
    z = randn(20, 3, rng=rng)
    v = draw_directions(z, rng, 2)

    def nothing(z):
        return 0.0 * z.sum(-1)

    for base in (None, BASE.score(z)):
        losses = [
            score_matching_losses(nothing, z, base),
            sliced_score_matching_losses(nothing, z, v, base),
            sliced_score_matching_losses(nothing, z, v, base, variance_reduced=False),
        ]
        for loss in losses:
            torch.testing.assert_close(loss, torch.zeros(20, dtype=torch.float64), **CLOSE)


def test_expected_exact_loss_is_fisher_divergence_in_one_column():
    """E loss = D(p, q e^f) - D(p, q): f = 0 is at zero. p is a mixture, f not polynomial."""
    law = Mixture([0.3, 0.7], [-1.0, 0.8], [0.5, 0.9])
    base = Gaussian([0.4], [[0.6]])
    x, weight = law.nodes()

    def tilt(z):
        return (torch.sin(1.3 * z) - 0.2 * z.square()).sum(-1)

    gradient = 1.3 * torch.cos(1.3 * x) - 0.4 * x
    truth = law.score(x)

    def divergence(score):
        return 0.5 * weight @ (score - truth).square().sum(-1)

    for q, own in ((base.score(x), divergence(base.score(x))), (None, divergence(0.0 * x))):
        total = gradient if q is None else gradient + q
        actual = weight @ score_matching_losses(tilt, x, q)
        torch.testing.assert_close(actual, divergence(total) - own, rtol=0, atol=1e-9)
        assert abs(actual) > 0.02


def test_expected_exact_loss_is_fisher_divergence_in_three_columns():
    law = Gaussian([0.1, -0.3, 0.2], [[1.5, 0.3, 0.2], [0.3, 1.1, -0.4], [0.2, -0.4, 0.9]])
    unit, weight = hermite(30, 3)
    x = law.mean + unit @ torch.linalg.cholesky(law.precision.inverse()).T

    def divergence(score):
        return 0.5 * weight @ (score - law.score(x)).square().sum(-1)

    actual = weight @ score_matching_losses(wave, x, BASE.score(x))
    expected = divergence(wave_gradient(x) + BASE.score(x)) - divergence(BASE.score(x))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)
    assert abs(actual) > 0.05
    # the truth, as a tilt of the base, is the minimum: - D(p, q), which no tilt is below
    best = weight @ score_matching_losses(lambda z: law(z) - BASE(z), x, BASE.score(x))
    torch.testing.assert_close(best, -divergence(BASE.score(x)), rtol=0, atol=1e-9)
    assert best < actual


def minimum(loss, theta):
    """Gradient, and smallest eigenvalue of the Hessian."""
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    hessian = [torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient]
    return gradient.detach(), torch.linalg.eigvalsh(torch.stack(hessian)).min()


@pytest.mark.parametrize("with_base", [False, True])
def test_gaussian_is_found(with_base):
    """Data N(.5, .8^2), quadrature: the minimum is at the true parameters."""
    mean, variance = 0.5, 0.64
    unit, weight = hermite()
    x = mean + math.sqrt(variance) * unit
    base = Gaussian([-0.2], [[0.5]]) if with_base else None
    precision, slope = 1 / variance, mean / variance
    if with_base:
        precision, slope = precision - 0.5, slope + 0.2 * 0.5
    theta = tensor([precision, slope]).requires_grad_()

    def tilt(z):
        return (-0.5 * theta[0] * z.square() + theta[1] * z).sum(-1)

    losses = score_matching_losses(tilt, x, base.score(x) if with_base else None)
    gradient, curvature = minimum(weight @ losses, theta)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    assert curvature > 0.1


def test_gamma_is_found():
    """Data Gamma(4, 2), f = (a - 1) log x - b x: the minimum is at the truth."""
    # x^3 e^-x as x^2 times x e^-x: the loss has 1 / x^2 in it
    nodes, weight = (torch.from_numpy(a) for a in roots_genlaguerre(40, 1.0))
    weight = weight * nodes**2
    x, weight = nodes[:, None] / 2.0, weight / weight.sum()
    theta = tensor([3.0, 2.0]).requires_grad_()

    def tilt(z):
        return (theta[0] * z.log() - theta[1] * z).sum(-1)

    gradient, curvature = minimum(weight @ score_matching_losses(tilt, x), theta)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert curvature > 0.1


def test_correlated_gaussian_is_found_from_samples(rng):
    """Closed form: the minimum over all precisions is the inverse second moment of the rows."""
    x = randn(2000, 3, rng=rng) @ randn(3, 3, rng=rng)
    precision = (x.T @ x / 2000).inverse().requires_grad_()
    losses = score_matching_losses(lambda z: -0.5 * ((z @ precision) * z).sum(-1), x)
    (gradient,) = torch.autograd.grad(losses.mean(), precision)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)
    # of rows: - tr(precision) / 2
    torch.testing.assert_close(losses.mean(), -0.5 * precision.trace(), **CLOSE)


# ---------------------------------------------------------------------- the sliced forms


def repeated(rng, projection, n_projections, n_draws=4000, n=6):
    """The same rows under many directions."""
    z = randn(n, 3, rng=rng)
    many = z.expand(n_draws, n, 3)
    return z, many, draw_directions(many, rng, n_projections, projection)


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
@pytest.mark.parametrize("n_projections", [1, 4])
@pytest.mark.parametrize("with_base", [True, False])
def test_sliced_is_exact_in_expectation(
    variance_reduced, projection, n_projections, with_base, rng
):
    z, many, v = repeated(rng, projection, n_projections)
    base = BASE.score(z) if with_base else None
    losses = sliced_score_matching_losses(
        wave, many, v, None if base is None else base.expand_as(many),
        variance_reduced=variance_reduced,
    )  # fmt: skip
    exact = score_matching_losses(wave, z, base)
    error = (losses.mean(0) - exact) / (losses.std(0) / math.sqrt(len(losses)))
    assert error.abs().max() < 4.0
    # mean over P of quadratic forms v' M v, the variance of which is known
    gradient, matrix = wave_gradient(z), wave_hessian(z)
    if not variance_reduced:
        right = 0.5 * gradient if base is None else 0.5 * gradient + base
        outer = gradient[:, :, None] * right[:, None, :]
        matrix = matrix + 0.5 * (outer + outer.transpose(1, 2))
    variance = 2.0 * matrix.square().sum((1, 2))
    if projection == "rademacher":
        variance = variance - 2.0 * matrix.diagonal(dim1=1, dim2=2).square().sum(1)
    torch.testing.assert_close(losses.var(0), variance / n_projections, rtol=0.2, atol=0.0)


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
def test_variance_reduction_reduces_the_variance(projection, rng):
    _, many, v = repeated(rng, projection, 1, n=50)
    base = BASE.score(many)
    reduced, general = (
        sliced_score_matching_losses(wave, many, v, base, variance_reduced=reduced).var(0)
        for reduced in (True, False)
    )
    assert reduced.mean() < 0.5 * general.mean()


def test_one_direction_is_the_papers_formula(rng):
    """Equation 8 of Song et al. (2019): v' grad s v + 1/2 (v' s)^2, without the base's own."""
    z = randn(30, 3, rng=rng)
    v = draw_directions(z, rng, 1, "gaussian")
    w, base = v[0], BASE.score(z)

    def literal(score, jacobian):
        return torch.einsum("ni,nij,nj->n", w, jacobian, w) + 0.5 * (w * score).sum(-1) ** 2

    curvature = -BASE.precision.expand(30, 3, 3)
    total = literal(wave_gradient(z) + base, wave_hessian(z) + curvature)
    torch.testing.assert_close(
        sliced_score_matching_losses(wave, z, v, base, variance_reduced=False),
        total - literal(base, curvature),
        **CLOSE,
    )


def test_rademacher_trace_is_exact_for_diagonal_hessians(rng):
    def separable(z):
        return (torch.cos(z) + 0.1 * z**3).sum(-1)

    z = randn(30, 5, rng=rng)
    base = randn(30, 5, rng=rng)
    exact = score_matching_losses(separable, z, base)
    one = sliced_score_matching_losses(separable, z, draw_directions(z, rng, 1), base)
    torch.testing.assert_close(one, exact, **CLOSE)
    v = draw_directions(z, rng, 1, "gaussian")
    assert (sliced_score_matching_losses(separable, z, v, base) - exact).abs().mean() > 0.1


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions(projection, dtype):
    z = torch.zeros(50_000, 3, dtype=dtype)

    def draw(seed, n_projections=2):
        return draw_directions(z, torch.Generator().manual_seed(seed), n_projections, projection)

    v = draw(0)
    assert v.shape == (2, 50_000, 3)
    assert v.dtype == dtype
    assert v.device == z.device
    assert torch.equal(v, draw(0))
    assert not torch.equal(v, draw(1))
    flat = v.double().flatten(0, 1)
    if projection == "rademacher":
        assert set(v.unique().tolist()) == {-1.0, 1.0}
    else:
        assert v.unique().numel() > 1000
    standard_error = 1 / math.sqrt(len(flat))
    assert flat.mean(0).abs().max() < 4 * standard_error
    gap = flat.T @ flat / len(flat) - torch.eye(3, dtype=torch.float64)
    assert gap.abs().max() < 4 * math.sqrt(2) * standard_error
    # two directions of one row are independent
    assert (v[0].double() * v[1].double()).mean(0).abs().max() < 4 * math.sqrt(2) * standard_error
    fourth = flat.pow(4).mean().item()
    assert fourth == pytest.approx(1.0 if projection == "rademacher" else 3.0, abs=0.1)


def test_directions_have_their_axis_before_the_rows(rng):
    assert draw_directions(torch.zeros(4, 7, 2), rng).shape == (4, 1, 7, 2)
    assert draw_directions(torch.zeros(4, 7, 2), rng, 5).shape == (4, 5, 7, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_directions_on_the_device_of_the_rows():
    z = torch.zeros(4, 7, 2, device="cuda")
    assert draw_directions(z, torch.Generator("cuda").manual_seed(0)).device == z.device


# ---------------------------------------------------------------------- denoising


def test_denoising_loss_is_the_formula(rng):
    z, noise = randn(2, 20, 3, rng=rng), randn(2, 20, 3, rng=rng)
    sigma = 0.1 + torch.rand(20, 1, generator=rng, dtype=torch.float64)
    noisy = z + sigma * noise
    for base in (None, BASE.score(noisy)):
        score = wave_gradient(noisy) if base is None else wave_gradient(noisy) + base
        # Vincent: regress on the score of the noise, -(noisy - z) / sigma^2; times sigma^2
        target = -(noisy - z) / sigma**2
        expected = 0.5 * sigma[:, 0] ** 2 * (score - target).square().sum(-1)
        actual = denoising_score_matching_losses(wave, noisy, noise, sigma, base)
        assert actual.shape == (2, 20)
        torch.testing.assert_close(actual, expected, **CLOSE)
        same = denoising_score_matching_losses(wave, noisy, noise, tensor(0.3), base)
        level = torch.full((20, 1), 0.3, dtype=torch.float64)
        torch.testing.assert_close(
            same, denoising_score_matching_losses(wave, noisy, noise, level, base), **CLOSE
        )


def without_f(noise, sigma, base):
    return 0.5 * (noise if base is None else sigma * base + noise).square().sum(-1)


@pytest.mark.parametrize("with_base", [True, False])
def test_denoising_tends_to_the_exact_loss(with_base, rng):
    """Expected over the noise (quadrature), the error falls with the square of sigma."""
    z = randn(10, 1, 3, rng=rng)
    unit, weight = hermite(14, 3)
    exact = score_matching_losses(wave, z[:, 0], BASE.score(z[:, 0]) if with_base else None)

    def error(sigma):
        noisy = z + sigma * unit
        noise, base = unit.expand_as(noisy), BASE.score(noisy) if with_base else None
        loss = denoising_score_matching_losses(wave, noisy, noise, tensor(sigma), base)
        ours = ((loss - without_f(noise, sigma, base)) / sigma**2) @ weight
        return (ours - exact).norm().item()

    coarse, fine, finest = error(0.1), error(0.05), error(0.025)
    assert coarse / fine == pytest.approx(4.0, rel=0.1)
    assert fine / finest == pytest.approx(4.0, rel=0.05)
    assert finest < 0.02 * exact.norm().item()


def test_antithetic_noise_takes_the_noise_out_of_small_sigma(rng):
    """A pair tends to v' H v of its noise; a single draw has a term of order 1 / sigma."""
    z, noise = randn(500, 3, rng=rng), randn(500, 3, rng=rng)
    base = BASE.score(z)  # constant on the scale of the noise
    hutchinson = sliced_score_matching_losses(wave, z, noise[None], base)

    def pair(sigma):
        sides = []
        for side in (noise, -noise):
            loss = denoising_score_matching_losses(
                wave, z + sigma * side, side, tensor(sigma), base
            )
            sides.append((loss - without_f(side, sigma, base)) / sigma**2)
        return sides[0], 0.5 * (sides[0] + sides[1])

    errors = []
    for sigma in (0.1, 0.01, 0.001):
        single, both = pair(sigma)
        errors.append((both - hutchinson).abs().mean())
        assert single.std() > 0.5 / sigma
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]
    assert errors[2] < 1e-4


def noisy_nodes(law, sigma):
    """Joint quadrature of rows and noise."""
    x, weight = law.nodes()
    unit, share = bell()
    noise = unit.expand(len(x), -1)
    noisy = x + sigma * noise
    flat = (weight[:, None] * share).flatten()
    return noisy.reshape(-1, 1), noise.reshape(-1, 1), flat


@pytest.mark.parametrize("sigma", [0.1, 0.7])
def test_without_correction_denoising_finds_the_smoothed_law(sigma):
    mean, variance = 0.5, 0.64
    noisy, noise, weight = noisy_nodes(Mixture([1.0], [mean], [variance]), sigma)
    wide = variance + sigma**2
    theta = tensor([1 / wide, mean / wide]).requires_grad_()

    def energy(z):
        return (-0.5 * theta[0] * z.square() + theta[1] * z).sum(-1)

    losses = denoising_score_matching_losses(energy, noisy, noise, tensor(sigma))
    gradient, curvature = minimum(weight @ losses, theta)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    assert curvature > 0.1 * sigma**2
    # and not at the law itself
    with torch.no_grad():
        theta.copy_(tensor([1 / variance, mean / variance]))
    losses = denoising_score_matching_losses(energy, noisy, noise, tensor(sigma))
    (gradient,) = torch.autograd.grad(weight @ losses, theta)
    assert gradient.norm() > 0.5 * sigma**4


@pytest.mark.parametrize("sigma", [0.2, 0.6])
def test_smoothed_base_score_takes_the_bias_out(sigma):
    """Where base and data are one law, f = 0 is the minimum, and only against the smoothed base."""
    law = Mixture([0.4, 0.6], [-1.5, 1.0], [0.3, 0.6])
    noisy, noise, weight = noisy_nodes(law, sigma)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def tilt(z):
        features = torch.cat([z, z.square(), torch.sin(2 * z), torch.cos(2 * z)], dim=-1)
        return features @ theta

    def gradient(base):
        losses = denoising_score_matching_losses(tilt, noisy, noise, tensor(sigma), base)
        return minimum(weight @ losses, theta)

    smooth, curvature = gradient(law.smoothed(sigma).score(noisy))
    torch.testing.assert_close(smooth, torch.zeros_like(smooth), rtol=0, atol=1e-9)
    assert curvature > 0
    sharp, _ = gradient(law.score(noisy))
    assert sharp.norm() > 0.5 * sigma**4
    assert sharp[1] < 0  # downhill is a wider law


# ---------------------------------------------------------------------- stacks of members


def network(rng, n_members=3, d=2):
    stack = MLPEnergy(
        d, n_members, hidden_layer_sizes=(8, 6), rng=rng,
        embedding=PeriodicEmbedding(d, n_members, rng=rng),
    ).double()  # fmt: skip
    with torch.no_grad():  # away from zero, where the inner layers have no gradient
        for parameter in stack.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=rng)
    return stack


def exact(energy, z, base, rng):
    return score_matching_losses(energy, z, base)


def sliced(energy, z, base, rng):
    return sliced_score_matching_losses(energy, z, draw_directions(z, rng, 2), base)


def general(energy, z, base, rng):
    v = draw_directions(z, rng, 2)
    return sliced_score_matching_losses(energy, z, v, base, variance_reduced=False)


def denoising(energy, z, base, rng):
    noise = torch.randn(z.shape, generator=rng, dtype=z.dtype)
    return denoising_score_matching_losses(energy, z, noise, tensor(0.3), base)


every_loss = pytest.mark.parametrize("loss", [exact, sliced, general, denoising])


@every_loss
@pytest.mark.parametrize("with_base", [True, False])
def test_gradient_reaches_every_parameter(loss, with_base, rng):
    stack = network(rng)
    z = randn(3, 30, 2, rng=rng)
    losses = loss(stack, z, z.flip(0) if with_base else None, rng)
    assert losses.shape == (3, 30)
    assert losses.dtype == torch.float64
    losses.mean(1).sum().backward()
    for name, parameter in stack.named_parameters():
        rows = parameter.grad.flatten(1).abs().sum(1)
        assert (rows > 0).all(), name


@every_loss
def test_members_do_not_mix(loss, rng):
    stack = network(rng)
    z, base = randn(3, 30, 2, rng=rng), randn(3, 30, 2, rng=rng)
    together = loss(stack, z, base, torch.Generator().manual_seed(1))
    together[1].sum().backward()
    for name, parameter in stack.named_parameters():
        rows = parameter.grad.flatten(1).abs().sum(1) > 0
        assert rows.tolist() == [False, True, False], name
    # members 0 and 2 see other rows: the loss of member 1 is what it was
    other, other_base = z.clone(), base.clone()
    other[[0, 2]] += 1.0
    other_base[[0, 2]] -= 1.0
    again = loss(stack, other, other_base, torch.Generator().manual_seed(1))
    torch.testing.assert_close(again[1], together[1])
    assert not torch.isclose(again[[0, 2]], together[[0, 2]]).all()


def test_member_alone_has_the_loss_it_has_in_the_stack(rng):
    stack = network(rng)
    z, base = randn(3, 12, 2, rng=rng), randn(3, 12, 2, rng=rng)
    v = draw_directions(z, rng, 2)
    noise, sigma = randn(3, 12, 2, rng=rng), tensor(0.2)
    together = [
        score_matching_losses(stack, z, base),
        sliced_score_matching_losses(stack, z, v, base),
        denoising_score_matching_losses(stack, z, noise, sigma, base),
    ]
    for k in range(3):
        member = stack.member(k)
        alone = [
            score_matching_losses(member, z[k], base[k]),
            sliced_score_matching_losses(member, z[k], v[k], base[k]),
            denoising_score_matching_losses(member, z[k], noise[k], sigma, base[k]),
        ]
        for one, all_ in zip(alone, together, strict=True):
            assert one.shape == (12,)
            torch.testing.assert_close(one, all_[k])
    # literally, row by row
    row = z[1, 4].clone().requires_grad_()
    member = stack.member(1)
    hessian = torch.autograd.functional.hessian(lambda r: member(r[None])[0], row)
    (gradient,) = torch.autograd.grad(member(row[None])[0], row)
    expected = 0.5 * gradient @ gradient + gradient @ base[1, 4] + np.trace(hessian.numpy())
    torch.testing.assert_close(together[0][1, 4], expected, rtol=1e-7, atol=1e-7)
