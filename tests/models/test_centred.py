"""Energies that leave the masses of states as they are, against closed forms."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from skebm._layout import Layout
from skebm.bases import AffineTransform, MixedMixtureBase, ValuesTransform
from skebm.models import CentredEnergy, FeatureMap, StateDraws
from skebm.models.centred import _keys

LAYOUT = Layout([3, 2], [-1, 0], 2)
"""A category, a number that may be missing, and one that may not."""

PATTERNS = torch.tensor(list(product(range(3), range(2))))


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def base(shift):
    masses = [[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.8, 0.2], [0.4, 0.6]]]
    means = doubles([[0.0, 0.5], [1.0, -0.5]]) + shift
    covariances = doubles([[[0.4, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.3]]])
    weights = doubles([0.4, 0.6])
    return MixedMixtureBase(LAYOUT, weights, [doubles(m) for m in masses], means, covariances)


class Linear(nn.Module):
    """Member k: (.2 + .2 k) (1 + category) times the sum of the values there, plus a constant."""

    def __init__(self, members):
        super().__init__()
        self.members = members

    def forward(self, z):
        slope = 0.2 + 0.2 * doubles(self.members)[:, None]
        total = z[..., 2:].nan_to_num().sum(-1)
        return slope * (1.0 + z[..., 0]) * total + 5.0 * z[..., 0] - z[..., 1]

    def member(self, k):
        return Linear([self.members[k]])


def known_constants(k, q):
    """log E exp(f) under every pattern: of a Gaussian it is a' mean + a' covariance a / 2."""
    marginal, constants = q.marginal([0, 1]), []
    for codes in PATTERNS.double():
        a = (0.2 + 0.2 * k) * (1.0 + codes[0]) * doubles([0.0 if codes[1] else 1.0, 1.0])
        of_components = q.means @ a + 0.5 * torch.einsum("kij,i,j->k", q.covariances, a, a)
        log_weights = marginal.responsibilities(codes[None])[0].log()
        constants.append((log_weights + of_components).logsumexp(0) + 5.0 * codes[0] - codes[1])
    return torch.stack(constants)


@pytest.fixture
def bases():
    return [base(0.0), base(0.3)]


@pytest.fixture
def draws(bases):
    identity = ValuesTransform(LAYOUT, Columns())
    return StateDraws.of(bases, FeatureMap(identity), 1024, seed=0)


class Columns(AffineTransform):
    """Columns as they are, mapped one by one."""

    def __init__(self):
        super().__init__(torch.zeros(2), torch.ones(2))

    def columns(self, x):
        return x, torch.zeros_like(x)


def rows(codes, n=1):
    codes = codes.repeat_interleave(n, 0)
    return LAYOUT.join(codes, torch.randn(len(codes), 2, generator=rng(), dtype=torch.float64))


def rng():
    return torch.Generator().manual_seed(0)


def test_constants_are_those_of_the_closed_form(bases, draws):
    energy = CentredEnergy.of(Linear([0, 1]), draws, rows(PATTERNS))
    constants = energy.constants_of(rows(PATTERNS).expand(2, -1, -1))
    known = torch.stack([known_constants(k, q) for k, q in enumerate(bases)])
    torch.testing.assert_close(constants, known, atol=0.01, rtol=0)


def test_constants_do_not_depend_on_what_is_known_or_asked_for_together(draws):
    z = rows(PATTERNS, n=2)
    other = rows(PATTERNS.flip(0), n=2)
    every = CentredEnergy.of(Linear([0, 1]), draws, z)
    few = CentredEnergy.of(Linear([0, 1]), draws, z[:3])
    both = torch.stack([z, other])  # members see different rows
    expected = every(both)
    torch.testing.assert_close(few(both), expected, atol=1e-12, rtol=0)
    for i in range(len(z)):
        alone = few(both[:, i : i + 1])
        torch.testing.assert_close(alone, expected[:, i : i + 1], atol=1e-12, rtol=0)
    for k in range(2):
        for energy in (every, few):
            single = energy.member(k)(both[k : k + 1])
            torch.testing.assert_close(single, expected[k : k + 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(copy.deepcopy(few)(both), expected, atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_energy(draws):
    z = rows(PATTERNS).expand(2, -1, -1).clone()
    found = []
    for energy in (Linear([0, 1]), CentredEnergy.of(Linear([0, 1]), draws, rows(PATTERNS)[:2])):
        leaf = z.clone().requires_grad_()
        found.append(torch.autograd.grad(energy(leaf).sum(), leaf)[0][..., 2:])
    assert torch.equal(*found)


def test_patterns_of_many_columns_have_numbers_of_their_own():
    codes = torch.randint(0, 250, (50_000, 60), generator=rng()).unique(dim=0)
    assert len(_keys(codes).unique()) == len(codes)
    near = torch.eye(200, dtype=torch.long)
    assert len(_keys(torch.cat([near, 2 * near, near.cumsum(0)])).unique()) == 600 - 1
