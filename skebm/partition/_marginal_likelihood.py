r"""Marginal likelihoods: one integral over latent variables for each row.

.. math:: p(x) = \int p(x, z)\, dz = E_{z \sim r} \frac{p(x, z)}{r(z)}

by importance sampling from a proposal r that is adapted to the posterior of every row, and by
annealed importance sampling where that is not enough. It is the partition function of
z -> p(x, z).
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from skebm.partition._ais import annealed_importance_sampling
from skebm.partition._importance import importance_sampling
from skebm.partition._weights import ess, largest_power

DEGREES = 8
"""Degrees of freedom of the t proposal."""

PRIOR_SHARE = 0.2
"""Share of the draws that come from N(0, I): they find modes that the rest has missed, unless the
prior has next to no mass there."""

INFLATION = 1.3
"""Of the covariance of the proposal over that of the draws it was fitted to."""

ADAPTED, MAX_ROUNDS, STALLED = 0.3, 10, 1.05
"""Rows are adapted until this share of their draws is effective, or for so many rounds, or until a
round does not raise the share by such a factor."""

FITTED_SHARE = 0.15
"""Weights are flattened until this share of the draws is effective before moments are taken."""

MIN_SHARE = 0.05
"""Below this effective share a row is annealed."""

MAX_EVALUATIONS = 2**16
"""Latent vectors that are evaluated at once."""

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
        Effective share of the draws.
    annealed : Tensor of bool of shape (n,)
        Whether the row was annealed.
    """

    value: torch.Tensor
    std_error: torch.Tensor
    ess_share: torch.Tensor
    annealed: torch.Tensor


class RowStreams:
    """Random numbers that belong to a row, whatever other rows are there.

    The key of a stream is the row itself, rounded to six decimals.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    seed : int
    """

    device: torch.device
    seed: int
    keys: list[int]

    def __init__(self, x: torch.Tensor, seed: int):
        self.device, self.seed = x.device, seed
        rounded = np.round(x.double().cpu().numpy(), 6) + 0.0  # no negative zeros
        self.keys = [
            int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
            for row in rounded
        ]

    def draw(self, rows: torch.Tensor, stage: int, n: int, k: int) -> Iterator[torch.Tensor]:
        """Standard normal (m, n, k) and chi-squared (m, n) numbers for the chosen rows."""
        normal = np.empty((len(rows), n, k))
        square = np.empty((len(rows), n))
        for i, row in enumerate(rows.tolist()):
            stream = self._stream(row, stage)
            stream.standard_normal(out=normal[i])
            square[i] = stream.chisquare(DEGREES, n)
        return (torch.as_tensor(a, device=self.device) for a in (normal, square))

    def rng(self, row: int, stage: int) -> torch.Generator:
        """Generator of torch for one row."""
        seed = int(self._stream(row, stage).integers(2**62))
        return torch.Generator(self.device).manual_seed(seed)

    def _stream(self, row, stage):
        key = np.array([self.keys[row], (self.seed << 8) + stage], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


class Proposal(nn.Module):
    """For every row a t distribution, mixed with the standard normal one.

    Parameters
    ----------
    location : Tensor of shape (n, k)
    scale_tril : Tensor of shape (n, k, k)
    """

    def __init__(self, location: torch.Tensor, scale_tril: torch.Tensor):
        super().__init__()
        self.location, self.scale_tril = location, scale_tril

    def transport(self, normal: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Draws (n, m, k) from random numbers; the first ones are from the normal distribution."""
        n_prior = _n_prior(normal.shape[1])
        near = normal[:, n_prior:] * (DEGREES / square[:, n_prior:]).sqrt()[..., None]
        near = self.location[:, None] + near @ self.scale_tril.mT
        return torch.cat([normal[:, :n_prior], near], dim=1)

    def log_prob(self, z: torch.Tensor, prior_share: float = PRIOR_SHARE) -> torch.Tensor:
        """Log-density, (n, m, k) -> (n, m); a single row also takes (m, k) -> (m,)."""
        if z.ndim == 2:
            return self.log_prob(z[None], prior_share)[0]
        k = z.shape[-1]
        white = torch.linalg.solve_triangular(
            self.scale_tril, (z - self.location[:, None]).mT, upper=False
        )
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        half = 0.5 * (DEGREES + k)
        constant = (
            math.lgamma(half) - math.lgamma(0.5 * DEGREES) - 0.5 * k * math.log(DEGREES * math.pi)
        )
        near = constant - log_det[:, None] - half * (white.square().sum(-2) / DEGREES).log1p()
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return torch.logaddexp(near + math.log(1 - prior_share), prior + math.log(prior_share))

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draws of a single row, (n, k), in random order."""
        like = {"generator": rng, "dtype": self.location.dtype, "device": rng.device}
        normal = torch.randn(1, n, self.location.shape[1], **like)
        square = torch.randn(1, n, DEGREES, **like).square().sum(-1)
        return self.transport(normal, square)[0][
            torch.randperm(n, generator=rng, device=rng.device)
        ]

    def refitted(self, z: torch.Tensor, log_weights: torch.Tensor) -> "Proposal":
        """Proposal with the moments of weighted draws, (n, m, k) and (n, m)."""
        power = largest_power(log_weights, FITTED_SHARE)
        weights = (power[:, None] * log_weights).softmax(-1)
        location = (weights[..., None] * z).sum(1)
        centered = z - location[:, None]
        covariance = centered.mT @ (weights[..., None] * centered)
        n_effective = 1 / weights.square().sum(1)
        return Proposal.of_moments(location, covariance, n_effective)

    @classmethod
    def of_moments(
        cls, location: torch.Tensor, covariance: torch.Tensor, n_effective: float | torch.Tensor
    ) -> Self:
        """Proposal around moments taken from so many draws."""
        k = location.shape[-1]
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        # few draws: towards the diagonal, so that it is regular
        share = torch.as_tensor(k / (n_effective + k)).to(location).view(-1, 1, 1)
        covariance = covariance.lerp(diagonal.diag_embed(), share)
        floor = 1e-6 + 1e-3 * diagonal.mean(-1, keepdim=True)
        covariance = INFLATION * covariance + floor.expand_as(diagonal).diag_embed()
        return cls(location, torch.linalg.cholesky(covariance))

    def take(self, rows: Any) -> "Proposal":
        """The proposals of some rows."""
        return Proposal(self.location[rows], self.scale_tril[rows])


def marginal_likelihoods(
    log_joint: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    location: torch.Tensor,
    covariance: torch.Tensor,
    streams: RowStreams,
    *,
    n_samples: int = 500,
    n_adaptation: int | None = None,
) -> Marginals:
    r"""Measure log p(x) for every row, with its standard error.

    Draws of a t distribution (8 degrees of freedom) around the given moments, and one in five of
    the standard normal distribution, are weighted; the t distribution is fitted to the weighted
    draws, and so on, until enough of them are effective. The estimate is made of fresh draws. Rows
    with an effective share below .05 are then annealed.

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
    n_samples : int, default=500
        Draws behind an estimate, per row.
    n_adaptation : int, optional
        Draws in each round of adaptation; by default 200 and 20 for each latent variable. 0 takes
        the moments as they are, and anneals nothing.

    Returns
    -------
    Marginals

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
        n_adaptation = 200 + 20 * k
    block = max(1, MAX_EVALUATIONS // max(n_samples, n_adaptation))
    # rows so far out that their moments have overflown have no density to speak of
    usable = location.isfinite().all(-1) & covariance.isfinite().all(-1).all(-1)
    value = torch.full((n,), -math.inf, dtype=torch.float64, device=location.device)
    nothing = torch.zeros(n, dtype=torch.bool, device=location.device)
    result = Marginals(value, torch.zeros_like(value), torch.zeros_like(value), nothing)
    for rows in usable.nonzero()[:, 0].split(block):
        proposal = Proposal.of_moments(location[rows], covariance[rows], math.inf)
        if n_adaptation:
            proposal = _adapt(log_joint, proposal, streams, rows, n_adaptation)
        _, log_weights = _weigh(log_joint, proposal, streams, rows, MAX_ROUNDS, n_samples)
        measured = importance_sampling(log_weights)
        share = measured.ess / n_samples
        low = (share < MIN_SHARE) if n_adaptation else torch.zeros_like(share, dtype=torch.bool)
        for i in low.nonzero()[:, 0].tolist():
            low[i] = _anneal(log_joint, proposal.take([i]), streams, rows[i], measured, i)
        found = measured.value, measured.std_error, share, low
        for whole, part in zip(result, found, strict=True):
            whole[rows] = part
    return result


def _n_prior(n):
    """How many of n draws are from the prior."""
    return math.ceil(PRIOR_SHARE * n)


def _weigh(log_joint, proposal, streams, rows, stage, n):
    z = proposal.transport(*streams.draw(rows, stage, n, proposal.location.shape[1]))
    # the share that they have, or the mean of the weights is not p(x)
    log_proposal = proposal.log_prob(z, _n_prior(n) / n)
    log_joint = log_joint(rows, z).double()
    # far out both may be -inf
    return z, torch.where(log_joint > -math.inf, log_joint - log_proposal, -math.inf)


def _adapt(log_joint, proposal, streams, rows, n):
    """The best ones of proposals fitted round by round, until enough draws are effective."""
    best = proposal.take(slice(None))
    best_share = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    active, current = torch.arange(len(rows), device=rows.device), proposal
    for stage in range(MAX_ROUNDS):
        z, log_weights = _weigh(log_joint, current, streams, rows[active], stage, n)
        share = ess(log_weights) / n
        before = best_share[active]
        better = share > before
        there = active[better]
        best.location[there] = current.location[better]
        best.scale_tril[there] = current.scale_tril[better]
        best_share[there] = share[better]
        # from few effective draws a fit may be worse before it is better
        goes_on = (share < ADAPTED) & ((share > STALLED * before) | (share < FITTED_SHARE))
        if not goes_on.any():
            break
        current = current.take(goes_on).refitted(z[goes_on], log_weights[goes_on])
        active = active[goes_on]
    return best


def _anneal(log_joint, proposal, streams, row, measured, i):
    """Put what annealing finds into `measured`; whether it went through."""
    try:
        again = annealed_importance_sampling(
            lambda z: log_joint(row[None], z[None])[0],
            proposal,
            streams.rng(row.item(), MAX_ROUNDS + 1),
            **ANNEALING,
        )
    except ValueError:  # no path from the proposal to the posterior
        return False
    measured.value[i], measured.std_error[i] = again.value, again.std_error
    return True
