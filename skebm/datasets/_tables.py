"""Distributions in any number of columns."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.special import gammainc, gammaincc, gammainccinv, gammaincinv, gammaln, ndtr, ndtri

from ._distribution import (
    Distribution,
    Mixture,
    MixtureDistribution,
    decaying_correlation,
    log_normal,
    log_normal_factor,
)


@dataclass(frozen=True)
class Funnel(Distribution):
    """Neal's funnel: one column sets the scale of all others.

    ``x_1 ~ N(0, scale^2)`` and ``x_j | x_1 ~ N(0, exp(x_1))`` for j > 1; Neal, "Slice sampling",
    Annals of Statistics, 2003 (there: scale 3, ten columns).

    Parameters
    ----------
    n_features : int, default=10
        Number of columns.
    scale : float, default=1.0
        Standard deviation of the first column.

    See Also
    --------
    make_funnel : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Funnel
    >>> distribution = Funnel()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 10), (3,))
    """

    n_features: int = 10
    scale: float = 1.0
    name: ClassVar[str] = "funnel"

    def _draw(self, n_samples, rng):
        X = rng.standard_normal((n_samples, self.n_features))
        X[:, 0] *= self.scale
        X[:, 1:] *= np.exp(X[:, :1] / 2)
        return X

    def _log_density(self, X):
        rest = log_normal(X[:, 1:], 0.0, np.exp(X[:, :1] / 2))
        return log_normal(X[:, 0], 0.0, self.scale) + rest.sum(1)


@dataclass(frozen=True)
class GaussianMixtureDistribution(MixtureDistribution):
    """Mixture of correlated Gaussians drawn once from ``seed``.

    sum_j w_j N(m_j, S_j) with w ~ Dirichlet(5), m_j ~ N(0, 4 I) and S_j = A A^T / d + I / 10,
    the entries of A standard normal.

    Parameters
    ----------
    n_features : int, default=10
        Number of columns.
    n_components : int, default=5
        Number of Gaussians.
    seed : int, default=0
        Of weights, means and covariances.

    See Also
    --------
    make_gaussian_mixture : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import GaussianMixtureDistribution
    >>> distribution = GaussianMixtureDistribution()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 10), (3,))
    """

    n_features: int = 10
    n_components: int = 5
    seed: int = 0
    name: ClassVar[str] = "gaussian_mixture"

    @cached_property
    def _mixture(self):
        rng, d = np.random.RandomState(self.seed), self.n_features
        weights = rng.dirichlet(np.full(self.n_components, 5.0))
        means = 2.0 * rng.standard_normal((self.n_components, d))
        A = rng.standard_normal((self.n_components, d, d))
        covariances = A @ A.transpose(0, 2, 1) / d + 0.1 * np.eye(d)
        return Mixture(weights, means, np.linalg.cholesky(covariances))


@dataclass(frozen=True)
class MultivariateT(Distribution):
    """Multivariate Student t with ``df`` degrees of freedom, centre 0 and scale matrix R.

    R has entries ``correlation^|i - j|``;
    ``p(x) = Gamma((df + d)/2) / (Gamma(df/2) (df pi)^(d/2) |R|^(1/2))
    (1 + x^T R^-1 x / df)^(-(df + d)/2)``.

    Parameters
    ----------
    n_features : int, default=5
        Number of columns.
    df : float, default=3.0
        Degrees of freedom: fewer make heavier tails.
    correlation : float, default=0.7
        Between neighbouring columns of the scale matrix.

    See Also
    --------
    make_multivariate_t : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import MultivariateT
    >>> distribution = MultivariateT()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 5), (3,))
    """

    n_features: int = 5
    df: float = 3.0
    correlation: float = 0.7
    name: ClassVar[str] = "multivariate_t"

    @cached_property
    def _factor(self):
        return decaying_correlation(self.n_features, self.correlation)

    def _draw(self, n_samples, rng):
        normal = rng.standard_normal((n_samples, self.n_features)) @ self._factor.T
        return normal / np.sqrt(rng.chisquare(self.df, (n_samples, 1)) / self.df)

    def _log_density(self, X):
        d, df = self.n_features, self.df
        square = (np.linalg.solve(self._factor, X.T) ** 2).sum(0)
        constant = gammaln((df + d) / 2) - gammaln(df / 2) - 0.5 * d * np.log(df * np.pi)
        log_det = np.log(np.diag(self._factor)).sum()
        return constant - log_det - 0.5 * (df + d) * np.log1p(square / df)


@dataclass(frozen=True)
class GammaCopula(Distribution):
    """Gaussian copula with gamma marginals of unit scale and the given ``shapes``.

    ``x_j = F_j^-1(Phi(z_j))`` with ``z ~ N(0, R)``, ``R_ij = correlation^|i - j|``, so that
    ``log p(x) = log N(z; 0, R) + sum_j [log f_j(x_j) - log N(z_j; 0, 1)]``. See Nelsen, "An
    introduction to copulas", 2006.

    Parameters
    ----------
    shapes : tuple of float, default=(1.5, 2.0, 3.0, 5.0, 8.0)
        Shape of the gamma distribution of each column.
    correlation : float, default=0.7
        Of the normal scores of neighbouring columns.

    See Also
    --------
    make_gamma_copula : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import GammaCopula
    >>> distribution = GammaCopula()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 5), (3,))
    """

    shapes: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 8.0)
    correlation: float = 0.7
    name: ClassVar[str] = "gamma_copula"

    @property
    def n_features(self) -> int:
        """Number of columns, one per shape."""
        return len(self.shapes)

    @cached_property
    def _factor(self):
        return decaying_correlation(self.n_features, self.correlation)

    def _draw(self, n_samples, rng):
        z = rng.standard_normal((n_samples, self.n_features)) @ self._factor.T
        # Each half of the range through its own tail, which keeps all digits of both.
        lower, upper = gammaincinv(self.shapes, ndtr(z)), gammainccinv(self.shapes, ndtr(-z))
        return np.where(z < 0, lower, upper)

    def _log_density(self, X):
        shapes = np.asarray(self.shapes)
        inside = (X > 0).all(1)
        x = np.where(X > 0, X, 1.0)
        lower, upper = gammainc(shapes, x), gammaincc(shapes, x)
        tiny = np.finfo(float).tiny  # keeps z finite where both tails underflow
        z = np.where(lower < 0.5, ndtri(np.maximum(lower, tiny)), -ndtri(np.maximum(upper, tiny)))
        marginal = (shapes - 1) * np.log(x) - x - gammaln(shapes) - log_normal(z)
        return np.where(inside, log_normal_factor(z, self._factor) + marginal.sum(1), -np.inf)


@dataclass(frozen=True)
class ShearedGaussian(Distribution):
    """Gaussian whose columns each lean on the one before.

    x_1 = e_1 and x_j = ``shear`` x_{j-1} + e_j with e ~ N(0, I): a map of unit Jacobian, so that
    log p(x) = log N(e; 0, I).

    Parameters
    ----------
    n_features : int, default=20
        Number of columns.
    shear : float, default=1.0
        How much of a column the next one takes.

    See Also
    --------
    make_sheared_gaussian : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import ShearedGaussian
    >>> distribution = ShearedGaussian()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 20), (3,))
    """

    n_features: int = 20
    shear: float = 1.0
    name: ClassVar[str] = "sheared_gaussian"

    def _draw(self, n_samples, rng):
        X = rng.standard_normal((n_samples, self.n_features))
        for j in range(1, self.n_features):
            X[:, j] += self.shear * X[:, j - 1]
        return X

    def _log_density(self, X):
        e = X.copy()
        e[:, 1:] -= self.shear * X[:, :-1]
        return log_normal(e).sum(1)
