"""Distributions in one and two columns."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.special import i0e, logsumexp

from ._distribution import Distribution, Mixture, MixtureDistribution, log_normal


@dataclass(frozen=True)
class Claw(MixtureDistribution):
    """Claw density in one dimension, a normal with five narrow spikes.

    p(x) = N(x; 0, 1) / 2 + sum_{l=0}^{4} N(x; l/2 - 1, 1/100) / 10: number 10 of Marron and
    Wand, "Exact mean integrated squared error", Annals of Statistics, 1992.

    See Also
    --------
    make_claw : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Claw
    >>> distribution = Claw()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 1), (3,))
    """

    name: ClassVar[str] = "claw"
    n_features: ClassVar[int] = 1

    @cached_property
    def _mixture(self):
        means = np.r_[0.0, np.arange(5) / 2 - 1][:, None]
        scales = np.r_[1.0, np.full(5, 0.1)][:, None, None]
        return Mixture(np.r_[0.5, np.full(5, 0.1)], means, scales)


@dataclass(frozen=True)
class EightGaussians(MixtureDistribution):
    """Eight equal spherical Gaussians of deviation ``noise`` on a circle of radius ``radius``.

    A customary test of generative models, as in Grathwohl et al., "FFJORD", ICLR 2019.

    Parameters
    ----------
    radius : float, default=2.0
        Of the circle.
    noise : float, default=0.25
        Standard deviation of each Gaussian.

    See Also
    --------
    make_eight_gaussians : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import EightGaussians
    >>> distribution = EightGaussians()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
    """

    radius: float = 2.0
    noise: float = 0.25
    name: ClassVar[str] = "eight_gaussians"

    @cached_property
    def _mixture(self):
        angle = np.arange(8) * np.pi / 4
        return Mixture.along_curve(
            self.radius * np.column_stack([np.cos(angle), np.sin(angle)]), self.noise
        )


@dataclass(frozen=True)
class TwoMoons(MixtureDistribution):
    """Two interleaving half circles with Gaussian noise, as :func:`sklearn.datasets.make_moons`.

    The points t on the two arcs (cos t, sin t) and (1 - cos t, 1/2 - sin t), 0 <= t <= pi, are
    the midpoints of 200 equal pieces of each, so that the density is a finite mixture and exact;
    at the default noise the pieces are far shorter than the noise is wide.

    Parameters
    ----------
    noise : float, default=0.1
        Standard deviation around an arc.

    See Also
    --------
    make_two_moons : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import TwoMoons
    >>> distribution = TwoMoons()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
    """

    noise: float = 0.1
    name: ClassVar[str] = "two_moons"

    @cached_property
    def _mixture(self):
        t = (np.arange(200) + 0.5) * np.pi / 200
        upper = np.column_stack([np.cos(t), np.sin(t)])
        return Mixture.along_curve(np.vstack([upper, [1.0, 0.5] - upper]), self.noise)


@dataclass(frozen=True)
class Spirals(MixtureDistribution):
    """Two spiral arms with Gaussian noise.

    Centres +-(t / 3)(-cos t, sin t) with t = 3 pi sqrt(u), u the midpoints of 300 equal pieces
    of [0, 1] (a finite mixture, hence exact). After the "2spirals" of Grathwohl et al.,
    "FFJORD", ICLR 2019.

    Parameters
    ----------
    noise : float, default=0.1
        Standard deviation around an arm.

    See Also
    --------
    make_spirals : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Spirals
    >>> distribution = Spirals()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
    """

    noise: float = 0.1
    name: ClassVar[str] = "spirals"

    @cached_property
    def _mixture(self):
        t = 3 * np.pi * np.sqrt((np.arange(300) + 0.5) / 300)
        arm = np.column_stack([-np.cos(t), np.sin(t)]) * t[:, None] / 3
        return Mixture.along_curve(np.vstack([arm, -arm]), self.noise)


@dataclass(frozen=True)
class Checkerboard(Distribution):
    """Uniform on every other unit square of a board of ``n_cells`` x ``n_cells`` about 0.

    p(x) = 1 / (number of squares) on squares (i, j) with i + j even, 0 elsewhere.

    Parameters
    ----------
    n_cells : int, default=4
        Squares along a side of the board.

    See Also
    --------
    make_checkerboard : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Checkerboard
    >>> distribution = Checkerboard()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
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
class Rings(Distribution):
    """Equal mixture of concentric circles with isotropic Gaussian noise.

    With s = ``noise``, a circle of radius R convolved with ``N(0, s^2 I)`` has the density
    ``exp(-(|x|^2 + R^2) / (2 s^2)) I_0(R |x| / s^2) / (2 pi s^2)`` (so that ``|x|`` is Rice).

    Parameters
    ----------
    radii : tuple of float, default=(1.0, 2.0, 3.0)
        Of the circles.
    noise : float, default=0.1
        Standard deviation around a circle.

    See Also
    --------
    make_rings : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Rings
    >>> distribution = Rings()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
    """

    radii: tuple[float, ...] = (1.0, 2.0, 3.0)
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
        log_p = np.log(i0e(radius * r / self.noise**2)) + 2 * log_normal(0.0, 0.0, self.noise)
        return logsumexp(log_p - 0.5 * ((r - radius) / self.noise) ** 2, axis=1) - np.log(
            len(radius)
        )


@dataclass(frozen=True)
class Pinwheel(Distribution):
    """Blades of Gaussians about the origin, twisted in proportion to the distance from it.

    Before the twist blade k is ``N((1, 0), diag(radial_scale^2, tangential_scale^2))`` turned by
    ``2 pi k / n_blades``; then x is turned by ``twist |x|``, a map of unit Jacobian.
    After Johnson et al., "Composing graphical models with neural networks", NeurIPS 2016, whose
    twist depends on the untwisted coordinate and leaves no closed density.

    Parameters
    ----------
    n_blades : int, default=5
        Number of blades.
    radial_scale : float, default=0.3
        Standard deviation along a blade.
    tangential_scale : float, default=0.1
        Standard deviation across it.
    twist : float, default=1.2
        Angle, in radians, by which a point at distance 1 is turned.

    See Also
    --------
    make_pinwheel : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Pinwheel
    >>> distribution = Pinwheel()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
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
        return Mixture(np.full(self.n_blades, 1.0 / self.n_blades), turn[:, :, 0], factors)

    def _turn(self, X, sign):
        angle = sign * self.twist * np.linalg.norm(X, axis=1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.column_stack([cos * X[:, 0] - sin * X[:, 1], sin * X[:, 0] + cos * X[:, 1]])

    def _draw(self, n_samples, rng):
        return self._turn(self._mixture.draw(n_samples, rng), 1.0)

    def _log_density(self, X):
        return self._mixture.log_density(self._turn(X, -1.0))


@dataclass(frozen=True)
class Banana(Distribution):
    """Gaussian bent along a parabola.

    ``x_1 ~ N(0, 1)`` and ``x_2 | x_1 ~ N(curvature (x_1^2 - 1), noise^2)``; after Haario,
    Saksman and Tamminen, Computational Statistics, 1999.

    Parameters
    ----------
    curvature : float, default=1.0
        Of the parabola; 0 leaves it straight.
    noise : float, default=0.3
        Standard deviation of the second column around the parabola.

    See Also
    --------
    make_banana : The same as a function that draws rows.

    Examples
    --------
    >>> from skebm.datasets import Banana
    >>> distribution = Banana()
    >>> X = distribution.sample(3, random_state=0)
    >>> X.shape, distribution.log_density(X).shape
    ((3, 2), (3,))
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
        return log_normal(X[:, 0]) + log_normal(X[:, 1], mean, self.noise)
