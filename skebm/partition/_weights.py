r"""Weighted draws: how many of them count, how they are tempered, and how rows are kept by weight.

With weights w_i (log-weights l_i, any common factor):

    ess = (sum w)^2 / sum w^2,

which is n for equal weights and 1 where one of them has all the mass (Kong 1992).
"""

from collections.abc import Callable
from typing import Any

import torch

CAPS = (10.0, 20.0, 50.0, 100.0, 200.0)
"""Rows kept by importance: weights, in units of their mean, at which a proposal is kept once. The
first at which few rows would be repeated is taken; the cost of a row grows with it."""

FEW_REPEATED, SOME_REPEATED = 0.01, 0.05
"""Share of repeated rows that is few, and the share at which the last of the caps is worth its
cost."""

MIN_PROPOSED, MAX_PROPOSED = 1024, 65_536


def log_sums(log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum w and log sum w^2 over the last axis: (..., n) -> (...), (...)."""
    return log_weights.logsumexp(-1), (2 * log_weights).logsumexp(-1)


def ess(log_weights: torch.Tensor) -> torch.Tensor:
    """Effective sample size of log-weights.

    Parameters
    ----------
    log_weights : Tensor of shape (..., n)
        -inf is a weight of zero.

    Returns
    -------
    Tensor of shape (...)
        In [1, n]; nan where all weights are zero.

    See Also
    --------
    largest_power : Power at which it is large enough.

    References
    ----------
    Kong, A. (1992). A note on importance sampling using standardized weights. Technical report
    348, Department of Statistics, University of Chicago.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import ess
    >>> ess(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]).log())
    tensor([4., 2.])
    """
    log_sum, log_sum_of_squares = log_sums(log_weights)
    return (2 * log_sum - log_sum_of_squares).exp()


def largest_power(
    log_weights: torch.Tensor,
    ess_share: float,
    *,
    offset: float | torch.Tensor = 0.0,
    most: float = 1.0,
    n_halvings: int = 20,
) -> torch.Tensor:
    """Largest power of the weights at which enough of them are effective.

    The b in [0, most] at which the log-weights ``b * log_weights + offset`` have an effective
    sample size of `ess_share` times n, by bisection; `most` where they have more even there. The
    effective sample size has to fall with b, as it always does without an offset.

    Parameters
    ----------
    log_weights : Tensor of shape (..., n)
    ess_share : float
        In (0, 1).
    offset : float or Tensor that broadcasts to (..., n), default=0.0
        Part of the log-weights that stays as it is.
    most : float, default=1.0
    n_halvings : int, default=20
        The power is too small by at most ``most / 2**n_halvings``.

    Returns
    -------
    Tensor of shape (...)
        0 where no such b was found.

    See Also
    --------
    ess : What it looks at.
    sequential_monte_carlo : Finds its temperatures by it.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import ess, largest_power
    >>> log_weights = torch.linspace(0.0, 50.0, 1000, dtype=torch.float64)
    >>> b = largest_power(log_weights, 0.5)
    >>> ess(b * log_weights).item()
    500.0
    """
    enough = ess_share * log_weights.shape[-1]

    def holds(power):
        return ess(power[..., None] * log_weights + offset) >= enough

    low = torch.zeros_like(log_weights[..., 0])
    high = whole = torch.full_like(low, most)
    fine = holds(whole)
    for _ in range(n_halvings):
        middle = 0.5 * (low + high)
        keeps = holds(middle)
        low, high = torch.where(keeps, middle, low), torch.where(keeps, high, middle)
    return torch.where(fine, whole, low)


def systematic_resampling(
    weights: torch.Tensor, offset: torch.Tensor, n: int | None = None
) -> torch.Tensor:
    """Draw n of m rows, each as often as its weight says, to one.

    Row i is drawn floor(n w_i / sum w) or one more time, n w_i / sum w times on average over the
    offset: the points (0 + U) / n, (1 + U) / n, ... are looked up in the cumulative weights.

    Parameters
    ----------
    weights : Tensor of shape (..., m)
        Not negative, with a positive sum.
    offset : Tensor of shape (..., 1)
        The one random number U in [0, 1) that this takes; a tensor of shape (1,) is shared.
    n : int, optional
        By default m.

    Returns
    -------
    LongTensor of shape (..., n)
        Indices, rising.

    See Also
    --------
    rows_by_importance : From fresh proposals.

    References
    ----------
    Kitagawa, G. (1996). Monte Carlo filter and smoother for non-Gaussian nonlinear state space
    models. *JCGS* 5.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import systematic_resampling
    >>> systematic_resampling(torch.tensor([0.5, 0.1, 0.4]), torch.tensor([0.7]), 4)
    tensor([0, 0, 2, 2])
    """
    n = weights.shape[-1] if n is None else n
    edges = weights.cumsum(-1)
    points = (torch.arange(n, dtype=weights.dtype, device=weights.device) + offset) / n
    points = points.expand(*weights.shape[:-1], n).contiguous()
    # the last edge is one but for rounding, and a point above it belongs to the last row
    picks = torch.searchsorted(edges / edges[..., -1:], points)
    return picks.clamp_max(weights.shape[-1] - 1)


def rows_by_importance(
    propose: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    sizes: torch.Tensor,
    uniform: Callable[[Any], torch.Tensor],
) -> list[torch.Tensor]:
    """Draw rows of K weighted distributions, by importance.

    A proposal of weight w is kept floor(w / c + U) times, with U uniform: w / c times on average,
    so that a row is repeated where w > c. By the first proposals, c is the smallest of 10, 20, 50,
    100 and 200 times the mean weight (less where the weights are bounded by less) at which 1 % of
    the rows are repeated; it is 10 where at 200 still more than 5 % would be, or where the first
    proposals have missed most of the mass. Proposals are drawn until there are enough.

    Parameters
    ----------
    propose : callable
        ``propose(n)`` -> rows (K, n, ...) and their weights (K, n), of mean 1 (about).
    sizes : LongTensor of shape (K,)
        How many rows of each distribution.
    uniform : callable
        ``uniform(shape)`` -> Tensor of uniform numbers in [0, 1).

    Returns
    -------
    list of K tensors of shape (sizes[k], ...)
        Repeated rows follow each other; it is for the caller to count them.

    See Also
    --------
    systematic_resampling : From a fixed set of rows.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import rows_by_importance
    >>> rng = torch.Generator().manual_seed(0)
    >>> def uniform(shape):
    ...     return torch.rand(shape, generator=rng)
    >>> def propose(n):  # uniform, with the weight of the density 2 x
    ...     x = uniform((1, n))
    ...     return x, 2 * x
    >>> (x,) = rows_by_importance(propose, torch.tensor([10_000]), uniform)
    >>> round(x.mean().item(), 2)
    0.67
    """
    kept = [[] for _ in sizes]
    missing, cap = sizes.clone(), None
    while (missing > 0).any():
        n = int(1.1 * missing.max() * (cap or 2.0))  # one in cap is kept
        rows, weights = propose(max(MIN_PROPOSED, min(n, MAX_PROPOSED)))
        if cap is None:
            cap = _cap(weights[sizes > 0])
        copies = (weights / cap + uniform(weights.shape)).floor().long()
        for k, parts in enumerate(kept):
            found = rows[k].repeat_interleave(copies[k], dim=0)
            if len(found) > missing[k] > 0 and copies[k].max() > 1:
                # the first ones would be too often those with a small weight
                some = uniform(found.shape[:1]).argsort()[: int(missing[k])]
                found = found[some.sort().values]
            parts.append(found[: int(missing[k])])
            missing[k] -= len(parts[-1])
    return [torch.cat(parts) for parts in kept]


def _cap(weights):
    """Weight at which a proposal is kept once, from weights (K, n)."""

    def repeated(cap):
        beyond = (weights - cap).clamp_min(0.0).sum(1)
        return (beyond / weights.sum(1)).max().item()

    cap = next((c for c in CAPS if repeated(c) <= FEW_REPEATED), CAPS[-1])
    # a mean far below one says that weights are to come that are larger than any cap
    if repeated(cap) > SOME_REPEATED or weights.mean(1).min() < 0.5:
        cap = CAPS[0]
    return weights.max().clamp(1.0, cap).item()
