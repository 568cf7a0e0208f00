"""Synthetic laws with a sampler and the exact log-density, for tests, benchmarks and examples.

Every law is a small immutable object with ``name``, ``n_features``, ``sample`` and
``log_density`` (normalised, in nats). :data:`LAWS` holds one of each at its default parameters;
the ``make_*`` functions draw from them in the manner of :mod:`sklearn.datasets`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.special import (
    gammainc,
    gammaincc,
    gammainccinv,
    gammaincinv,
    gammaln,
    i0e,
    logsumexp,
    ndtr,
    ndtri,
)
from sklearn.utils import check_array, check_random_state, gen_batches

__all__ = [
    "LAWS",
    "Banana",
    "Checkerboard",
    "Claw",
    "EightGaussians",
    "Funnel",
    "GammaCopula",
    "GaussianMixtureLaw",
    "MultivariateT",
    "Pinwheel",
    "Rings",
    "ShearedGaussian",
    "Spirals",
    "TwoMoons",
    "make_banana",
    "make_checkerboard",
    "make_claw",
    "make_eight_gaussians",
    "make_funnel",
    "make_gamma_copula",
    "make_gaussian_mixture",
    "make_multivariate_t",
    "make_pinwheel",
    "make_rings",
    "make_sheared_gaussian",
    "make_spirals",
    "make_two_moons",
]

_LOG_2PI = np.log(2.0 * np.pi)


def _log_normal(x, mean=0.0, scale=1.0):
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * _LOG_2PI


def _log_normal_factor(X, factor):
    """Log-density of N(0, factor factor^T) at the rows of X, factor lower triangular."""
    y = np.linalg.solve(factor, X.T)
    return -0.5 * (y**2).sum(0) - np.log(np.diag(factor)).sum() - 0.5 * len(factor) * _LOG_2PI


def _decaying_correlation(n_features, correlation):
    """Cholesky factor of the matrix with entries correlation^|i - j|."""
    index = np.arange(n_features)
    return np.linalg.cholesky(float(correlation) ** np.abs(index[:, None] - index))


class _Law:
    """What all laws share: input checks around ``_draw`` and ``_log_density``."""

    name: ClassVar[str]
    n_features: int = 2

    def sample(self, n_samples, random_state=None):
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

    def log_density(self, X):
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
        X = check_array(X, dtype=np.float64)
        if X.shape[1] != self.n_features:
            raise ValueError(f"{self.name} has {self.n_features} features, X has {X.shape[1]}.")
        return self._log_density(X)


class _Mixture:
    """Gaussian mixture given by weights (J,), means (J, d) and Cholesky factors (J, d, d)."""

    def __init__(self, weights, means, factors):
        self.weights, self.means, self.factors = weights, means, factors
        n_components, d = means.shape
        # One product of shape (d, J d) whitens a row for all components at once.
        inverse = np.linalg.inv(factors).transpose(2, 0, 1)
        self._whitener = inverse.reshape(d, n_components * d)
        self._centre = np.einsum("djk,jd->jk", inverse, means)
        log_det = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
        self._constant = np.log(weights) - log_det - 0.5 * d * _LOG_2PI

    @classmethod
    def along_curve(cls, points, noise):
        """Equal spherical components at the given points."""
        n, d = points.shape
        return cls(np.full(n, 1.0 / n), points, np.tile(noise * np.eye(d), (n, 1, 1)))

    def draw(self, n_samples, rng):
        index = rng.choice(len(self.weights), n_samples, p=self.weights)
        noise = rng.standard_normal((n_samples, self.means.shape[1]))
        return self.means[index] + np.einsum("nij,nj->ni", self.factors[index], noise)

    def log_density(self, X):
        out = np.empty(len(X))
        for rows in gen_batches(len(X), 1024):
            y = (X[rows] @ self._whitener).reshape(-1, *self._centre.shape) - self._centre
            out[rows] = logsumexp(self._constant - 0.5 * (y**2).sum(2), axis=1)
        return out


class _MixtureLaw(_Law):
    """A law that is a Gaussian mixture, given by ``_mixture``."""

    def _draw(self, n_samples, rng):
        return self._mixture.draw(n_samples, rng)

    def _log_density(self, X):
        return self._mixture.log_density(X)


@dataclass(frozen=True)
class Claw(_MixtureLaw):
    """Claw density in one dimension, a normal with five narrow spikes.

    p(x) = N(x; 0, 1) / 2 + sum_{l=0}^{4} N(x; l/2 - 1, 1/100) / 10: number 10 of Marron and
    Wand, "Exact mean integrated squared error", Annals of Statistics, 1992.
    """

    name: ClassVar[str] = "claw"
    n_features: ClassVar[int] = 1

    @cached_property
    def _mixture(self):
        means = np.r_[0.0, np.arange(5) / 2 - 1][:, None]
        scales = np.r_[1.0, np.full(5, 0.1)][:, None, None]
        return _Mixture(np.r_[0.5, np.full(5, 0.1)], means, scales)


@dataclass(frozen=True)
class EightGaussians(_MixtureLaw):
    """Eight equal spherical Gaussians of deviation ``noise`` on a circle of radius ``radius``.

    A customary test of generative models, as in Grathwohl et al., "FFJORD", ICLR 2019.
    """

    radius: float = 2.0
    noise: float = 0.25
    name: ClassVar[str] = "eight_gaussians"

    @cached_property
    def _mixture(self):
        angle = np.arange(8) * np.pi / 4
        return _Mixture.along_curve(
            self.radius * np.column_stack([np.cos(angle), np.sin(angle)]), self.noise
        )


@dataclass(frozen=True)
class TwoMoons(_MixtureLaw):
    """Two interleaving half circles with Gaussian noise, as :func:`sklearn.datasets.make_moons`.

    The points t on the two arcs (cos t, sin t) and (1 - cos t, 1/2 - sin t), 0 <= t <= pi, are
    the midpoints of 200 equal pieces of each, so that the density is a finite mixture and exact;
    at the default noise the pieces are far shorter than the noise is wide.
    """

    noise: float = 0.1
    name: ClassVar[str] = "two_moons"

    @cached_property
    def _mixture(self):
        t = (np.arange(200) + 0.5) * np.pi / 200
        upper = np.column_stack([np.cos(t), np.sin(t)])
        return _Mixture.along_curve(np.vstack([upper, [1.0, 0.5] - upper]), self.noise)


@dataclass(frozen=True)
class Spirals(_MixtureLaw):
    """Two spiral arms with Gaussian noise.

    Centres +-(t / 3)(-cos t, sin t) with t = 3 pi sqrt(u), u the midpoints of 300 equal pieces
    of [0, 1] (a finite mixture, hence exact). After the "2spirals" of Grathwohl et al.,
    "FFJORD", ICLR 2019.
    """

    noise: float = 0.1
    name: ClassVar[str] = "spirals"

    @cached_property
    def _mixture(self):
        t = 3 * np.pi * np.sqrt((np.arange(300) + 0.5) / 300)
        arm = np.column_stack([-np.cos(t), np.sin(t)]) * t[:, None] / 3
        return _Mixture.along_curve(np.vstack([arm, -arm]), self.noise)


@dataclass(frozen=True)
class Checkerboard(_Law):
    """Uniform on every other unit square of a board of ``n_cells`` x ``n_cells`` about 0.

    p(x) = 1 / (number of squares) on squares (i, j) with i + j even, 0 elsewhere.
    """

    n_cells: int = 4
    name: ClassVar[str] = "checkerboard"

    @cached_property
    def _cells(self):
        i, j = np.divmod(np.arange(self.n_cells**2), self.n_cells)
        return np.column_stack([i, j])[(i + j) % 2 == 0]

    def _draw(self, n_samples, rng):
        cells = self._cells[rng.randint(len(self._cells), size=n_samples)]
        return cells + rng.uniform(size=(n_samples, 2)) - self.n_cells / 2

    def _log_density(self, X):
        cell = np.floor(X + self.n_cells / 2)
        inside = ((cell >= 0) & (cell < self.n_cells)).all(1) & (cell.sum(1) % 2 == 0)
        return np.where(inside, -np.log(len(self._cells)), -np.inf)


@dataclass(frozen=True)
class Rings(_Law):
    """Equal mixture of concentric circles with isotropic Gaussian noise.

    With s = ``noise``, a circle of radius R convolved with ``N(0, s^2 I)`` has the density
    ``exp(-(|x|^2 + R^2) / (2 s^2)) I_0(R |x| / s^2) / (2 pi s^2)`` (so that ``|x|`` is Rice).
    """

    radii: tuple = (1.0, 2.0, 3.0)
    noise: float = 0.1
    name: ClassVar[str] = "rings"

    def _draw(self, n_samples, rng):
        radius = np.asarray(self.radii)[rng.randint(len(self.radii), size=n_samples)]
        angle = rng.uniform(0.0, 2 * np.pi, n_samples)
        X = radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        return X + self.noise * rng.standard_normal((n_samples, 2))

    def _log_density(self, X):
        radius, r = np.asarray(self.radii), np.linalg.norm(X, axis=1)[:, None]
        # i0e is scaled by exp(-argument), which completes the square.
        log_p = np.log(i0e(radius * r / self.noise**2)) + 2 * _log_normal(0.0, 0.0, self.noise)
        return logsumexp(log_p - 0.5 * ((r - radius) / self.noise) ** 2, axis=1) - np.log(
            len(radius)
        )


@dataclass(frozen=True)
class Pinwheel(_Law):
    """Blades of Gaussians about the origin, twisted in proportion to the distance from it.

    Before the twist blade k is ``N((1, 0), diag(radial_scale^2, tangential_scale^2))`` turned by
    ``2 pi k / n_blades``; then x is turned by ``twist |x|``, a map of unit Jacobian.
    After Johnson et al., "Composing graphical models with neural networks", NeurIPS 2016, whose
    twist depends on the untwisted coordinate and leaves no closed density.
    """

    n_blades: int = 5
    radial_scale: float = 0.3
    tangential_scale: float = 0.1
    twist: float = 1.2
    name: ClassVar[str] = "pinwheel"

    @cached_property
    def _mixture(self):
        angle = 2 * np.pi * np.arange(self.n_blades) / self.n_blades
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn = turn.transpose(2, 0, 1)
        scale = np.array([self.radial_scale, self.tangential_scale])
        factors = np.linalg.cholesky((turn * scale**2) @ turn.transpose(0, 2, 1))
        return _Mixture(np.full(self.n_blades, 1.0 / self.n_blades), turn[:, :, 0], factors)

    def _turn(self, X, sign):
        angle = sign * self.twist * np.linalg.norm(X, axis=1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.column_stack([cos * X[:, 0] - sin * X[:, 1], sin * X[:, 0] + cos * X[:, 1]])

    def _draw(self, n_samples, rng):
        return self._turn(self._mixture.draw(n_samples, rng), 1.0)

    def _log_density(self, X):
        return self._mixture.log_density(self._turn(X, -1.0))


@dataclass(frozen=True)
class Banana(_Law):
    """Gaussian bent along a parabola.

    ``x_1 ~ N(0, 1)`` and ``x_2 | x_1 ~ N(curvature (x_1^2 - 1), noise^2)``; after Haario,
    Saksman and Tamminen, Computational Statistics, 1999.
    """

    curvature: float = 1.0
    noise: float = 0.3
    name: ClassVar[str] = "banana"

    def _draw(self, n_samples, rng):
        X = rng.standard_normal((n_samples, 2))
        X[:, 1] = self.noise * X[:, 1] + self.curvature * (X[:, 0] ** 2 - 1)
        return X

    def _log_density(self, X):
        mean = self.curvature * (X[:, 0] ** 2 - 1)
        return _log_normal(X[:, 0]) + _log_normal(X[:, 1], mean, self.noise)


@dataclass(frozen=True)
class Funnel(_Law):
    """Neal's funnel: one column sets the scale of all others.

    ``x_1 ~ N(0, scale^2)`` and ``x_j | x_1 ~ N(0, exp(x_1))`` for j > 1; Neal, "Slice sampling",
    Annals of Statistics, 2003 (there: scale 3, ten columns).
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
        rest = _log_normal(X[:, 1:], 0.0, np.exp(X[:, :1] / 2))
        return _log_normal(X[:, 0], 0.0, self.scale) + rest.sum(1)


@dataclass(frozen=True)
class GaussianMixtureLaw(_MixtureLaw):
    """Mixture of correlated Gaussians drawn once from ``seed``.

    sum_j w_j N(m_j, S_j) with w ~ Dirichlet(5), m_j ~ N(0, 4 I) and S_j = A A^T / d + I / 10,
    the entries of A standard normal.
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
        return _Mixture(weights, means, np.linalg.cholesky(covariances))


@dataclass(frozen=True)
class MultivariateT(_Law):
    """Multivariate Student t with ``df`` degrees of freedom, centre 0 and scale matrix R.

    R has entries ``correlation^|i - j|``;
    ``p(x) = Gamma((df + d)/2) / (Gamma(df/2) (df pi)^(d/2) |R|^(1/2))
    (1 + x^T R^-1 x / df)^(-(df + d)/2)``.
    """

    n_features: int = 5
    df: float = 3.0
    correlation: float = 0.7
    name: ClassVar[str] = "multivariate_t"

    @cached_property
    def _factor(self):
        return _decaying_correlation(self.n_features, self.correlation)

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
class GammaCopula(_Law):
    """Gaussian copula with gamma marginals of unit scale and the given ``shapes``.

    ``x_j = F_j^-1(Phi(z_j))`` with ``z ~ N(0, R)``, ``R_ij = correlation^|i - j|``, so that
    ``log p(x) = log N(z; 0, R) + sum_j [log f_j(x_j) - log N(z_j; 0, 1)]``. See Nelsen, "An
    introduction to copulas", 2006.
    """

    shapes: tuple = (1.5, 2.0, 3.0, 5.0, 8.0)
    correlation: float = 0.7
    name: ClassVar[str] = "gamma_copula"

    @property
    def n_features(self):
        """Number of columns, one per shape."""
        return len(self.shapes)

    @cached_property
    def _factor(self):
        return _decaying_correlation(self.n_features, self.correlation)

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
        marginal = (shapes - 1) * np.log(x) - x - gammaln(shapes) - _log_normal(z)
        return np.where(inside, _log_normal_factor(z, self._factor) + marginal.sum(1), -np.inf)


@dataclass(frozen=True)
class ShearedGaussian(_Law):
    """Gaussian whose columns each lean on the one before.

    x_1 = e_1 and x_j = ``shear`` x_{j-1} + e_j with e ~ N(0, I): a map of unit Jacobian, so that
    log p(x) = log N(e; 0, I).
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
        return _log_normal(e).sum(1)


LAWS = {
    law.name: law
    for law in (
        Claw(),
        EightGaussians(),
        TwoMoons(),
        Checkerboard(),
        Rings(),
        Pinwheel(),
        Spirals(),
        Banana(),
        MultivariateT(),
        GammaCopula(),
        Funnel(),
        GaussianMixtureLaw(),
        ShearedGaussian(),
    )
}
"""One law of each kind at its default parameters, by name."""


def _draws(law_class):
    """Append to the docstring of a ``make_*`` function the sections that all share."""

    def decorate(function):
        law = law_class.__name__
        own = [
            k for k in function.__kwdefaults__ if k not in ("random_state", "return_log_density")
        ]
        parameters = f"{', '.join(own)} : see :class:`{law}`\n    Parameters of the law.\n"
        # Under ``python -OO`` there is no docstring to append to.
        function.__doc__ = (
            (function.__doc__ or "")
            + f"""

Parameters
----------
n_samples : int, default=1000
    Number of rows.
{parameters if own else ""}random_state : int, RandomState instance or None, default=None
    Pass an int for reproducible rows.
return_log_density : bool, default=False
    Also return the exact log-density of the rows.

Returns
-------
X : ndarray of shape (n_samples, n_features)
    The rows.
log_density : ndarray of shape (n_samples,)
    In nats. Only if ``return_log_density``.

See Also
--------
{law} : The law as an object, with its formula and source.
"""
        )
        return function

    return decorate


def _rows(law, n_samples, random_state, return_log_density):
    X = law.sample(n_samples, random_state)
    return (X, law.log_density(X)) if return_log_density else X


@_draws(Claw)
def make_claw(n_samples=1000, *, random_state=None, return_log_density=False):
    """Claw density in one dimension, a normal with five narrow spikes."""
    law = Claw()
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(EightGaussians)
def make_eight_gaussians(
    n_samples=1000, *, radius=2.0, noise=0.25, random_state=None, return_log_density=False
):
    """Eight equal spherical Gaussians of deviation ``noise`` on a circle of radius ``radius``."""
    law = EightGaussians(radius=radius, noise=noise)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(TwoMoons)
def make_two_moons(n_samples=1000, *, noise=0.1, random_state=None, return_log_density=False):
    """Two interleaving half circles with Gaussian noise, as :func:`sklearn.datasets.make_moons`."""
    law = TwoMoons(noise=noise)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(Spirals)
def make_spirals(n_samples=1000, *, noise=0.1, random_state=None, return_log_density=False):
    """Two spiral arms with Gaussian noise."""
    law = Spirals(noise=noise)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(Checkerboard)
def make_checkerboard(n_samples=1000, *, n_cells=4, random_state=None, return_log_density=False):
    """Uniform on every other unit square of a board of ``n_cells`` x ``n_cells`` about 0."""
    law = Checkerboard(n_cells=n_cells)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(Rings)
def make_rings(
    n_samples=1000, *, radii=(1.0, 2.0, 3.0), noise=0.1, random_state=None, return_log_density=False
):
    """Equal mixture of concentric circles with isotropic Gaussian noise."""
    law = Rings(radii=radii, noise=noise)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(Pinwheel)
def make_pinwheel(
    n_samples=1000,
    *,
    n_blades=5,
    radial_scale=0.3,
    tangential_scale=0.1,
    twist=1.2,
    random_state=None,
    return_log_density=False,
):
    """Blades of Gaussians about the origin, twisted in proportion to the distance from it."""
    law = Pinwheel(
        n_blades=n_blades, radial_scale=radial_scale, tangential_scale=tangential_scale, twist=twist
    )
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(Banana)
def make_banana(
    n_samples=1000, *, curvature=1.0, noise=0.3, random_state=None, return_log_density=False
):
    """Gaussian bent along a parabola."""
    law = Banana(curvature=curvature, noise=noise)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(Funnel)
def make_funnel(
    n_samples=1000, *, n_features=10, scale=1.0, random_state=None, return_log_density=False
):
    """Neal's funnel: one column sets the scale of all others."""
    law = Funnel(n_features=n_features, scale=scale)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(GaussianMixtureLaw)
def make_gaussian_mixture(
    n_samples=1000,
    *,
    n_features=10,
    n_components=5,
    seed=0,
    random_state=None,
    return_log_density=False,
):
    """Mixture of correlated Gaussians drawn once from ``seed``."""
    law = GaussianMixtureLaw(n_features=n_features, n_components=n_components, seed=seed)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(MultivariateT)
def make_multivariate_t(
    n_samples=1000,
    *,
    n_features=5,
    df=3.0,
    correlation=0.7,
    random_state=None,
    return_log_density=False,
):
    """Multivariate Student t with ``df`` degrees of freedom, centre 0 and scale matrix R."""
    law = MultivariateT(n_features=n_features, df=df, correlation=correlation)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(GammaCopula)
def make_gamma_copula(
    n_samples=1000,
    *,
    shapes=(1.5, 2.0, 3.0, 5.0, 8.0),
    correlation=0.7,
    random_state=None,
    return_log_density=False,
):
    """Gaussian copula with gamma marginals of unit scale and the given ``shapes``."""
    law = GammaCopula(shapes=shapes, correlation=correlation)
    return _rows(law, n_samples, random_state, return_log_density)


@_draws(ShearedGaussian)
def make_sheared_gaussian(
    n_samples=1000, *, n_features=20, shear=1.0, random_state=None, return_log_density=False
):
    """Gaussian whose columns each lean on the one before."""
    law = ShearedGaussian(n_features=n_features, shear=shear)
    return _rows(law, n_samples, random_state, return_log_density)
