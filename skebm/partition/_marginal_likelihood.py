r"""Marginal likelihoods: one integral over latent variables for each row.

.. math:: p(x) = \int p(x, z)\, dz = E_{z \sim r} \frac{p(x, z)}{r(z)}

by importance sampling from a proposal r that is adapted to the posterior of every row, and by
annealed importance sampling where that is not enough. It is the partition function of
z -> p(x, z).

The parts of r have fixed numbers of draws, and those that are adapted are drawn in small Latin
hypercubes: of m draws each coordinate has one in every m-th of its distribution. So the error of
the mean of the weights is that of a stratified sample of independent hypercubes.
"""

import functools
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

INFLATION, MODE_INFLATION = 1.3, 1.1
"""Of the covariance of the t proposal over that of the draws it was fitted to, and of that of the
normal proposal over the one that is given."""

ADAPTED, MAX_ROUNDS, STALLED = 0.3, 10, 1.05
"""Rows are adapted until this share of their draws is effective, or for so many rounds, or until a
round does not raise the share by such a factor."""

ADAPTED_AT_MODE, UNEVEN, MORE_DRAWS = 0.15, 0.2, 4
"""That share where the modes are known. More draws are cheaper than further rounds there: with
less than the second share effective there are four times as many, and where that is not enough
four times as many once more."""

FITTED_SHARE = 0.15
"""Weights are flattened until this share of the draws is effective before moments are taken."""

MIN_SHARE = 0.05
"""Below this effective share a row is annealed."""

HYPERCUBE, MIN_HYPERCUBES = 4, 20
"""Draws in a Latin hypercube, which are few since the standard error is that of their means; with
fewer than so many of them there is none."""

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


class RowStreams:
    """Random numbers that belong to a row, whatever other rows are there.

    The key of a stream is the row itself, rounded to six decimals.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    seed : int

    See Also
    --------
    marginal_likelihoods : Takes it, so that rows do not change each other's estimates.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import RowStreams
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> both, second = RowStreams(x, seed=0), RowStreams(x[1:], seed=0)
    >>> normal, _ = both.draw(torch.tensor([1]), stage=0, n=3, k=1)
    >>> same, _ = second.draw(torch.tensor([0]), stage=0, n=3, k=1)
    >>> torch.equal(normal, same)
    True
    """

    device: torch.device
    seed: int
    keys: list[int]

    def __init__(self, x: torch.Tensor, seed: int):
        self.device, self.seed = x.device, seed
        # one generator that is set to one stream after the other: to make one takes longer than
        # to draw hundreds of numbers
        self._generator = np.random.Generator(np.random.Philox(key=0))
        self._state: Any = self._generator.bit_generator.state
        rounded = np.round(x.double().cpu().numpy(), 6) + 0.0  # no negative zeros
        rounded[np.isnan(rounded)] = np.nan  # of all that have other bytes
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
        self._state["state"]["key"][:] = self.keys[row], (self.seed << 8) + stage
        self._generator.bit_generator.state = self._state
        return self._generator


class Proposal(nn.Module):
    """For every row a t distribution, mixed with the standard normal one, and one at its mode.

    Parameters
    ----------
    location : Tensor of shape (n, k)
        Of the t distribution.
    scale_tril : Tensor of shape (n, k, k)
    mode : tuple of Tensors (n, k) and (n, k, k), optional
        Location and Cholesky factor of a normal distribution, which has half of the draws that are
        not from the standard normal one.
    """

    def __init__(
        self,
        location: torch.Tensor,
        scale_tril: torch.Tensor,
        mode: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.location, self.scale_tril, self.mode = location, scale_tril, mode

    def sizes(self, n: int) -> list[int]:
        """How many of n draws are from the prior, the t distribution and that at the mode."""
        m = _hypercube(n)
        n_hypercubes = (n - math.ceil(PRIOR_SHARE * n)) // m
        n_mode = 0 if self.mode is None else n_hypercubes // 2 * m
        n_near = n_hypercubes * m - n_mode
        return [n - n_near - n_mode, n_near, n_mode]

    def transport(self, normal: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Draws (n, m, k) from random numbers (n, m, 2 k) and (n, m), part by part."""
        n, k = normal.shape[1], self.location.shape[1]
        sizes = self.sizes(n)
        prior, near, at_mode = normal.split(sizes, dim=1)
        near = _latin_hypercubes(near, _hypercube(n))
        near = near * (DEGREES / square.split(sizes, dim=1)[1]).sqrt()[..., None]
        parts = [prior[..., :k], self.location[:, None] + near @ self.scale_tril.mT]
        if self.mode is not None:
            location, tril = self.mode
            at_mode = _latin_hypercubes(at_mode, _hypercube(n))
            parts.append(location[:, None] + at_mode @ tril.mT)
        return torch.cat(parts, dim=1)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of a draw that is one of m, (n, m, k) -> (n, m); also (m, k) -> (m,)."""
        if z.ndim == 2:
            return self.log_prob(z[None])[0]
        n, k = z.shape[1:]
        distance, log_scale = _standardized(z, self.location, self.scale_tril)
        half = 0.5 * (DEGREES + k)
        constant = (
            math.lgamma(half) - math.lgamma(0.5 * DEGREES) - 0.5 * k * math.log(DEGREES * math.pi)
        )
        log_norm = 0.5 * k * math.log(2 * math.pi)
        parts = [
            -0.5 * z.square().sum(-1) - log_norm,
            constant - log_scale - half * (distance / DEGREES).log1p(),
        ]
        if self.mode is not None:
            distance, log_scale = _standardized(z, *self.mode)
            parts.append(-log_norm - log_scale - 0.5 * distance)
        # the shares that they have, or the mean of the weights is not p(x)
        parts = [p + math.log(m / n) for p, m in zip(parts, self.sizes(n), strict=False)]
        return functools.reduce(torch.logaddexp, parts)

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draws of a single row, (n, k), in random order."""
        like = {"generator": rng, "dtype": self.location.dtype, "device": rng.device}
        normal = torch.randn(1, n, 2 * self.location.shape[1], **like)
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
        return Proposal.of_moments(location, covariance, n_effective, self.mode)

    @classmethod
    def of_moments(
        cls,
        location: torch.Tensor,
        covariance: torch.Tensor,
        n_effective: float | torch.Tensor,
        mode: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Self:
        """Proposal around moments taken from so many draws."""
        k = location.shape[-1]
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        # few draws: towards the diagonal, so that it is regular
        share = torch.as_tensor(k / (n_effective + k)).to(location).view(-1, 1, 1)
        covariance = covariance.lerp(diagonal.diag_embed(), share)
        floor = 1e-6 + 1e-3 * diagonal.mean(-1, keepdim=True)
        covariance = INFLATION * covariance + floor.expand_as(diagonal).diag_embed()
        return cls(location, torch.linalg.cholesky(covariance), mode)

    def take(self, rows: Any) -> "Proposal":
        """The proposals of some rows."""
        mode = None if self.mode is None else (self.mode[0][rows], self.mode[1][rows])
        return Proposal(self.location[rows], self.scale_tril[rows], mode)

    def put(self, rows: Any, other: "Proposal") -> None:
        """Take the t distributions of some rows from another one."""
        self.location[rows], self.scale_tril[rows] = other.location, other.scale_tril


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
        proposal = Proposal.of_moments(location[rows], covariance[rows], math.inf, at_mode)
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
    proposal = Proposal.of_moments(location, covariance, math.inf)
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


def _standardized(z, location, tril):
    """Squared distances of draws (n, m, k) in standard deviations, and log-determinants (n, 1)."""
    white = torch.linalg.solve_triangular(tril, (z - location[:, None]).mT, upper=False)
    log_scale = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return white.square().sum(-2), log_scale


def _weigh(log_joint, proposal, streams, rows, stage, n):
    z = proposal.transport(*streams.draw(rows, stage, n, 2 * proposal.location.shape[1]))
    log_proposal = proposal.log_prob(z)
    log_joint = log_joint(rows, z).double()
    # far out both may be -inf
    return z, torch.where(log_joint > -math.inf, log_joint - log_proposal, -math.inf)


def _hypercube(n):
    """Draws in a Latin hypercube, where there are n of the whole proposal."""
    return HYPERCUBE if n >= MIN_HYPERCUBES * HYPERCUBE else 1


def _latin_hypercubes(normal, m):
    """Normal draws (n, s, k) in Latin hypercubes of m, from independent ones (n, s, 2 k)."""
    order, within = normal.unflatten(1, (-1, m)).chunk(2, dim=-1)
    if m == 1:
        return within.flatten(1, 2)
    uniform = (order.argsort(2) + torch.special.ndtr(within)) / m
    # far below the least that has a probability in any number of draws; zero would be infinite
    return torch.special.ndtri(uniform.clamp(1e-300, 1 - 1e-16)).flatten(1, 2)


def _stratified(log_weights, sizes):
    """Estimates from log-weights (n, m), of parts of these sizes as `Proposal` draws them."""
    plain = importance_sampling(log_weights)
    m = log_weights.shape[1]
    weights = (log_weights - plain.value[:, None]).exp()  # mean 1
    prior, *others = weights.split(sizes, dim=1)
    means = [o.unflatten(1, (-1, _hypercube(m))).mean(2) for o in others if o.shape[1]]
    if any(part.shape[1] == 1 for part in (prior, *means)):  # nothing to take a variance of
        return plain
    variance = (prior.shape[1] / m**2) * prior.var(1)
    for part in means:
        variance += part.shape[1] * (_hypercube(m) / m) ** 2 * part.var(1)
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
