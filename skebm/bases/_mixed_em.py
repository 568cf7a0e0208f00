"""Expectation-maximisation for mixtures of rows with states and values.

Values that a row has not are integrated out, not filled in. Rows that have the same values are
taken together: under a component with mean mu and covariance Sigma, the expected first and second
moments of all values follow from those of the values o that are there,

    E v = A v_o + c,    E v v' = A E[v_o v_o'] A' + ... + Sigma given v_o,
    A = [1; Sigma_mo Sigma_oo^-1],

so that no row is touched for it (Little & Rubin 2002, chapter 11).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skebm._layout import Layout

from ._em import with_prior
from ._mixed import MixedMixtureBase, patterns
from ._mixtures import _LOG_2PI

_STARTING_ROWS = 4_000
_HALF = 0.5  # of a row, for every state that no row shows


class _Group(NamedTuple):
    """Rows that have the same values."""

    rows: Tensor | slice
    present: Tensor  # which values these are
    features: Tensor  # one, the values and their products, (n, n_functions)


def fit_mixed_mixture(
    x: Tensor,
    layout: Layout,
    n_components: int,
    rng: torch.Generator,
    *,
    diagonal: bool = False,
    sample_weight: Tensor | None = None,
    start: MixedMixtureBase | None = None,
    prior_strength: float = 1.0,
    reg_covar: float = 1e-6,
    max_iter: int = 80,
    tol: float = 1e-3,
) -> MixedMixtureBase:
    """Fit a mixture of products of categorical distributions and a Gaussian.

    Parameters
    ----------
    x : Tensor of shape (n_samples, n_features), float64
    layout : Layout
    n_components : int
    rng : torch.Generator
        Draws the starting centres.
    diagonal : bool, default=False
        Diagonal covariances, which take no longer with many patterns of absent values.
    sample_weight : Tensor of shape (n_samples,), default=None
    start : MixedMixtureBase, default=None
        Mixture to start from, in place of k-means++ centres.
    prior_strength : float, default=1.0
        Number of pseudo-rows per component, for the covariances, see :func:`fit_gaussian_mixture`.
        For the masses of states it is one, which shows them as often as all rows do.
    reg_covar : float, default=1e-6
    max_iter : int, default=80
    tol : float, default=1e-3
        Stop when the mean log-likelihood gains less, in nats.

    Returns
    -------
    MixedMixtureBase

    See Also
    --------
    MixedMixtureBase : What is returned.
    fit_gaussian_mixture : The same for rows of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import fit_mixed_mixture
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> rows = torch.as_tensor(columns.encode(np.tile(X, (20, 1))))
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture = fit_mixed_mixture(rows, columns.layout, 2, rng)
    >>> kinds = mixture.sample(1000, rng)[:, 0]
    >>> abs(kinds.mean().item() - 0.6) < 0.1  # three of five rows are of kind 1
    True
    """
    n = len(x)
    weight = torch.ones(n, dtype=x.dtype) if sample_weight is None else sample_weight
    weight = weight / weight.sum()
    strength = prior_strength / n
    values, states = layout.values(x), layout.one_hot(x)
    there = (~values.isnan()).to(x.dtype)
    filled = torch.where(values.isnan(), 0.0, values)
    center = weight @ filled / (weight @ there).clamp(min=1e-300)
    values, filled = values - center, (filled - center) * there
    seen = weight @ states
    # how often every state is shown, none of them never
    sizes = list(layout.sizes)
    usual = (
        torch.cat([(s + _HALF / n) / (s + _HALF / n).sum() for s in seen.split(sizes)])
        if sizes
        else seen
    )
    if diagonal:
        groups = None
        features = torch.cat([there, filled, filled.square()], dim=1)
    else:
        groups = [
            _Group(rows, present, _quadratic(values[rows][:, present]))
            for rows, present in patterns(values)
        ]
        features = None

    def masses_of(shares):
        """Probabilities of the states, (n_components, sum of sizes)."""
        joint = shares.mT @ states
        total = shares.sum(0)[:, None]
        return (joint + usual / n) / (total + 1.0 / n)

    def expect(weights, masses, means, covariances):
        """Log-density of every row under every component, with its weight."""
        joint = weights.log() + states @ masses.log().mT
        if groups is None:
            variance = covariances.diagonal(dim1=-2, dim2=-1)
            constant = -0.5 * (variance.log() + _LOG_2PI + means.square() / variance)
            return joint + features @ torch.cat([constant, means / variance, -0.5 / variance], 1).mT
        for group in groups:
            if len(group.present):
                joint[group.rows] += group.features @ _natural(means, covariances, group.present)
        return joint

    def maximise(shares, old_means, old_covariances):
        """Means and covariances of weighted rows, (n, n_components)."""
        mass = shares.sum(0).clamp(min=1e-300)
        if groups is None:
            moments = (shares.mT @ features).view(len(mass), 3, layout.n_values)
            count, first, second = moments.unbind(1)
            few = count < 1e-12  # no row of the component has a value there
            count = count.clamp(min=1e-300)
            means = torch.where(few, old_means, first / count)
            variance = second / count - means.square()
            old = old_covariances.diagonal(dim1=-2, dim2=-1)
            covariance = torch.diag_embed(torch.where(few, old, variance))
        else:
            first, second = 0.0, 0.0
            for group in groups:
                own = shares[group.rows]
                moments = _expected(group, own, old_means, old_covariances)
                first, second = first + moments[0], second + moments[1]
            means = first / mass[:, None]
            covariance = second / mass[:, None, None] - means[:, :, None] * means[:, None, :]
        return means, with_prior(mass, means, covariance, strength, reg_covar)

    if start is None:
        shares = _start(filled, states, weight, n_components, rng)
        identity = torch.diag_embed(
            (weight @ filled.square() / (weight @ there).clamp(min=1e-300)).clamp(min=1e-8)
        ).expand(n_components, -1, -1)
        zeros = torch.zeros(n_components, layout.n_values, dtype=x.dtype)
        means, covariances = maximise(shares, zeros, identity)
        weights, masses = shares.sum(0), masses_of(shares)
    else:
        weights, masses = start.weights, start.log_masses.exp().mT
        means, covariances = start.means - center, start.covariances
    previous = -math.inf
    for _ in range(max_iter):
        joint = expect(weights, masses, means, covariances)
        top = joint.amax(1, keepdim=True)
        joint.sub_(top).exp_()
        total = joint.sum(1, keepdim=True)
        value = (weight @ (total.log() + top)).item()
        shares = joint.mul_(weight[:, None] / total)
        means, covariances = maximise(shares, means, covariances)
        weights, masses = shares.sum(0).clamp(min=1e-300), masses_of(shares)
        if value - previous < tol:
            break
        previous = value
    by_column = masses.split(sizes, dim=1) if sizes else []
    by_column = [m / m.sum(1, keepdim=True) for m in by_column]
    return MixedMixtureBase(layout, weights, by_column, means + center, covariances)


def _quadratic(v):
    """One, the values, and their products, (n, 1 + m + m (m + 1) / 2)."""
    row, column = torch.triu_indices(v.shape[1], v.shape[1])
    one = torch.ones(len(v), 1, dtype=v.dtype)
    return torch.cat([one, v, v[:, row] * v[:, column]], dim=1)


def _natural(means, covariances, present):
    """Coefficients of the log-densities of some values on `_quadratic`, (n_functions, k)."""
    m = len(present)
    row, column = torch.triu_indices(m, m)
    mean = means[:, present]
    tril = torch.linalg.cholesky(covariances[:, present[:, None], present])
    precision = torch.cholesky_inverse(tril)
    linear = (precision @ mean[:, :, None])[:, :, 0]
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = -log_det - 0.5 * (linear * mean).sum(-1) - 0.5 * m * _LOG_2PI
    quadratic = -precision[:, row, column]
    quadratic[:, row == column] *= 0.5
    return torch.cat([constant[:, None], linear, quadratic], dim=1).mT


def _expected(group, shares, means, covariances):
    """Expected first and second moments of all values, (k, d) and (k, d, d), given those there."""
    k, d = means.shape
    o, m = group.present, len(group.present)
    moments = shares.mT @ group.features
    mass, first = moments[:, 0], moments[:, 1 : m + 1]
    second = means.new_zeros(k, m, m)
    row, column = torch.triu_indices(m, m)
    second[:, row, column] = moments[:, m + 1 :]
    second[:, column, row] = moments[:, m + 1 :]
    if m == d:
        return first, second
    absent = torch.ones(d, dtype=torch.bool)
    absent[o] = False
    a = absent.nonzero().squeeze(1)
    there = covariances[:, o[:, None], o]
    across = covariances[:, a[:, None], o]  # (k, d - m, m)
    slope = torch.linalg.solve(there, across.mT).mT if m else across
    lift = means.new_zeros(k, d, m)
    lift[:, o, torch.arange(m)] = 1.0
    lift[:, a] = slope
    constant = means.new_zeros(k, d)
    constant[:, a] = means[:, a] - (slope @ means[:, o, None])[:, :, 0]
    rest = means.new_zeros(k, d, d)
    rest[:, a[:, None], a] = covariances[:, a[:, None], a] - slope @ across.mT
    lifted = (lift @ first[:, :, None])[:, :, 0]
    cross = lifted[:, :, None] * constant[:, None, :]
    square = constant[:, :, None] * constant[:, None, :] + rest
    return (
        lifted + mass[:, None] * constant,
        lift @ second @ lift.mT + cross + cross.mT + mass[:, None, None] * square,
    )


def _start(filled, states, weight, n_components, rng):
    """Hard assignment to k-means++ centres of values and indicators of states."""
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    points = torch.cat([filled, states], dim=1).numpy()
    subset = np.random.RandomState(seed).permutation(len(points))[:_STARTING_ROWS]
    distinct = len(np.unique(points[subset], axis=0))
    found = KMeans(min(n_components, distinct), n_init=1, max_iter=5, random_state=seed).fit(  # pyright: ignore[reportArgumentType]
        points[subset], sample_weight=weight[subset].numpy()
    )
    labels = torch.as_tensor(found.predict(points)).long()
    hard = torch.nn.functional.one_hot(labels, n_components).to(filled.dtype)
    return hard * weight[:, None]
