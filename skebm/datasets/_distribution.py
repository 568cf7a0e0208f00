"""What all distributions share, and Gaussian mixtures."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from sklearn.utils import check_array, check_random_state, gen_batches

from skebm._typing import FloatArray, RandomState

LOG_2PI = np.log(2.0 * np.pi)


def log_normal(
    x: float | np.ndarray, mean: float | np.ndarray = 0.0, scale: float | np.ndarray = 1.0
) -> Any:
    """Log-density of N(mean, scale^2), element by element."""
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * LOG_2PI


def log_normal_factor(X: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Log-density of N(0, factor factor^T) at the rows of X, factor lower triangular."""
    y = np.linalg.solve(factor, X.T)
    return -0.5 * (y**2).sum(0) - np.log(np.diag(factor)).sum() - 0.5 * len(factor) * LOG_2PI


def decaying_correlation(n_features: int, correlation: float) -> np.ndarray:
    """Cholesky factor of the matrix with entries correlation^|i - j|."""
    index = np.arange(n_features)
    return np.linalg.cholesky(float(correlation) ** np.abs(index[:, None] - index))


class Distribution:
    """What all distributions share: input checks around ``_draw`` and ``_log_density``."""

    name: ClassVar[str]
    n_features: int = 2
    _draw: Callable[[int, np.random.RandomState], FloatArray]
    _log_density: Callable[[np.ndarray], FloatArray]

    def sample(self, n_samples: int, random_state: RandomState = None) -> FloatArray:
        """Draw independent rows.

        Parameters
        ----------
        n_samples : int
            Number of rows.
        random_state : int, RandomState instance or None, default=None
            Pass an int for reproducible rows.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            The rows, float64.
        """
        return self._draw(int(n_samples), check_random_state(random_state))

    def log_density(self, X: ArrayLike) -> FloatArray:
        """Exact normalised log-density.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The points.

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats; minus infinity outside the support.
        """
        rows = check_array(X, dtype=np.float64)  # pyright: ignore[reportArgumentType]
        if rows.shape[1] != self.n_features:
            raise ValueError(f"{self.name} has {self.n_features} features, X has {rows.shape[1]}.")
        return self._log_density(rows)


class Mixture:
    """Gaussian mixture given by weights (J,), means (J, d) and Cholesky factors (J, d, d)."""

    def __init__(self, weights: np.ndarray, means: np.ndarray, factors: np.ndarray):
        self.weights, self.means, self.factors = weights, means, factors
        n_components, d = means.shape
        # One product of shape (d, J d) whitens a row for all components at once.
        inverse = np.linalg.inv(factors).transpose(2, 0, 1)
        self._whitener = inverse.reshape(d, n_components * d)
        self._centre = np.einsum("djk,jd->jk", inverse, means)
        log_det = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
        self._constant = np.log(weights) - log_det - 0.5 * d * LOG_2PI

    @classmethod
    def along_curve(cls, points: np.ndarray, noise: float) -> Self:
        """Equal spherical components at the given points."""
        n, d = points.shape
        return cls(np.full(n, 1.0 / n), points, np.tile(noise * np.eye(d), (n, 1, 1)))

    def draw(self, n_samples: int, rng: np.random.RandomState) -> FloatArray:
        index = rng.choice(len(self.weights), n_samples, p=self.weights)
        noise = rng.standard_normal((n_samples, self.means.shape[1]))
        return self.means[index] + np.einsum("nij,nj->ni", self.factors[index], noise)

    def log_density(self, X: np.ndarray) -> FloatArray:
        out = np.empty(len(X))
        for rows in gen_batches(len(X), 1024):
            y = (X[rows] @ self._whitener).reshape(-1, *self._centre.shape) - self._centre
            out[rows] = logsumexp(self._constant - 0.5 * (y**2).sum(2), axis=1)
        return out


class MixtureDistribution(Distribution):
    """A distribution that is a Gaussian mixture, given by ``_mixture``."""

    _mixture: Mixture

    def _draw(self, n_samples, rng):
        return self._mixture.draw(n_samples, rng)

    def _log_density(self, X):
        return self._mixture.log_density(X)
