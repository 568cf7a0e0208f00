import pytest
import torch
from torch import nn

from skebm.derivatives import value_and_gradient
from skebm.energies import MLPEnergy, PeriodicEmbedding


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack(n_members):
    rng = torch.Generator().manual_seed(0)
    embedding = PeriodicEmbedding(2, n_members, n_frequencies=5, rng=rng)
    energy = MLPEnergy(2, n_members, embedding=embedding, rng=rng).double()
    with torch.no_grad():
        energy.output.copy_(normal(*energy.output.shape))
    return energy


def test_closed_form():
    z, A = normal(20, 3), normal(3, 3, seed=1)
    value, gradient = value_and_gradient(lambda z: torch.einsum("ni,ij,nj->n", z, A, z).sin(), z)
    square = torch.einsum("ni,ij,nj->n", z, A, z)
    torch.testing.assert_close(value, square.sin())
    torch.testing.assert_close(gradient, square.cos()[:, None] * (z @ (A + A.T)))


@pytest.mark.parametrize("shape", [(3, 7, 2), (1, 7, 2), (7, 2)])
def test_stacks_by_central_differences(shape):
    energy, z, h = stack(shape[0] if len(shape) == 3 else 1), normal(*shape), 1e-6
    value, gradient = value_and_gradient(energy, z)
    torch.testing.assert_close(value, energy(z).detach())
    for j in range(2):
        step = h * torch.eye(2, dtype=z.dtype)[j]
        difference = (energy(z + step) - energy(z - step)).detach() / (2 * h)
        torch.testing.assert_close(gradient[..., j], difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_leaves_no_graph_and_no_gradients(mode):
    energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    z = normal(5, 3).requires_grad_()
    with mode():
        value, gradient = value_and_gradient(energy, z)
    assert value.shape == (5,)
    assert gradient.shape == (5, 3)
    assert not value.requires_grad
    assert not gradient.requires_grad
    assert z.grad is None
    assert all(p.grad is None for p in energy.parameters())
