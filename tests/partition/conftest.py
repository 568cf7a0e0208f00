"""Laws with known log Z, as unnormalised log-densities with a base `q` and exact samples."""

import math
import types

import pytest
import torch
from scipy.optimize import brentq

from skebm.bases import GaussianMixtureBase


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(d, scale=1.0):
    return GaussianMixtureBase([1.0], torch.zeros(1, d), scale**2 * torch.eye(d)[None])


class Tilt:
    """q exp(a sum(x) - b |x|^2 / 2) with q = N(0, I), at a given KL(p to q)."""

    def __init__(self, d, kl, b=0.3):
        self.d, self.b, self.q = d, b, normal(d)
        variance = 1 / (1 + b)
        self.mean = math.sqrt(2 * kl / d - (variance - 1 - math.log(variance)))
        self.a = self.mean * (1 + b)
        self.log_z = d * (self.a**2 / (2 * (1 + b)) - 0.5 * math.log1p(b))

    def __call__(self, x):
        return self.q.log_prob(x) + self.a * x.sum(1) - 0.5 * self.b * (x**2).sum(1)

    def sample(self, n, rng):
        z = torch.randn(n, self.d, generator=rng, dtype=torch.float64)
        return self.mean + z / math.sqrt(1 + self.b)


class Skew:
    """Columns .7 N(m, .5^2) + .3 N(m + 1.2, .8^2), times e^3; q = N(0, I), at a given KL."""

    log_z = 3.0

    def __init__(self, d, kl):
        self.d, self.q = d, normal(d)
        t = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
        log_q = -0.5 * t**2 - 0.5 * math.log(2 * math.pi)

        def excess(m):
            log_p = self.column(t, m)
            return d * torch.trapezoid(log_p.exp() * (log_p - log_q), t).item() - kl

        self.m = brentq(excess, -0.3, 4)

    def column(self, x, m):
        parts = [
            math.log(w / s) - 0.5 * ((x - m - shift) / s) ** 2
            for w, shift, s in ((0.7, 0.0, 0.5), (0.3, 1.2, 0.8))
        ]
        return torch.logaddexp(*parts) - 0.5 * math.log(2 * math.pi)

    def __call__(self, x):
        return self.column(x, self.m).sum(1) + self.log_z

    def sample(self, n, rng):
        z = torch.randn(n, self.d, generator=rng, dtype=torch.float64)
        first = torch.rand(n, self.d, generator=rng, dtype=torch.float64) < 0.7
        return self.m + torch.where(first, 0.5 * z, 1.2 + 0.8 * z)


class TwoModes:
    """Weights .2 and .8, far apart, times e; q = N(0, 2^2 I)."""

    log_z = 1.0

    def __init__(self, d):
        means = torch.full((2, d), 2.5) * torch.tensor([[-1.0], [1.0]])
        self.q = normal(d, 2.0)
        self.p = GaussianMixtureBase([0.2, 0.8], means, 0.25 * torch.eye(d).expand(2, d, d))
        self.sample = self.p.sample

    def __call__(self, x):
        return self.p.log_prob(x) + self.log_z


class Box:
    """A step function on the unit square, without gradient, under q = N(0, I); Z = 2.5."""

    log_z = math.log(2.5)

    def __init__(self):
        self.q = normal(2)

    def __call__(self, x):
        inside = ((x > 0) & (x < 1)).all(1)
        with torch.no_grad():
            return torch.where(inside, (1 + (4 * x[:, 0]).floor()).clamp_min(1).log(), -torch.inf)


def check_coverage(results, log_z, low=0.4, high=1.7):
    """Stated errors against true ones: mean of z^2, and the share within two standard errors."""
    z = torch.tensor([(r.value - log_z) / r.std_error for r in results])
    assert low < (z**2).mean() < high
    assert (z.abs() < 2).double().mean() >= 0.86
    assert abs(z.mean()) < 4 / math.sqrt(len(z))


@pytest.fixture(scope="session")
def laws():
    return types.SimpleNamespace(
        rng=rng, normal=normal, check_coverage=check_coverage,
        Tilt=Tilt, Skew=Skew, TwoModes=TwoModes, Box=Box,
    )  # fmt: skip
