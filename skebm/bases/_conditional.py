r"""Conditionals of mixtures: how cells that are not known are distributed, given the others.

A mixture given some cells, a, is a mixture of the same components,

.. math:: q(b \mid a) = \sum_j \frac{w_j q_j(a)}{\sum_i w_i q_i(a)} \; q_j(b \mid a),

and so it is in other coordinates of single columns, and for stacks of such mixtures.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor

from ._combine import StackedBase, TransformedBase
from ._mixed import _CELLS, MixedKernelBase, MixedMixtureBase, patterns, states_of
from ._mixtures import _LOG_2PI, GaussianMixtureBase, KernelDensityBase


class Conditional(Protocol):
    """What the components of a mixture say of some cells, given the others.

    Rows are as wide as those of the distribution; what they hold in open cells does not matter.
    """

    n_components: int

    def log_joint(self, x: Tensor) -> Tensor:
        """Log-densities of the known cells under the components, with their weights, (n, J)."""
        ...

    def draw(self, x: Tensor, which: Tensor, u: Tensor) -> Tensor:
        """Rows whose open cells are drawn, each from the component that is named, (n, d).

        What is random about them are uniform numbers u in (0, 1), one per cell, (n, d).
        """
        ...

    def quantiles(self, x: Tensor, row: Tensor, which: Tensor, z: Tensor) -> Tensor:
        """Quantiles of the only open value, of m pairs of a row and a component, (m, n_levels).

        Levels are given as quantiles z of the standard normal distribution.
        """
        ...

    def cdf(self, x: Tensor, row: Tensor, which: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution function of the only open value, and its log-density, of m pairs.

        `at` has the points of every row, (n, n_points); what is returned (m, n_points).
        """
        ...


@singledispatch
def condition(distribution: Any, known: Tensor, excluded: Sequence[int] = ()) -> Conditional | None:
    """Conditional distributions of a mixture, given some of its columns.

    Parameters
    ----------
    distribution : distribution
    known : Tensor of bool of shape (n_features,)
    excluded : sequence of int, default=()
        Of every column of states one that it does not show if it is open, which is given as well;
        -1 for none.

    Returns
    -------
    Conditional or None
        None where there is no closed form. Of a stack it is that of the distributions that have
        one, with their weights.

    See Also
    --------
    marginal : Some columns alone.
    skebm.models.Conditioner : For models that are more than a mixture.
    skebm.estimators.ConditionalDensity : For estimators, in the units of X.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase, condition
    >>> mixture = GaussianMixtureBase([1.0], [[0.0, 0.0]], [[[1.0, 0.9], [0.9, 1.0]]])
    >>> given_first = condition(mixture, torch.tensor([True, False]))
    >>> x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)  # the open cell may hold anything
    >>> row = which = torch.tensor([0])
    >>> levels = torch.zeros(1, dtype=torch.float64)  # the median
    >>> given_first.quantiles(x, row, which, levels)  # 0.9 times 2
    tensor([[1.8000]], dtype=torch.float64)
    """
    return None


class _Normals:
    """Gaussians of their last columns, given the first ones.

    Parameters
    ----------
    means : Tensor of shape (J, d)
    precision : Tensor of shape (J, d, d), or (1, d, d) if they share it
    n_known : int
    """

    def __init__(self, means: Tensor, precision: Tensor, n_known: int):
        tril = torch.linalg.cholesky(precision[:, n_known:, n_known:])
        eye = torch.eye(tril.shape[1], dtype=tril.dtype, device=tril.device)
        self._root = torch.linalg.solve_triangular(tril, eye, upper=False)
        self._slope = -torch.cholesky_solve(precision[:, n_known:, :n_known], tril).mT
        self._constant = means[:, n_known:] - (means[:, None, :n_known] @ self._slope).squeeze(1)

    def mean(self, given: Tensor, which: Tensor) -> Tensor:
        """Means under the components that are named, (n, n_known) -> (n, n_open)."""
        return self._constant[which] + _times(given, self._slope, which)

    def draw(self, given: Tensor, which: Tensor, u: Tensor) -> Tensor:
        """Draws of the same by uniform numbers, (n, n_open)."""
        return self.mean(given, which) + _times(torch.special.ndtri(u), self._root, which)

    def moments(self, given: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a single open column, (n,) each."""
        deviation = self._root[:, 0, 0].expand(len(self._constant))
        return self.mean(given, which)[:, 0], deviation[which]


def _times(rows, matrices, which):
    """Each row by the matrix of its component, or by the one that all share."""
    if len(matrices) == 1:
        return rows @ matrices[0]
    return torch.bmm(rows[:, None], matrices[which]).squeeze(1)


class _Part(ABC):
    """Conditionals of one mixture, in the coordinates in which it is one."""

    def __init__(self, distribution: Any, known: Tensor):
        self.n_components = len(distribution.weights)
        self.kept, self.open = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)
        if len(self.kept):
            self._joint = distribution.marginal(self.kept.tolist())._joint
        else:
            self._joint = lambda x: distribution.weights.log().expand(len(x), -1)

    def log_joint(self, x: Tensor) -> Tensor:
        return self._joint(x[:, self.kept])

    @abstractmethod
    def _moments(self, x, which) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the only open value, (n,) each."""

    def quantiles(self, x: Tensor, row: Tensor, which: Tensor, z: Tensor) -> Tensor:
        mean, deviation = self._moments(x[row], which)
        return mean[:, None] + deviation[:, None] * z

    def cdf(self, x: Tensor, row: Tensor, which: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self._moments(x[row], which)
        z = (at[row] - mean[:, None]) / deviation[:, None]
        return torch.special.ndtr(z), -0.5 * (z.square() + _LOG_2PI) - deviation.log()[:, None]


class _OfNumbers(_Part):
    """Components are Gaussians."""

    def __init__(self, distribution: Any, means: Tensor, known: Tensor):
        super().__init__(distribution, known)
        order = torch.cat([self.kept, self.open])
        precision = distribution.whitening @ distribution.whitening.mT
        precision = precision.view(-1, *precision.shape[-2:])[:, order[:, None], order]
        if isinstance(distribution, KernelDensityBase):
            precision = precision / distribution.widths.square()[:, None, None]
        self._normals = _Normals(means[:, order], precision, len(self.kept))

    def draw(self, x: Tensor, which: Tensor, u: Tensor) -> Tensor:
        x = x.clone()
        x[:, self.open] = self._normals.draw(x[:, self.kept], which, u[:, self.open])
        return x

    def _moments(self, x, which):
        return self._normals.moments(x[:, self.kept], which)


@condition.register
def _(
    distribution: GaussianMixtureBase, known: Tensor, excluded: Sequence[int] = ()
) -> Conditional:
    return _OfNumbers(distribution, distribution.means, known)


@condition.register
def _(distribution: KernelDensityBase, known: Tensor, excluded: Sequence[int] = ()) -> Conditional:
    return _OfNumbers(distribution, distribution.centers, known)


class _WithStates(_Part):
    """Within components, states are independent of each other and of the values."""

    def __init__(self, distribution: Any, known: Tensor, excluded: Sequence[int] = ()):
        super().__init__(distribution, known)
        self.distribution, self.layout = distribution, distribution.layout
        self.excluded = {i: s for i, s in enumerate(excluded) if s >= 0 and not known[i]}
        self.known_states, self.known_values = known.split(
            [self.layout.n_states, self.layout.n_values]
        )
        self.open_values = (~self.known_values).nonzero().squeeze(1)

    def log_joint(self, x: Tensor) -> Tensor:
        joint = super().log_joint(x)
        for i, state in self.excluded.items():
            joint = joint + (1.0 - self._masses(i)[:, state]).log()
        return joint

    def draw(self, x: Tensor, which: Tensor, u: Tensor) -> Tensor:
        states, values = x[:, : self.layout.n_states], self.layout.values(x).clone()
        drawn = self._draw_states(which, u[:, : self.layout.n_states]).to(states)
        own = self.layout.values(u)[:, self.open_values]
        values[:, self.open_values] = self._draw_values(values, which, own)
        return self.layout.join(torch.where(self.known_states, states, drawn).long(), values)

    def _draw_states(self, which, u):
        codes = self._states(which, u)
        for i, state in self.excluded.items():
            masses = self._masses(i).clone()
            masses[:, state] = 0.0
            steps = masses.cumsum(1)[which]
            codes[:, i] = (u[:, i, None] * steps[:, -1:] > steps[:, :-1]).sum(1)
        return codes

    @abstractmethod
    def _states(self, which, u) -> Tensor:
        """States of components by uniform numbers, (n, n_states)."""

    @abstractmethod
    def _masses(self, i) -> Tensor:
        """Probabilities of the states of a column in every component, (n_components, size)."""

    @abstractmethod
    def _draw_values(self, values, which, u) -> Tensor:
        """Open values of components by uniform numbers, (n, n_open)."""


@condition.register(MixedMixtureBase)
class _OfMixedMixture(_WithStates):
    def _by_pattern(self, values):
        """Rows with the same known values, which these are, and the Gaussians of open ones."""
        of = self.distribution
        for rows, there in patterns(torch.where(self.known_values, values, torch.nan)):
            columns = torch.cat([there, self.open_values])
            covariances = of.covariances[:, columns[:, None], columns]
            precision = torch.cholesky_inverse(torch.linalg.cholesky(covariances))
            yield rows, there, _Normals(of.means[:, columns], precision, len(there))

    def _states(self, which, u):
        return states_of(self.distribution.masses, which, u)

    def _masses(self, i):
        return self.distribution.masses[i]

    def _draw_values(self, values, which, u):
        drawn = torch.empty_like(u)
        for rows, there, normals in self._by_pattern(values):
            drawn[rows] = normals.draw(values[rows][:, there], which[rows], u[rows])
        return drawn

    def _moments(self, x, which):
        values = self.layout.values(x)
        mean, deviation = values.new_empty(2, len(values))
        for rows, there, normals in self._by_pattern(values):
            mean[rows], deviation[rows] = normals.moments(values[rows][:, there], which[rows])
        return mean, deviation


@condition.register(MixedKernelBase)
class _OfMixedKernel(_WithStates):
    """All columns are independent within a component."""

    def _states(self, which, u):
        return self.distribution.states_around(which, u)

    def _masses(self, i):
        return self.distribution.masses_around(i)

    def _draw_values(self, values, which, u):
        mean, deviation = (a[which][:, self.open_values] for a in self.distribution.around())
        return mean + deviation * torch.special.ndtri(u)

    def _moments(self, x, which):
        mean, deviation = (a[which][:, self.open_values[0]] for a in self.distribution.around())
        return mean, deviation


class _InCoordinates:
    """Of a mixture in other coordinates of single columns."""

    def __init__(self, base: Conditional, transform: Any, known: Tensor):
        self.base = base
        self.n_components = base.n_components
        self.kept, self.open = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)
        self._to_known = transform.marginal(self.kept.tolist())
        self._to_open = transform.marginal(self.open.tolist())

    def _mapped(self, x):
        """Rows whose known cells are in these coordinates, and their log-determinants."""
        z = torch.full_like(x, torch.nan)
        if not len(self.kept):
            return z, x.new_zeros(len(x))
        z[:, self.kept], log_det = self._to_known(x[:, self.kept])
        return z, log_det

    def log_joint(self, x: Tensor) -> Tensor:
        z, log_det = self._mapped(x)
        return self.base.log_joint(z) + log_det[:, None]

    def draw(self, x: Tensor, which: Tensor, u: Tensor) -> Tensor:
        drawn, x = self.base.draw(self._mapped(x)[0], which, u), x.clone()
        if len(self.open):
            x[:, self.open] = self._to_open.inverse(drawn[:, self.open])
        return x

    def quantiles(self, x: Tensor, row: Tensor, which: Tensor, z: Tensor) -> Tensor:
        found = self.base.quantiles(self._mapped(x)[0], row, which, z)
        return self._to_open.inverse(found.view(-1, 1)).view(found.shape)

    def cdf(self, x: Tensor, row: Tensor, which: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        z_at, log_slope = self._to_open(at.reshape(-1, 1))
        own = self.base.cdf(self._mapped(x)[0], row, which, z_at.view(at.shape))
        return own[0], own[1] + log_slope.view(at.shape)[row]


@condition.register
def _(
    distribution: TransformedBase, known: Tensor, excluded: Sequence[int] = ()
) -> Conditional | None:
    base = condition(distribution.base, known, excluded)
    return None if base is None else _InCoordinates(base, distribution.transform, known)


class _Stacked:
    """Components of several conditionals, one after the other."""

    def __init__(self, parts: list[Any], weights: list[float]):
        self.parts, self.log_weights = parts, [math.log(w / sum(weights)) for w in weights]
        self.n_components = sum(part.n_components for part in parts)

    def log_joint(self, x: Tensor) -> Tensor:
        pairs = zip(self.parts, self.log_weights, strict=True)
        return torch.cat([part.log_joint(x) + weight for part, weight in pairs], dim=1)

    def _of_parts(self, which):
        """Parts with a component that is named: where these are, and which ones of the part."""
        start = 0
        for part in self.parts:
            own = which - start
            rows = ((own >= 0) & (own < part.n_components)).nonzero().squeeze(1)
            if len(rows):
                yield part, rows, own[rows]
            start += part.n_components

    def draw(self, x: Tensor, which: Tensor, u: Tensor) -> Tensor:
        drawn = torch.empty_like(x)
        for part, rows, own in self._of_parts(which):
            drawn[rows] = part.draw(x[rows], own, u[rows])
        return drawn

    def quantiles(self, x: Tensor, row: Tensor, which: Tensor, z: Tensor) -> Tensor:
        found = x.new_empty(len(which), len(z))
        for part, pairs, own in self._of_parts(which):
            found[pairs] = part.quantiles(x, row[pairs], own, z)
        return found

    def cdf(self, x: Tensor, row: Tensor, which: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        share, log_density = x.new_empty(2, len(which), at.shape[1])
        for part, pairs, own in self._of_parts(which):
            share[pairs], log_density[pairs] = part.cdf(x, row[pairs], own, at)
        return share, log_density


@condition.register
def _(distribution: StackedBase, known: Tensor, excluded: Sequence[int] = ()) -> Conditional | None:
    pairs = zip(distribution.components, distribution.weights.tolist(), strict=True)
    found = [(condition(q, known, excluded), weight) for q, weight in pairs]
    kept = [(part, weight) for part, weight in found if part is not None]
    return _Stacked(*map(list, zip(*kept, strict=True))) if kept else None


def mixture_part(distribution: Any) -> Any:
    """What is left of a distribution without the parts whose conditionals have no closed form.

    Parameters
    ----------
    distribution : distribution

    Returns
    -------
    distribution or None
    """
    if not isinstance(distribution, StackedBase):
        nothing = torch.zeros(distribution.n_features, dtype=torch.bool)
        return None if condition(distribution, nothing) is None else distribution
    pairs = zip(distribution.components, distribution.weights.tolist(), strict=True)
    found = [(mixture_part(q), weight) for q, weight in pairs]
    kept = [(q, weight) for q, weight in found if q is not None]
    if len(kept) == len(found):
        return distribution
    return StackedBase(*zip(*kept, strict=True)) if kept else None


def values_given_states(distribution: Any, codes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the values of a mixture under given states, by random numbers that all states share.

    What follows from the draws is a function of the states alone. States and values are independent
    within a component, so that the same values are drawn under many states.

    Parameters
    ----------
    distribution : distribution of rows with states
        A mixture or kernel density of them, in any marginal coordinates, or a stack of such.
    codes : Tensor of shape (n, n_states)
    points : Tensor of shape (m, 1 + n_values)
        Uniform random numbers in (0, 1): the first decides on the component. A low-discrepancy
        sequence will do.

    Returns
    -------
    values : Tensor of shape (n_distinct, n_values)
        Draws, each of them once.
    index : Tensor of shape (n, m)
        Which of these are drawn under which states.

    See Also
    --------
    MixedMixtureBase : A distribution of rows with states.
    skebm.models.StateDraws : The same for all members of an ensemble.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import fit_mixed_mixture, values_given_states
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> rows = torch.as_tensor(columns.encode(np.tile(X, (20, 1))))
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture = fit_mixed_mixture(rows, columns.layout, 2, rng)
    >>> points = torch.rand(100, 2, generator=rng, dtype=torch.float64)
    >>> values, index = values_given_states(mixture, torch.tensor([[0], [1]]), points)
    >>> sizes = values[index].squeeze(-1)
    >>> bool(sizes[0].mean() > sizes[1].mean())  # rows of kind 0 are larger
    True
    """
    n_values = distribution.n_features - codes.shape[1]
    codes = codes.to(points)
    rows = torch.cat([codes, codes.new_full((len(codes), n_values), torch.nan)], dim=1)
    conditional: Any = condition(distribution, ~rows[0].isnan())
    which = torch.cat(
        [
            _chosen(conditional.log_joint(some), points[:, 0])
            for some in rows.split(max(1, _CELLS // conditional.n_components))
        ]
    )
    pairs = which * len(points) + torch.arange(len(points), device=codes.device)
    distinct, index = pairs.unique(return_inverse=True)
    component, point = distinct // len(points), distinct % len(points)
    u = torch.cat([points.new_zeros(len(points), codes.shape[1]), points[:, 1:]], dim=1)
    any_states = torch.zeros_like(rows[:1])  # in state 0 all values are there
    drawn = conditional.draw(any_states.expand(len(distinct), -1), component, u[point])
    return drawn[:, codes.shape[1] :], index


def _chosen(log_weights, u):
    """Components, (n, m), by the inverse of their distribution function at m uniform numbers."""
    steps = log_weights.softmax(1).cumsum(1)[:, :-1].contiguous()  # the last has what is left
    return torch.searchsorted(steps, u.expand(len(steps), -1).contiguous(), right=True)
