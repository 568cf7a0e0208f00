"""Laws with exact samples and distribution functions, for the tests of the kernels."""

import math
import types

import pytest
import torch
from scipy import stats


def rng(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def normal(x):
    return -0.5 * (x**2).sum(1)


class Gaussian:
    """Correlated, with different scales."""

    d = 3
    chol = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 2.0, 3.0]], dtype=torch.float64)

    def __call__(self, x):
        return -0.5 * torch.linalg.solve_triangular(self.chol, x.T, upper=False).square().sum(0)

    def sample(self, n, rng):
        return torch.randn(n, 3, generator=rng, dtype=torch.float64) @ self.chol.T

    def uniforms(self, x):
        return torch.special.ndtr(torch.linalg.solve_triangular(self.chol, x.T, upper=False)).T


class Banana:
    """x1 normal, x2 | x1 normal around x1^2."""

    d = 2

    def __call__(self, x):
        return -0.5 * (x[:, 0] ** 2 + ((x[:, 1] - x[:, 0] ** 2) / 0.5) ** 2)

    def sample(self, n, rng):
        u = torch.randn(n, 2, generator=rng, dtype=torch.float64)
        return torch.stack([u[:, 0], u[:, 0] ** 2 + 0.5 * u[:, 1]], 1)

    def uniforms(self, x):
        return torch.special.ndtr(torch.stack([x[:, 0], (x[:, 1] - x[:, 0] ** 2) / 0.5], 1))


class TwoModes:
    """.2 N(-m, 1) + .8 N(m, .7^2)."""

    d = 1
    weights, deviations = (0.2, 0.8), (1.0, 0.7)

    def __init__(self, m=1.5):
        self.means = (-m, m)

    def parts(self, x, f):
        modes = zip(self.weights, self.means, self.deviations, strict=True)
        return [f(w, (x[:, 0] - mean) / s, s) for w, mean, s in modes]

    def __call__(self, x):
        return torch.logaddexp(*self.parts(x, lambda w, u, s: math.log(w / s) - 0.5 * u**2))

    def sample(self, n, rng):
        right = torch.rand(n, 1, generator=rng, dtype=torch.float64) < self.weights[1]
        u = torch.randn(n, 1, generator=rng, dtype=torch.float64)
        (a, b), (s, t) = self.means, self.deviations
        return torch.where(right, b + t * u, a + s * u)

    def uniforms(self, x):
        return sum(self.parts(x, lambda w, u, s: w * torch.special.ndtr(u)))[:, None]


class StudentT:
    """Two independent columns with 3 degrees of freedom: tails fall as x^-4."""

    d = 2

    def __call__(self, x):
        return -2.0 * torch.log1p(x**2 / 3).sum(1)

    def sample(self, n, rng):
        u = torch.rand(n, 2, generator=rng, dtype=torch.float64)
        return torch.from_numpy(stats.t(3).ppf(u.numpy()))

    def uniforms(self, x):
        return torch.from_numpy(stats.t(3).cdf(x.numpy()))


class Exponential:
    """On a half-line: proposals may leave the support."""

    d = 1

    def __call__(self, x):
        return torch.where(x[:, 0] > 0, -x[:, 0], -torch.inf)

    def sample(self, n, rng):
        return -torch.log1p(-torch.rand(n, 1, generator=rng, dtype=torch.float64))

    def uniforms(self, x):
        return -torch.expm1(-x)


def p_values(law, x):
    u = law.uniforms(x).numpy()
    return [stats.kstest(column, "uniform").pvalue for column in u.T]


@pytest.fixture(scope="session")
def laws():
    return types.SimpleNamespace(
        rng=rng, normal=normal, p_values=p_values, Gaussian=Gaussian, Banana=Banana,
        TwoModes=TwoModes, StudentT=StudentT, Exponential=Exponential,
    )  # fmt: skip
