"""Rows completed cell by cell, beside conditionals in closed form."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from skebm._layout import Cell, Layout
from skebm.bases import AffineTransform, GaussianMixtureBase, MixedMixtureBase
from skebm.models import Conditioner, FeatureMap, Sweeps, TiltedMixture

MEANS = [np.array([0.0, -0.5, 0.2]), np.array([0.3, 1.0, -0.4])]
COVARIANCE = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.8]])
TILT = np.array([[0.3, 0.0, 0.2], [0.0, 0.4, -0.5], [0.2, -0.5, 0.6]])


class Quadratic(nn.Module):
    """-z' A z / 2 of every member, (K, n, d) -> (K, n)."""

    def forward(self, z):
        return -0.5 * torch.einsum("kni,ij,knj->kn", z, torch.as_tensor(TILT), z)

    def member(self, k):
        return self


def tilted_gaussians():
    """Two Gaussians with quadratic tilts, and the means and the covariance of what they become."""
    bases = [GaussianMixtureBase([1.0], mean[None], COVARIANCE[None]) for mean in MEANS]
    identity = FeatureMap(AffineTransform(torch.zeros(3), torch.ones(3)))
    model = TiltedMixture(bases, bases, identity, Quadratic())
    precision = np.linalg.inv(COVARIANCE)
    covariance = np.linalg.inv(precision + TILT)
    means = [covariance @ precision @ mean for mean in MEANS]
    at_zero = torch.zeros(1, 3, dtype=torch.float64)
    unnormalised = model.log_members(at_zero).squeeze(1)
    exact = [stats.multivariate_normal(mean, covariance).logpdf(np.zeros(3)) for mean in means]
    model.log_partition = unnormalised - torch.as_tensor(exact)
    return model, means, covariance


def swept(model, layout, x, known, cells, n_sweeps=8):
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sweeps = Sweeps(Conditioner.of(model, layout, 0))
        x = sweeps.start(x, known, cells, rng)
        for _ in range(n_sweeps):
            x, turns = sweeps.sweep(x, known, cells, rng)
    return x, turns


def test_open_numbers_follow_the_conditional_of_a_tilted_mixture():
    model, means, covariance = tilted_gaussians()
    n, given = 4_000, 0.7
    x = torch.full((n, 3), given, dtype=torch.float64)
    known = torch.tensor([True, False, False]).expand(n, 3)
    cells = [Cell(value=j) for j in range(3)]
    x, turns = swept(model, Layout([], [], 3), x, known, cells)
    assert (x[:, 0] == given).all()
    drawn = x[:, 1:].numpy()
    slope = covariance[1:, 0] / covariance[0, 0]
    inner = covariance[1:, 1:] - np.outer(slope, covariance[0, 1:])
    share = np.array([stats.norm(m[0], covariance[0, 0] ** 0.5).pdf(given) for m in means])
    share /= share.sum()
    centers = [m[1:] + slope * (given - m[0]) for m in means]
    for direction in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]):
        along, scale = np.array(direction), np.sqrt(direction @ inner @ direction)
        pit = sum(w * stats.norm(c @ along, scale).cdf(drawn @ along)
                  for w, c in zip(share, centers, strict=True))  # fmt: skip
        assert stats.kstest(pit, "uniform").pvalue > 1e-3
    # what was proposed has the same mean, with its weights
    own = [turn for turn in turns if turn.cell.value == 2]
    mean = torch.cat([(turn.weights * turn.x[..., 2]).sum(1) for turn in own]).mean().item()
    truth = sum(w * c[1] for w, c in zip(share, centers, strict=True))
    assert mean == pytest.approx(truth, abs=4 * np.sqrt(inner[1, 1] / n))


def test_no_cell_stays_missing_however_rare_others_are():
    """One of 200 rows shows the number or the first category; their shares are the conditional."""
    layout = Layout([3, 2], [-1, 0], 1)  # two categories or missing, and a number or missing
    masses = [[[0.003, 0.002, 0.995], [0.001, 0.004, 0.995]], [[0.005, 0.995], [0.01, 0.99]]]

    def doubles(values):
        return torch.tensor(values, dtype=torch.float64)

    base = MixedMixtureBase(
        layout, doubles([0.4, 0.6]), [doubles(m) for m in masses], doubles([[-1.0], [2.0]]),
        doubles([[[1.0]], [[0.5]]]),
    )  # fmt: skip
    model = TiltedMixture([base], [base], FeatureMap(nn.Identity()), None)
    n = 3_000
    x = torch.full((n, 3), torch.nan, dtype=torch.float64)
    known = torch.zeros(n, 3, dtype=torch.bool)
    cells = [Cell(state=0, n_states=3, missing=2), Cell(1, 2, 2, missing=1)]
    x, _ = swept(model, layout, x, known, cells)
    assert (x[:, 1] == 0).all()
    assert not x[:, 2].isnan().any()
    # p(category, number | both are there)
    joint = np.array([0.4, 0.6])[:, None] * np.array(masses[0])[:, :2]
    joint *= np.array(masses[1])[:, :1]
    joint /= joint.sum()
    first = (x[:, 0] == 0).double().mean().item()
    assert first == pytest.approx(joint[:, 0].sum(), abs=4 * np.sqrt(0.25 / n))
    component = joint.sum(1)
    drawn = x[:, 2].numpy()
    pit = component[0] * stats.norm(-1, 1).cdf(drawn)
    pit += component[1] * stats.norm(2, 0.5**0.5).cdf(drawn)
    assert stats.kstest(pit, "uniform").pvalue > 1e-3
