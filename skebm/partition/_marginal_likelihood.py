r"""Marginal likelihoods: one integral over latent variables for each row.

.. math:: p(x) = \int p(x, z)\, dz = E_{z \sim r} \frac{p(x, z)}{r(z)}

by importance sampling from a proposal r that is adapted to the posterior of every row, and by
annealed importance sampling where that is not enough. It is the partition function of
z -> p(x, z).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from skebm.partition._ais import annealed_importance_sampling
from skebm.partition._importance import importance_sampling
from skebm.partition._posterior_proposal import (
    FITTED_SHARE,
    MODE_INFLATION,
    PosteriorProposal,
    hypercube,
)
from skebm.partition._row_streams import RowStreams
from skebm.partition._weights import ess

ADAPTED, MAX_ROUNDS, STALLED = 0.3, 10, 1.05
"""Rows are adapted until this share of their draws is effective, or for so many rounds, or until a
round does not raise the share by such a factor."""

ADAPTED_AT_MODE, UNEVEN, MORE_DRAWS = 0.15, 0.2, 4
"""That share where the modes are known. More draws are cheaper than further rounds there: with
less than the second share effective there are four times as many, and where that is not enough
four times as many once more."""

MIN_SHARE = 0.05
"""Below this effective share a row is annealed."""

LOOK_SHARE = 0.25
"""Draws of the first round over those of others, where the modes are known: with them most rows
need no second one."""

MAX_EVALUATIONS = 2**14
"""Latent vectors that are evaluated at once; with more of them time goes into moving memory."""

# (multiples of five: the prior's share is then exact)
ANNEALING: dict[str, Any] = {"n_particles": 250, "n_temperatures": 40, "n_pilot": 250}


class Marginals(NamedTuple):
    """Measured log-likelihoods.

    Attributes
    ----------
    value : Tensor of shape (n,)
        log p(x), in nats.
    std_error : Tensor of shape (n,)
        Its standard error.
    ess_share : Tensor of shape (n,)
        Effective share of n_samples draws, that which has this standard error.
    annealed : Tensor of bool of shape (n,)
        Whether the row was annealed.

    See Also
    --------
    marginal_likelihoods : Measures them.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import RowStreams, marginal_likelihoods
    >>> x = torch.zeros(1, 1, dtype=torch.float64)
    >>> def log_joint(rows, z):  # z ~ N(0, 1), x = z + noise of variance 1
    ...     normal = torch.distributions.Normal(0.0, 1.0)
    ...     return (normal.log_prob(z) + normal.log_prob(x[rows][:, None] - z)).squeeze(-1)
    >>> covariance = 0.5 * torch.ones(1, 1, 1).double()
    >>> found = marginal_likelihoods(log_joint, x, covariance, RowStreams(x, seed=0))
    >>> found.value.round(decimals=1), found.annealed  # log N(0; 0, 2) is -1.27
    (tensor([-1.2000], dtype=torch.float64), tensor([False]))
    """

    value: torch.Tensor
    std_error: torch.Tensor
    ess_share: torch.Tensor
    annealed: torch.Tensor


def marginal_likelihoods(
    log_joint: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    location: torch.Tensor,
    covariance: torch.Tensor,
    streams: RowStreams,
    *,
    mode: tuple[torch.Tensor, torch.Tensor] | None = None,
    n_samples: int = 500,
    n_adaptation: int | None = None,
) -> Marginals:
    r"""Measure log p(x) for every row, with its standard error.

    Draws of a t distribution (8 degrees of freedom) around the given moments, and one in five of
    the standard normal distribution, are weighted. Where few of them are effective, the t
    distribution is fitted to more weighted draws, and so on, until enough are. The estimate is made
    of fresh draws. Rows with an effective share below 0.05 are then annealed.

    Parameters
    ----------
    log_joint : callable
        ``log_joint(rows, z)`` -> log p(x, z), for indices of rows (m,) and latent variables
        (m, S, k) -> (m, S).
    location : Tensor of shape (n, k)
        Approximate posterior means.
    covariance : Tensor of shape (n, k, k)
        Approximate posterior covariances.
    streams : RowStreams
    mode : tuple of Tensors (n, k) and (n, k, k), optional
        Modes of the posteriors, and covariances there: a third part of the proposal, with two in
        five of the draws.
    n_samples : int, default=500
        Draws behind an estimate, per row. Where the modes are given, there are 4 times as many if
        fewer than 0.2 of the draws of adaptation were effective, and 16 times as many fresh ones
        if the error is then still that of fewer than 0.2.
    n_adaptation : int, optional
        Draws in each round of adaptation; by default 200 and 20 for each latent variable. A quarter
        of them is drawn to see whether a row needs any. 0 takes the moments as they are, and
        anneals nothing.

    Returns
    -------
    Marginals

    See Also
    --------
    Marginals : What is returned.
    RowStreams : Random numbers of the rows.
    skebm.models.LatentVariableModel.log_likelihoods : The same for a latent-variable model.

    Notes
    -----
    E[p(x) estimate] = p(x) exactly, so that the log lies below log p(x) on average, by about half
    the squared standard error.

    References
    ----------
    Bugallo, M. F. et al. (2017). Adaptive importance sampling: the past, the present, and the
    future. IEEE Signal Processing Magazine 34(4). Hesterberg, T. (1995). Weighted average
    importance sampling and defensive mixture distributions. Technometrics 37(2).

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import RowStreams, marginal_likelihoods
    >>> x = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    >>> def log_joint(rows, z):  # z ~ N(0, 1), x = z + noise of variance 1: x ~ N(0, 2)
    ...     normal = torch.distributions.Normal(0.0, 1.0)
    ...     return (normal.log_prob(z) + normal.log_prob(x[rows][:, None] - z)).squeeze(-1)
    >>> result = marginal_likelihoods(
    ...     log_joint, 0.0 * x, torch.ones(2, 1, 1, dtype=torch.float64), RowStreams(x, seed=0)
    ... )
    >>> exact = torch.distributions.Normal(0.0, 2**0.5).log_prob(x).squeeze(-1)
    >>> bool(((result.value - exact).abs() < 4 * result.std_error).all())
    True
    """
    n, k = location.shape
    if n_adaptation is None:
        n_adaptation = _n_adaptation(k)
    block = max(1, MAX_EVALUATIONS // max(n_samples, n_adaptation))
    # rows so far out that their moments have overflown have no density to speak of
    usable = location.isfinite().all(-1) & covariance.isfinite().all(-1).all(-1)
    value = torch.full((n,), -math.inf, dtype=torch.float64, device=location.device)
    nothing = torch.zeros(n, dtype=torch.bool, device=location.device)
    result = Marginals(value, torch.zeros_like(value), torch.zeros_like(value), nothing)
    if mode is not None:
        mode = mode[0], torch.linalg.cholesky(MODE_INFLATION * mode[1])
    for rows in usable.nonzero()[:, 0].split(block) if usable.any() else ():
        at_mode = None if mode is None else (mode[0][rows], mode[1][rows])
        proposal = PosteriorProposal.of_moments(location[rows], covariance[rows], math.inf, at_mode)
        uneven = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if n_adaptation:
            proposal, share = _adapt(log_joint, proposal, streams, rows, n_adaptation)
            uneven = (share < UNEVEN) & (mode is not None)
        for times, some in ((1, ~uneven), (MORE_DRAWS, uneven)):
            part = some.nonzero()[:, 0]
            if not len(part):
                continue
            own = rows[part], proposal.take(part), n_samples
            found = _measure(log_joint, streams, *own, times, bool(n_adaptation))
            for whole, values in zip(result, found, strict=True):
                whole[rows[part]] = values
    return result


def posterior_samples(
    log_joint: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    location: torch.Tensor,
    covariance: torch.Tensor,
    streams: RowStreams,
    *,
    n_samples: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted draws of the latent variables of every row.

    Proposals are adapted as in :func:`marginal_likelihoods`, whose parameters these are.

    Returns
    -------
    z : Tensor of shape (n, n_samples, k)
    log_weights : Tensor of shape (n, n_samples)
        log p(x, z) minus the log-density of the proposal, so that the mean of the weights is p(x).
    """
    k = location.shape[1]
    proposal = PosteriorProposal.of_moments(location, covariance, math.inf)
    rows = torch.arange(len(location), device=location.device)
    proposal, _ = _adapt(log_joint, proposal, streams, rows, _n_adaptation(k))
    return _weigh(log_joint, proposal, streams, rows, MAX_ROUNDS, n_samples)


def _measure(log_joint, streams, rows, proposal, n, times, anneals):
    """Marginals of some rows from fresh draws, and from annealing where these are too few."""
    _, log_weights = _weigh(log_joint, proposal, streams, rows, MAX_ROUNDS, times * n)
    measured = _stratified(log_weights, proposal.sizes(times * n))
    share = 1 / (1 + n * measured.std_error**2)
    if anneals and proposal.mode is not None:
        part = (share < UNEVEN).nonzero()[:, 0]
        if len(part):
            m = MORE_DRAWS**2 * n
            some = proposal.take(part)
            _, log_weights = _weigh(log_joint, some, streams, rows[part], MAX_ROUNDS + 1, m)
            again = _stratified(log_weights, some.sizes(m))
            measured.value[part], measured.std_error[part] = again.value, again.std_error
            share[part] = 1 / (1 + n * again.std_error**2)
    low = share < (MIN_SHARE if anneals else 0.0)
    for i in low.nonzero()[:, 0].tolist():
        low[i] = _anneal(log_joint, proposal.take([i]), streams, rows[i], measured, i)
    return Marginals(measured.value, measured.std_error, share, low)


def _n_adaptation(k):
    """Draws in a round of adaptation to the posterior of k latent variables."""
    return 200 + 20 * k


def _weigh(log_joint, proposal, streams, rows, stage, n):
    z = proposal.transport(*streams.draw(rows, stage, n, 2 * proposal.location.shape[1]))
    log_proposal = proposal.log_prob(z)
    log_joint = log_joint(rows, z).double()
    # far out both may be -inf
    return z, torch.where(log_joint > -math.inf, log_joint - log_proposal, -math.inf)


def _stratified(log_weights, sizes):
    """Estimates from log-weights (n, m), of parts of these sizes as the proposal draws them."""
    plain = importance_sampling(log_weights)
    m = log_weights.shape[1]
    weights = (log_weights - plain.value[:, None]).exp()  # mean 1
    prior, *others = weights.split(sizes, dim=1)
    means = [o.unflatten(1, (-1, hypercube(m))).mean(2) for o in others if o.shape[1]]
    if any(part.shape[1] == 1 for part in (prior, *means)):  # nothing to take a variance of
        return plain
    variance = (prior.shape[1] / m**2) * prior.var(1)
    for part in means:
        variance += part.shape[1] * (hypercube(m) / m) ** 2 * part.var(1)
    variance = torch.where(plain.value > -math.inf, variance, math.inf)
    return plain._replace(std_error=variance.sqrt())


def _adapt(log_joint, proposal, streams, rows, n):
    """The best ones of proposals fitted round by round, and the shares of their draws."""
    best = proposal.take(slice(None))
    best_share = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    active, current = torch.arange(len(rows), device=rows.device), proposal
    n_look, enough = n, ADAPTED
    if proposal.mode is not None:
        n_look, enough = math.ceil(LOOK_SHARE * n), ADAPTED_AT_MODE
    for stage in range(MAX_ROUNDS):
        n_drawn = n if stage else n_look
        z, log_weights = _weigh(log_joint, current, streams, rows[active], stage, n_drawn)
        share = ess(log_weights) / n_drawn
        before = best_share[active]
        better = share > before
        there = active[better]
        best.put(there, current.take(better))
        best_share[there] = share[better]
        # from few effective draws a fit may be worse before it is better
        goes_on = (share < enough) & ((share > STALLED * before) | (share < FITTED_SHARE))
        if not goes_on.any():
            break
        current = current.take(goes_on).refitted(z[goes_on], log_weights[goes_on])
        active = active[goes_on]
    return best, best_share


def _anneal(log_joint, proposal, streams, row, measured, i):
    """Put what annealing finds into `measured`; whether it went through."""
    try:
        again = annealed_importance_sampling(
            lambda z: log_joint(row[None], z[None])[0],
            proposal,
            streams.rng(row.item(), MAX_ROUNDS + 2),
            **ANNEALING,
        )
    except ValueError:  # no path from the proposal to the posterior
        return False
    measured.value[i], measured.std_error[i] = again.value, again.std_error
    return True
