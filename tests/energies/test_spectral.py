import pytest
import torch
from torch import nn

from skebm.energies import MLPEnergy, ModuleStack, PeriodicEmbedding, SpectralBound


def norms(energy):
    """Largest singular values of all weights, by SVD."""
    found = {}
    for name, parameter in energy.named_parameters():
        if name.endswith(("weight", "output")) and parameter.ndim > 1:
            stacked = isinstance(energy, MLPEnergy)
            matrix = parameter if stacked else parameter.flatten(1)
            found[name] = torch.linalg.matrix_norm(matrix.detach(), ord=2)
    return found


def network(n_features):
    return nn.Sequential(
        nn.Unflatten(1, (1, n_features)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.SiLU(),
        nn.LayerNorm(4 * (n_features - 2)), nn.Linear(4 * (n_features - 2), 1),
    )  # fmt: skip


def stack(kind, n_members=2):
    g = torch.Generator().manual_seed(0)
    if kind == "mlp":
        return MLPEnergy(
            5, n_members, hidden_layer_sizes=(16, 8),
            embedding=PeriodicEmbedding(5, n_members, generator=g), generator=g,
        )  # fmt: skip
    return ModuleStack(network, 5, n_members)


@pytest.mark.parametrize("kind", ["mlp", "module"])
def test_largest_singular_values_keep_to_the_bound(kind):
    energy = stack(kind)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = norms(energy)
    others = {n: p.clone() for n, p in energy.named_parameters() if n not in before}
    assert len(before) == (3 if kind == "mlp" else 4)
    bound = 1.1 * min(value.min().item() for value in before.values())
    constraint = SpectralBound(energy, bound)
    for _ in range(200):
        constraint.apply()
    for name, value in norms(energy).items():
        # those within the bound, of either member, are let alone
        torch.testing.assert_close(value, before[name].clamp_max(bound), rtol=1e-4, atol=0)
    for name, value in others.items():
        assert torch.equal(value, dict(energy.named_parameters())[name])


def test_members_are_bounded_one_by_one():
    energy = stack("mlp")
    with torch.no_grad():
        energy.output[0] = 3.0
        energy.output[1] = 0.01
    SpectralBound(energy, 1.0).apply()
    assert energy.output[0].norm().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(energy.output[1].detach(), torch.full((8, 1), 0.01))


def test_the_bound_is_kept_up_in_training():
    energy = stack("mlp")
    constraint = SpectralBound(energy, 0.5)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-2)
    z = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(100):
        optimizer.zero_grad()
        (-energy(z) * z[..., 0]).mean().backward()
        optimizer.step()
        constraint.apply()
    assert max(value.max().item() for value in norms(energy).values()) < 0.5 * 1.01
    with torch.no_grad():
        assert energy(z).std() > 0.01  # something was learned
