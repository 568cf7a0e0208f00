"""Classifiers that correct energies: the noise is then the tilted base."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from skebm import Boosting
from skebm.bases import GaussianMixtureBase
from skebm.energies import CorrectedEnergy, MemberEnergies
from skebm.partition import ess
from skebm.training import Trained
from skebm.training.classifiers import _noise, train_classifiers


class Linear(nn.Module):
    """a z - a^2 / 2 in one column: tilts N(0, 1) to N(a, 1), and is normalised."""

    def __init__(self, slopes):
        super().__init__()
        self.slopes = slopes

    def forward(self, z):
        slopes = torch.tensor(self.slopes, dtype=z.dtype)[:, None, None]
        return (slopes * z - 0.5 * slopes.square()).sum(-1)

    def member(self, k):
        return Linear(self.slopes[k : k + 1])


@pytest.fixture(scope="module")
def task(tilted):
    """Rows of N(1, 1), two members whose bases are N(0, 1)."""
    x = torch.as_tensor(np.random.default_rng(0).normal(1.0, 1.0, (4000, 1)))
    base = GaussianMixtureBase([1.0], [[0.0]], [[[1.0]]])
    return tilted(x, [base, base])


@pytest.fixture(scope="module")
def boosted(task):
    """``boosted(slope)``: what energies of that slope, or none, are corrected to."""
    trees = Boosting(max_iter=60, max_leaf_nodes=15, min_samples_leaf=100)
    found = {}

    def boost(slope):
        if slope not in found:
            start = None if slope is None else trained(task, Linear([slope, slope]))
            found[slope] = train_classifiers(task, trees, noise_ratio=5.0, start=start)
        return found[slope]

    return boost


def trained(task, energy):
    held = [energy.member(k)(task.z[rows][None])[0] for k, rows in enumerate(task.held)]
    history = {"n_iter": np.array([0, 7]), "gain": np.zeros(2)}
    return Trained(energy, held, energy(task.pool_z), 7, history)


def mean_gain(task, trained):
    return task.mean_gain(trained.held, trained.pool).item()


@pytest.mark.parametrize(("k", "slope"), [(0, 1.0), (1, -0.5)])
def test_noise_of_a_start_is_the_tilted_base(task, k, slope):
    rng = torch.Generator().manual_seed(0)
    noise = _noise(task, k, 20_000, trained(task, Linear([1.0, -0.5])), rng)[:, 0].numpy()
    assert noise.shape == (20_000,)
    # copies of rows that weigh much: the distance is that of some 20,000 independent draws, twice
    assert stats.ks_1samp(noise, stats.norm(slope, 1.0).cdf).statistic < 0.02


def test_trees_find_nothing_to_correct_in_the_right_energy(task, boosted):
    before, after = (
        mean_gain(task, trained(task, Linear([1.0, 1.0]))),
        mean_gain(task, boosted(1.0)),
    )
    assert before == pytest.approx(0.5, abs=0.06)  # KL(N(1, 1) || N(0, 1))
    assert before - 1e-9 <= after < before + 0.01


@pytest.mark.parametrize("slope", [0.3, 1.6])
def test_trees_correct_a_wrong_energy(task, boosted, slope):
    start, found = trained(task, Linear([slope, slope])), boosted(slope)
    assert isinstance(found.energy, CorrectedEnergy)
    assert found.n_iter > 0
    missing = 0.5 * (1.0 - slope) ** 2
    assert mean_gain(task, found) > mean_gain(task, start) + 0.8 * missing
    # f is what it says, at rows and pool, whole and member by member
    z = torch.linspace(-1.0, 3.0, 50, dtype=torch.float64)[:, None].expand(2, -1, -1)
    whole = found.energy(z)
    for k, rows in enumerate(task.held):
        member = found.energy.member(k)
        torch.testing.assert_close(member(z[k : k + 1])[0], whole[k])
        torch.testing.assert_close(found.held[k], member(task.z[rows][None])[0])
    torch.testing.assert_close(found.pool, found.energy(task.pool_z))
    # and near the log-ratio of the distributions, z - 1/2
    assert (whole - (z[..., 0] - 0.5)).std() < 0.35
    # a constant would show in the integral: the noise was the start, normalised
    log_z = task.log_partition(found.pool) - task.log_partition(start.pool)
    error = (1 / ess(found.pool) + 1 / ess(start.pool)).sqrt()
    assert error.max() < 0.06
    assert (log_z.abs() < 4.0 * error).all()


def test_history_begins_with_the_start(task, boosted):
    found = boosted(0.3)
    assert found.history["n_iter"][0] == 0
    first = mean_gain(task, trained(task, Linear([0.3, 0.3])))
    assert found.history["gain"][0] == pytest.approx(first)
    # the softness is chosen afterwards
    assert found.history["gain"].max() == pytest.approx(mean_gain(task, found), abs=0.02)


def test_without_a_start_the_noise_is_the_base(task, boosted):
    found = boosted(None)
    assert isinstance(found.energy, MemberEnergies)
    assert mean_gain(task, found) == pytest.approx(0.45, abs=0.1)
    rng = torch.Generator().manual_seed(0)
    noise = _noise(task, 0, 20_000, Trained.nothing(task), rng)[:, 0].numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_softness_of_a_correction_is_that_of_its_trees(boosted):
    energy = copy.deepcopy(boosted(0.3).energy)
    for softness in (0.0, 0.5):
        energy.set_softness(softness)
        assert energy.softness == softness
    z = torch.randn(2, 20, 1, dtype=torch.float64).requires_grad_(True)
    (gradient,) = torch.autograd.grad((energy(z) - energy.first(z)).sum(), z)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
