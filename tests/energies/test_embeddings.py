import math

import numpy as np
import pytest
import torch

from skebm.energies import PeriodicEmbedding, PiecewiseLinearEmbedding


@pytest.mark.parametrize("n_bins", [1, 2, 5])
def test_piecewise_linear_is_the_published_formula(n_bins):
    rng = np.random.default_rng(0)
    training = rng.normal(size=(2, 40, 3))
    z = 2 * rng.normal(size=(2, 11, 3))
    expected = np.empty((2, 11, 3, n_bins))
    for k, i, j, t in np.ndindex(expected.shape):
        edges = np.quantile(training[k, :, j], np.linspace(0, 1, n_bins + 1))
        value = (z[k, i, j] - edges[t]) / (edges[t + 1] - edges[t])
        if t > 0:
            value = max(value, 0.0)
        if t < n_bins - 1:
            value = min(value, 1.0)
        expected[k, i, j, t] = value
    embedding = PiecewiseLinearEmbedding(list(torch.from_numpy(training)), n_bins).double()
    encoded = embedding(torch.from_numpy(z))
    assert encoded.shape == (2, 11, embedding.n_outputs)
    np.testing.assert_allclose(encoded.numpy(), expected.reshape(2, 11, -1), rtol=1e-5, atol=1e-5)


def test_piecewise_linear_survives_ties_and_members_of_different_length():
    rng = torch.Generator().manual_seed(0)
    members = [torch.randn(n, 2, generator=rng) for n in (30, 31)]
    members[0][:, 1] = 0.5  # one value only
    encoded = PiecewiseLinearEmbedding(members, 8)(torch.randn(2, 9, 2, generator=rng))
    assert encoded.isfinite().all()


def test_periodic_is_sine_and_cosine_of_each_column():
    rng = torch.Generator().manual_seed(0)
    embedding = PeriodicEmbedding(3, 2, n_frequencies=4, sigma=0.5, rng=rng)
    z = torch.randn(2, 7, 3, generator=rng)
    c = embedding.frequencies.detach().numpy()[:, 0]
    phase = 2 * math.pi * np.einsum("kjm,kij->kijm", c, z.numpy()).reshape(2, 7, 12)
    expected = np.concatenate([np.sin(phase), np.cos(phase)], -1)
    assert embedding.n_outputs == expected.shape[-1]
    np.testing.assert_allclose(embedding(z).detach().numpy(), expected, atol=1e-5)
