"""The lowest of several views against literal formulas and quadrature."""

import numpy as np
import pytest
import torch

from skebm._layout import Layout
from skebm.bases import ArcsinhTransform, GaussianMixtureBase, StackedBase, TransformedBase
from skebm.models import CommonScale, LowestView

KNOTS = torch.tensor([[-6.0, -3.0, -1.0], [-9.0, -2.0, -1.5]]).double()
VALUES = torch.tensor([-5.0, -2.0, 0.0]).double()
SIDE = torch.linspace(-30.0, 30.0, 60_001).double()[:, None]


def gaussian(mean, std):
    return GaussianMixtureBase([1.0], [[mean]], [[[std**2]]])


def model(density=None):
    """Two members of a plain view and one of arcsinh(x)."""
    bases = [
        StackedBase(
            [gaussian(k, 1.0), TransformedBase(ArcsinhTransform(), gaussian(0.0, 0.8 + k))],
            [0.7, 0.3],
        )
        for k in range(2)
    ]
    own = [False, density is None]
    return LowestView(bases, own, Layout((), (), 1), density, CommonScale(KNOTS, VALUES))


def test_a_common_scale_is_piecewise_linear_and_goes_on_with_slope_one():
    x = np.random.default_rng(0).uniform(-20.0, 5.0, (3, 50, 2))
    for v in range(2):
        low, high = KNOTS[v, 0].item(), KNOTS[v, -1].item()
        inside = np.interp(x[..., v], KNOTS[v].numpy(), VALUES.numpy())
        expected = inside + np.minimum(x[..., v] - low, 0.0) + np.maximum(x[..., v] - high, 0.0)
        found = CommonScale(KNOTS, VALUES)(torch.as_tensor(x))[..., v]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_common_scale_has_gradients():
    x = torch.as_tensor(np.random.default_rng(1).uniform(-12.0, 1.0, (20, 2))).requires_grad_(True)
    assert torch.autograd.gradcheck(CommonScale(KNOTS, VALUES), x)


def literal(x):
    """f of both members, (2, n)."""
    scale, z = CommonScale(KNOTS, VALUES), x.arcsinh()
    return torch.stack(
        [
            # the second view is a density of arcsinh(x), and not of x
            torch.minimum(*scale(
                torch.stack([gaussian(k, 1.0).log_prob(x), gaussian(0.0, 0.8 + k).log_prob(z)], 1)
            ).unbind(1))
            for k in range(2)
        ]
    )  # fmt: skip


def test_members_are_the_lowest_view():
    torch.testing.assert_close(model().log_members(SIDE), literal(SIDE))
    single = model().member(1)
    torch.testing.assert_close(single.log_members(SIDE)[0], literal(SIDE)[1])


def test_tilts_belong_to_the_mixture_of_the_views():
    lowest = model()
    base = torch.stack([q.log_prob(SIDE) for q in lowest.bases])
    tilt = lowest.tilt(SIDE.expand(2, *SIDE.shape))
    torch.testing.assert_close(base + tilt, literal(SIDE))


def test_log_z_by_importance_against_quadrature():
    lowest = model()
    rngs = [torch.Generator().manual_seed(k) for k in range(2)]
    _, log_weights = lowest.draw(200_000, rngs)
    found = log_weights.logsumexp(1) - np.log(200_000)
    exact = (literal(SIDE).exp().sum(1) * (SIDE[1] - SIDE[0])).log()
    np.testing.assert_allclose(found, exact, atol=0.01)
    lowest.log_partition = exact
    mass = lowest.log_prob(SIDE).exp().sum().item() * (SIDE[1] - SIDE[0]).item()
    assert mass == pytest.approx(1.0, abs=1e-6)


def test_scores_of_views_are_means_over_members():
    lowest = model()
    lowest.log_partition = torch.tensor([0.3, -0.5]).double()
    scores = lowest.view_scores(SIDE)
    views = [lowest.scale(lowest.view_log_probs(k, SIDE)[0]) for k in range(2)]
    expected = (views[0] - 0.3 + views[1] + 0.5) / 2
    torch.testing.assert_close(scores, expected)


def test_another_density_takes_the_place_of_the_last_component():
    class Density(torch.nn.Module):
        def log_member(self, k, x):
            return -x[:, 0].abs() - k

        def member(self, k):
            return self

    lowest = model(density=Density())
    logs, mixture = lowest.view_log_probs(1, SIDE)
    torch.testing.assert_close(logs[:, 1], -SIDE[:, 0].abs() - 1)
    torch.testing.assert_close(mixture, lowest.bases[1].log_prob(SIDE))
