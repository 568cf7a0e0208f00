"""Views: distributions of the same rows to which different rows are odd.

A row that lies apart from the others in one column, in the correlation of two, or in a gap inside
the range of all of them, is odd to one distribution and not to another. Each view is fitted once
per split, like a base, and without any choice of settings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from skebm._layout import Layout
from skebm._parallel import side_by_side
from skebm._random import spawn
from skebm._typing import Distribution

from ._candidates import (
    MAX_CENTERS,
    BaseCandidate,
    GaussianCandidate,
    MappedCandidate,
    Rows,
    moments,
)
from ._combine import ArcsinhTransform
from ._mixed import MixedKernelBase, ValuesTransform
from ._mixtures import KernelDensityBase

SHARP, ROUND, WIDE = 0.3, 1.0, 2.0
"""Widths of kernels, in standard deviations of the columns: of "sharp", "linear" and "wide"."""

N_NEIGHBORS = 20
"""A kernel of "local" is as wide as the distance to the neighbour of this number."""

MIN_WIDTH = 0.01
"""Narrowest kernel of "local", as a share of the median one."""

STATE_MIXING = 0.02
"""Probability with which kernels of states draw a state anew."""


class _FixedKernel(BaseCandidate):
    """Kernel density with one width, of independent columns or with their covariance."""

    def __init__(self, bandwidth, whitened=False):
        self.bandwidth = bandwidth
        self.whitened = whitened

    def fit(self, rows, settings, rng):
        rows = rows.first(MAX_CENTERS)  # a random subsample: rows come in random order
        mean, spread = moments(rows)
        if rows.layout.n_states:
            bandwidth = self.bandwidth
            return MixedKernelBase(
                rows.layout, rows.x, bandwidth, STATE_MIXING, mean, spread, rows.weight
            )
        covariance = spread.square().diag()
        if self.whitened:
            covariance = _shrunk_covariance(rows, mean)
        return KernelDensityBase(rows.x, self.bandwidth, rows.weight, covariance)


def _shrunk_covariance(rows, mean):
    """Covariance, as with some rows more whose columns are independent."""
    share = rows.weight / rows.weight.sum()
    centered = rows.x - mean
    covariance = (share[:, None] * centered).mT @ centered
    n_rows, n_more = 1.0 / share.square().sum(), rows.x.shape[1] + 3.0
    variance = covariance.diagonal().clamp(min=1e-6).diag()
    return (n_rows * covariance + n_more * variance) / (n_rows + n_more)


class _LocalKernel(BaseCandidate):
    """Kernel density whose kernels are as wide as the rows around them lie apart."""

    def fit(self, rows, settings, rng):
        rows = rows.first(MAX_CENTERS)
        squares = _squared_distances(rows).fill_diagonal_(torch.inf)
        k = min(N_NEIGHBORS, max(1, len(rows.x) - 1))
        widths = (squares.kthvalue(k, dim=1).values / rows.x.shape[1]).sqrt()
        widths = widths.clamp(min=max(MIN_WIDTH * widths.median().item(), 1e-3))
        if rows.layout.n_states:
            mean, spread = moments(rows)
            ones = torch.ones_like(spread)
            return MixedKernelBase(
                rows.layout, rows.x, widths, STATE_MIXING, mean, ones, rows.weight
            )
        return KernelDensityBase(rows.x, widths, rows.weight)


def _squared_distances(rows):
    """Between all pairs of rows; a state that differs counts one, and absent values nothing."""
    values = rows.layout.values(rows.x)
    there = (~values.isnan()).to(values)
    v = values.nan_to_num()
    square = v.square() @ there.mT
    squares = (square + square.mT - 2.0 * v @ v.mT).clamp(min=0.0)
    if rows.layout.n_states:
        states = rows.layout.one_hot(rows.x)
        squares = squares + (rows.layout.n_states - states @ states.mT)
    return squares


class _Linear(MappedCandidate):
    """What sees the correlation of columns: kernels with their covariance.

    Kernels of states know no covariance, so that one Gaussian takes their place.
    """

    def __init__(self):
        super().__init__(_FixedKernel(ROUND, whitened=True), _arcsinh)

    def fit(self, rows, settings, rng):
        if not rows.layout.n_states:
            return super().fit(rows, settings, rng)
        gaussian = MappedCandidate(GaussianCandidate(), _arcsinh)
        return gaussian.fit(rows, gaussian.choose(rows, rows, rng), rng)

    def choose(self, rows, held, rng):
        return None


def _arcsinh(rows):
    transform = ArcsinhTransform()
    return ValuesTransform(rows.layout, transform) if rows.layout.n_states else transform


VIEWS: dict[str, Any] = {
    "sharp": _FixedKernel(SHARP),
    "local": _LocalKernel(),
    "linear": _Linear(),
    "wide": MappedCandidate(_FixedKernel(WIDE), _arcsinh),
}
"""Name -> candidate, as `CANDIDATES`. "sharp" sees rows in gaps; "local" rows that lie farther from
others than these lie from each other; "linear" rows off the correlation of the columns; "wide" rows
on the outside of everything."""

IN_OWN_COLUMNS = frozenset({"linear"})
"""Views, of mapped columns, whose density is to be taken per unit of these: the slope of the map
would say again that far values are rare."""


def fit_views(
    x: torch.Tensor,
    weight: torch.Tensor,
    splits: Sequence[tuple[torch.Tensor, torch.Tensor]],
    names: Sequence[str],
    rng: torch.Generator,
    progress: Callable[[str], None] = lambda text: None,
    n_jobs: int | None = 1,
    layout: Layout | None = None,
) -> list[list[Distribution]]:
    """Fit views on every split.

    Parameters
    ----------
    x : Tensor of shape (n_samples, n_features), float64
        Rows, centered by the median and scaled by the interquartile range.
    weight : Tensor of shape (n_samples,), float64
    splits : list of (train, held_out) index tensors
    names : sequence of str
        Of `VIEWS`.
    rng : torch.Generator
    progress : callable, default=no report
        Called with the name of the view that is about to be fitted.
    n_jobs : int or None, default=1
        Views that are fitted side by side, for joblib.
    layout : Layout, default=None
        Of the rows; by default all columns are values.

    Returns
    -------
    list of lists of nn.Module
        The views of every split, in the order of the names.
    """
    rows = Rows(x, weight, Layout((), (), x.shape[1]) if layout is None else layout)
    pairs = zip(names, spawn(rng, len(names)), strict=True)

    def arguments():
        for name, own in pairs:
            progress(name)
            yield rows, splits, own, name

    return list(map(list, zip(*side_by_side(_fitted, arguments(), n_jobs), strict=True)))


def _fitted(rows, splits, rng, name):
    return VIEWS[name].fit_splits(rows, splits, rng)
