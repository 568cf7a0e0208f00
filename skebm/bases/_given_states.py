"""Values of mixtures under given states, by common random numbers.

States and values are independent within a component, so that under given states a mixture stays
one, with the weights that the components have after these are seen. The same random numbers serve
all states: what follows from the draws is a function of the states alone, and mixtures draw the
same values for many of them.
"""

from typing import Any

import torch
from torch import Tensor

from ._combine import StackedBase, TransformedBase
from ._mixed import _CELLS, MixedKernelBase

__all__ = ["values_given_states"]


def values_given_states(distribution: Any, codes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Draw all values under given states.

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
    leaves = list(_leaves(distribution))
    codes = codes.to(points)
    n_most = sum(len(q.weights) for q, _, _ in leaves)
    which = torch.cat(
        [
            _components(torch.cat([w + _log_weights(q, rows) for q, w, _ in leaves], 1), points)
            for rows in codes.split(max(1, _CELLS // n_most))
        ]
    )
    pairs = which * len(points) + torch.arange(len(points), device=codes.device)
    distinct, index = pairs.unique(return_inverse=True)
    component, point = distinct // len(points), distinct % len(points)
    normal = torch.special.ndtri(points[:, 1:])
    parts, start = [], 0
    for q, _, maps in leaves:  # in the order of their components, as pairs are
        own = (component >= start) & (component < start + len(q.weights))
        values = _values(q, component[own] - start, normal[point[own]])
        for to in maps:
            values = to.transform.inverse(values)
        parts.append(values)
        start += len(q.weights)
    return torch.cat(parts), index


def _leaves(distribution: Any, log_weight: Any = 0.0):
    """Mixtures that a distribution is made of, the logs of their weights, and maps of their values.

    The map that comes first is undone first.
    """
    if isinstance(distribution, StackedBase):
        for q, weight in zip(distribution.components, distribution.weights, strict=True):
            yield from _leaves(q, log_weight + weight.log())
    elif isinstance(distribution, TransformedBase):
        for q, weight, maps in _leaves(distribution.base, log_weight):
            yield q, weight, [*maps, distribution.transform]
    else:
        yield distribution, log_weight, []


def _log_weights(mixture, codes):
    """Log-probabilities of the states with that of the component, (n, n_components)."""
    of_states: Any = mixture.marginal(range(mixture.layout.n_states))
    return of_states._joint(codes)


def _components(log_weights, points):
    """Numbers of components, (n, m), by the inverse of their distribution function."""
    steps = log_weights.softmax(1).cumsum(1)[:, :-1].contiguous()  # the last has what is left
    return torch.searchsorted(steps, points[:, 0].expand(len(steps), -1).contiguous(), right=True)


def _values(mixture, component, normal):
    """Values of components, (n,) -> (n, n_values), from standard normal numbers."""
    if isinstance(mixture, MixedKernelBase):
        mean, deviation = mixture.around()
        return mean[component] + deviation[component] * normal
    values = torch.empty_like(normal)
    tril = torch.linalg.cholesky(mixture.covariances)
    for j in component.unique().tolist():
        rows = component == j
        values[rows] = mixture.means[j] + normal[rows] @ tril[j].mT
    return values
