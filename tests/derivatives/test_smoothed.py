import math

import numpy as np
import pytest
import torch

from skebm.derivatives import smoothed_score


def normal(x):
    return -0.5 * x.square().sum(1)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("h", [0.1, 0.5])
def test_score_of_a_smoothed_normal_distribution(d, h):
    x = torch.randn(200, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.full((d,), h, dtype=torch.float64)
    expected = -x / (1 + h**2)  # N(0, 1) convolved with N(0, h^2)
    found = smoothed_score(normal, x, scale, n_points=256)
    # more columns need more points
    tolerance = 0.02 if d < 3 else 0.04
    assert (found - expected).square().mean() < tolerance**2 * expected.square().mean()


def test_steps_have_the_score_of_their_smoothed_edge():
    # from 2.4 standard deviations of the noise before the step, where few points are beyond it
    x = torch.linspace(-1.2, 1.5, 28, dtype=torch.float64)[:, None]
    scale = torch.tensor([0.5], dtype=torch.float64)
    found = smoothed_score(lambda x: 2.0 * (x[:, 0] > 0).to(x), x, scale, n_points=1024)[:, 0]
    # p = 1 + (e^2 - 1) 1[x > 0], smoothed: 1 + (e^2 - 1) Phi(x / .5)
    jump, t = math.expm1(2.0), x[:, 0] / 0.5
    density = torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi) / 0.5
    expected = jump * density / (1 + jump * torch.special.ndtr(t))
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_same_points_at_every_call_and_a_scale_for_every_column():
    x = torch.zeros(3, 2, dtype=torch.float64) + torch.tensor([1.0, 2.0])
    scale = torch.tensor([0.1, 0.6], dtype=torch.float64)
    first, second = (smoothed_score(normal, x, scale, n_points=1024) for _ in range(2))
    assert torch.equal(first, second)
    np.testing.assert_allclose(first[0], [-1 / 1.01, -2 / 1.36], rtol=0.05)
