"""Classifiers that correct energies: the noise is then the tilted base."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from skebm.bases import AffineTransform, GaussianMixtureBase
from skebm.estimators._classifiers import (
    CorrectedEnergy,
    MemberEnergies,
    _noise,
    boosting_settings,
    train_classifiers,
)
from skebm.estimators._members import Members, Trained, make_splits
from skebm.estimators._model import FeatureMap
from skebm.estimators._progress import Progress

WEIGHT = torch.tensor([1.0], dtype=torch.float64)


class Linear(nn.Module):
    """a z - a^2 / 2 in one column, summed over columns: tilts N(0, I) to N(a, I)."""

    def __init__(self, slopes):
        super().__init__()
        self.slopes = slopes

    def forward(self, z):
        slopes = torch.tensor(self.slopes, dtype=z.dtype)[:, None, None]
        return (slopes * z - 0.5 * slopes.square()).sum(-1)

    def member(self, k):
        return Linear(self.slopes[k : k + 1])


def members(mean=0.0, n=2000, d=1, n_members=2, seed=0):
    """Rows of N(mean, I), bases N(0, I)."""
    x = torch.as_tensor(np.random.default_rng(seed).normal(mean, 1.0, (n, d)))
    generator = torch.Generator().manual_seed(seed)
    base = GaussianMixtureBase(WEIGHT, torch.zeros(1, d), torch.eye(d).double()[None])
    bases = [base] * n_members
    return Members(
        x, torch.ones(n, dtype=torch.float64), make_splits(n, n_members, 0.1, generator),
        bases, bases, FeatureMap(AffineTransform(torch.zeros(d), torch.ones(d))), generator,
    )  # fmt: skip


def trained(m, energy):
    held = [energy.member(k)(m.z[rows][None])[0] for k, (_, rows) in enumerate(m.splits)]
    history = {"n_iter": np.array([0, 7]), "gain": np.zeros(2)}
    return Trained(energy, held, energy(m.pool_z), 7, history)


def boost(m, start=None, **options):
    settings = boosting_settings(len(m.x)) | {"max_iter": 60} | options
    return train_classifiers(
        m, "boosting", **settings, early_stopping=True, seed=0, progress=Progress(0), start=start
    )


@pytest.mark.parametrize(("k", "slope"), [(0, 1.0), (1, -0.5)])
def test_noise_of_a_start_is_the_tilted_base(k, slope):
    m = members()
    noise = _noise(m, k, 20_000, trained(m, Linear([1.0, -0.5])))[:, 0].numpy()
    assert noise.shape == (20_000,)
    # copies of rows that weigh much: the distance is that of some 20,000 independent draws, twice
    assert stats.ks_1samp(noise, stats.norm(slope, 1.0).cdf).statistic < 0.02


def test_trees_find_nothing_to_correct_in_the_right_energy():
    m = members(mean=1.0)
    start = trained(m, Linear([1.0, 1.0]))
    found = boost(m, start)
    before, after = (m.mean_gain(t.held, t.pool).item() for t in (start, found))
    assert before == pytest.approx(0.5, abs=0.06)  # KL(N(1, 1) || N(0, 1))
    assert before - 1e-9 <= after < before + 0.01


@pytest.mark.parametrize("slope", [0.3, 1.6])
def test_trees_correct_a_wrong_energy(slope):
    m = members(mean=1.0, n=4000)
    start = trained(m, Linear([slope, slope]))
    found = boost(m, start)
    assert isinstance(found.energy, CorrectedEnergy)
    assert found.n_iter > 0
    before, after = (m.mean_gain(t.held, t.pool).item() for t in (start, found))
    missing = 0.5 * (1.0 - slope) ** 2
    assert after > before + 0.8 * missing
    # f is what it says, at rows and pool, whole and member by member
    z = torch.linspace(-1.0, 3.0, 50, dtype=torch.float64)[:, None].expand(2, -1, -1)
    whole = found.energy(z)
    for k, (_, rows) in enumerate(m.splits):
        torch.testing.assert_close(found.energy.member(k)(z[k : k + 1])[0], whole[k])
        torch.testing.assert_close(found.held[k], found.energy.member(k)(m.z[rows][None])[0])
    torch.testing.assert_close(found.pool, found.energy(m.pool_z))
    # and near the log-ratio of the laws, z - 1/2
    assert (whole - (z[..., 0] - 0.5)).std() < 0.35
    # a constant would show in the integral: the noise was the start, normalised
    log_z = m.log_partition(found.pool) - m.log_partition(start.pool)
    error = ((1 / m.ess(found.pool) + 1 / m.ess(start.pool)) / m.pool.shape[1]).sqrt()
    assert error.max() < 0.06
    assert (log_z.abs() < 4.0 * error).all()


def test_history_begins_with_the_start():
    m = members(mean=1.0)
    start = trained(m, Linear([0.5, 0.5]))
    found = boost(m, start)
    assert found.history["n_iter"][0] == 0
    assert found.history["gain"][0] == pytest.approx(m.mean_gain(start.held, start.pool).item())
    assert found.history["gain"].max() == pytest.approx(
        m.mean_gain(found.held, found.pool).item(), abs=0.02  # the softness is chosen afterwards
    )  # fmt: skip


def test_without_a_start_the_noise_is_the_base():
    m = members(mean=1.0)
    found = boost(m)
    assert isinstance(found.energy, MemberEnergies)
    assert m.mean_gain(found.held, found.pool).item() == pytest.approx(0.45, abs=0.1)
    noise = _noise(members(), 0, 20_000, Trained.nothing(m))[:, 0].numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_softness_of_a_correction_is_that_of_its_trees():
    m = members(mean=1.0, n=500)
    energy = boost(m, trained(m, Linear([0.0, 0.0]))).energy
    for softness in (0.0, 0.5):
        energy.set_softness(softness)
        assert energy.softness == softness
    z = torch.randn(2, 20, 1, dtype=torch.float64).requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy(z).sum(), z)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
