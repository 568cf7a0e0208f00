"""The variational bound against Gaussian integrals, the gradient penalty against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from skebm.energies import MLPEnergy
from skebm.objectives import gradient_penalties, variational_bound_terms

# base N(0, 1), tilt f(x) = a x - b x^2 / 2: the model is N(a / (1 + b), 1 / (1 + b))
A, B = 0.7, 0.5
BASE = Normal(0.0, 1.0)
MODEL = Normal(A / (1 + B), (1 + B) ** -0.5)
LOG_Z = 0.5 * A**2 / (1 + B) - 0.5 * math.log(1 + B)


def tilt(x):
    return A * x - 0.5 * B * x.square()


def quadrature(law, n=20_001):
    """Nodes that hold the mass of a normal law, and their probabilities."""
    x = torch.linspace(-12.0, 12.0, n, dtype=torch.float64)
    return x, law.log_prob(x).exp() * (x[1] - x[0])


def terms(law, x):
    return variational_bound_terms(tilt(x), BASE.log_prob(x), law.log_prob(x))


# ---------------------------------------------------------------------- bound


def test_bound_is_log_z_at_every_sample_where_the_generator_is_the_model():
    x = torch.linspace(-5.0, 5.0, 11, dtype=torch.float64)
    values = terms(MODEL, x)
    torch.testing.assert_close(values, torch.full_like(values, LOG_Z), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.5, 0.8), (-1.0, 0.3), (0.4, 1.5)])
def test_gap_is_the_divergence_from_the_generator_to_the_model(mean, scale):
    law = Normal(mean, scale)
    x, mass = quadrature(law)
    bound = (mass * terms(law, x)).sum().item()
    assert bound < LOG_Z
    assert LOG_Z - bound == pytest.approx(kl_divergence(law, MODEL).item(), abs=1e-5)


def test_too_large_a_density_of_the_generator_lowers_the_bound():
    x, mass = quadrature(MODEL)
    lowered = variational_bound_terms(tilt(x), BASE.log_prob(x), MODEL.log_prob(x) + 0.3)
    assert (mass * lowered).sum().item() == pytest.approx(LOG_Z - 0.3, abs=1e-6)


def test_gradient_in_the_generator_is_minus_that_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(200_000, dtype=torch.float64, generator=generator)
    law = Normal(mean, log_scale.exp())
    terms(law, mean + log_scale.exp() * noise).mean().backward()
    m, s = (p.detach().clone().requires_grad_(True) for p in (mean, log_scale))
    expected = torch.autograd.grad(-kl_divergence(Normal(m, s.exp()), MODEL), (m, s))
    assert mean.grad.item() == pytest.approx(expected[0].item(), abs=0.02)
    assert log_scale.grad.item() == pytest.approx(expected[1].item(), abs=0.02)


def test_terms_keep_the_shape_of_members():
    f, log_base, log_generator = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    values = variational_bound_terms(f, log_base, log_generator)
    assert values.shape == (2, 5)
    torch.testing.assert_close(values, f + log_base - log_generator)


# ---------------------------------------------------------------------- penalty


def test_penalty_of_a_quadratic_in_closed_form():
    matrix = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def energy(points):
        return 0.5 * ((points @ matrix) * points).sum(-1)

    symmetric = 0.5 * (matrix + matrix.T)
    expected = (z @ symmetric).square().sum(-1)
    f, values = gradient_penalties(energy, z)
    torch.testing.assert_close(f, energy(z))
    torch.testing.assert_close(values, expected)
    # and its gradient in the parameters
    (gradient,) = torch.autograd.grad(values.sum(), matrix, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), matrix)[0])
    # the rows are data: none goes there
    assert not z.requires_grad
    assert z.grad is None


def test_penalty_of_a_network_agrees_with_differences():
    generator = torch.Generator().manual_seed(0)
    energy = MLPEnergy(2, 3, hidden_layer_sizes=(8,), rng=generator).double()
    for parameter in energy.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    z = torch.randn(3, 6, 2, dtype=torch.float64, generator=generator)
    values, step = gradient_penalties(energy, z)[1], 1e-5
    assert values.shape == (3, 6)
    slopes = [
        (energy(z + step * axis) - energy(z - step * axis)) / (2 * step)
        for axis in torch.eye(2, dtype=torch.float64)
    ]
    torch.testing.assert_close(values, sum(s.square() for s in slopes), atol=1e-6, rtol=1e-5)
    # the gradient in a parameter, against the difference of penalties
    weight = max(energy.parameters(), key=torch.numel)
    (gradient,) = torch.autograd.grad(values.sum(), weight, allow_unused=True)
    direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    totals = []
    for sign in (1.0, -1.0):
        weight.data += sign * step * direction
        totals.append(gradient_penalties(energy, z)[1].sum().item())
        weight.data -= sign * step * direction
    slope = (totals[0] - totals[1]) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_values_lead_back_to_the_rows_and_penalties_to_the_parameters_alone():
    z = torch.ones(3, 2, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)

    def energy(points):
        return scale * points.square().sum(-1)

    f, values = gradient_penalties(energy, 3.0 * z)
    torch.testing.assert_close(values.detach(), torch.full((3,), 2 * (2 * 2 * 3.0) ** 2))
    values.sum().backward(retain_graph=True)
    assert z.grad is None
    assert scale.grad is not None
    scale.grad = None
    f.sum().backward()
    expected = torch.autograd.grad(energy(3.0 * z).sum(), (z, scale))
    torch.testing.assert_close((z.grad, scale.grad), expected)
