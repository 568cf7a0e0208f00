"""log Z by the method that fits the case."""

import math

import torch

from skebm._typing import Distribution, Kernel, LogDensity
from skebm.bases import GaussianMixtureBase
from skebm.partition._bridge import solve
from skebm.partition._importance import LogPartition, adaptive_importance_sampling, from_error
from skebm.partition._path import Path, at_least, move
from skebm.partition._pilot import shrunk_covariance
from skebm.partition._smc import combine, sequential_monte_carlo
from skebm.partition._weights import ess

MIN_ESS_SHARE = 0.01
"""Share of effective samples above which importance sampling is believed. Measured: honest from
there on, while at a share of 2e-4 it claimed an error of 0.54 where it was 1.7."""

N_GROUPS = 16
"""Independent runs, or blocks of given samples, whose disagreement is the standard error."""

BATCH_SIZE = 8192

MIN_RUN_SHARE = 0.5
"""Effective share of the runs above which their particles are taken for samples of the model."""

N_SETTLING_MOVES = 30
"""Moves of the particles before they are taken for samples of the model."""

DRAWS_PER_SAMPLE = 4
"""Bridge sampling: draws of the proposal, which are cheap, for each sample of the model."""


def estimate(
    log_density: LogDensity,
    proposal: Distribution,
    rng: torch.Generator,
    *,
    target_std_error: float = 0.01,
    max_samples: int = 400_000,
    n_particles: int = 4096,
    max_particles: int = 16_384,
    samples: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> LogPartition:
    """Measure log Z, choosing the method.

    1. With `samples` of the model: bridge sampling.
    2. Importance sampling from q, as long as the effective sample size is above 1 %.
    3. Else sequential Monte Carlo in 16 runs, and bridge sampling with its particles. The one with
       the smaller standard error is returned; more runs are made until `target_std_error` or
       `max_particles` is reached.

    Bridge sampling is done between the model and half q, half a normal distribution fitted to the
    samples; in two halves, each with the normal distribution fitted to the other.

    Parameters
    ----------
    log_density : callable
        (n, d) -> (n,), log p~. A gradient by autograd is used where there is one; -inf is outside
        of the support.
    proposal : distribution
        q, with ``log_prob(x)`` and ``sample(n, rng)``, for instance from `skebm.bases`.
    rng : torch.Generator
    target_std_error : float, default=0.01
        In nats. Compare with `std_error` of the result to see whether it was reached.
    max_samples : int, default=400_000
        Of importance sampling; 0 goes on to the next method at once.
    n_particles : int, default=4096
        Of sequential Monte Carlo, over 16 runs.
    max_particles : int, default=16_384
        In total.
    samples : Tensor of shape (m, d), optional
        Of the model, at least 32; exact, or in the order of a Markov chain: the standard error
        is from 16 successive blocks of equal size, a remainder at the start being left out.
    kernel : module, optional
        As in :func:`sequential_monte_carlo`.

    Returns
    -------
    LogPartition
        Whose `std_error` is never below what is seen between batches, runs or blocks.

    Raises
    ------
    ValueError
        If a parameter is out of range, or log_density is nan or +inf somewhere.

    See Also
    --------
    importance_sampling : The first method it tries.
    sequential_monte_carlo : The second one.
    bridge_sampling : The one for samples of the model.

    Notes
    -----
    Importance sampling costs at most ``max_samples + 16_384`` evaluations (two batches of 8192
    decide), sequential Monte Carlo what :func:`sequential_monte_carlo` says and 30 more moves,
    bridge sampling five evaluations per sample.

    All methods see only what draws of q lead to: a mode that none of them is near is missed, and
    the standard error does not show it.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase
    >>> from skebm.partition import estimate
    >>> rng = torch.Generator().manual_seed(0)
    >>> q = GaussianMixtureBase([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    >>> near = estimate(lambda x: q.log_prob(x - 0.5) + 5.0, q, rng)
    >>> far = estimate(lambda x: q.log_prob(x - 5.0) + 5.0, q, rng)
    >>> near.method, far.method
    ('importance sampling', 'bridge sampling')
    >>> [bool(abs(r.value - 5.0) < 3 * r.std_error) for r in (near, far)]
    [True, True]
    """
    path = Path(log_density, proposal)
    at_least(
        target_std_error=(target_std_error, 0),
        max_samples=(max_samples, 2 * BATCH_SIZE if max_samples else 0),
        n_particles=(n_particles, 2 * N_GROUPS),
        max_particles=(max_particles, n_particles),
    )
    if samples is not None:
        path.check_samples(samples, proposal.sample(1, rng))
        at_least(**{"len(samples)": (len(samples), 2 * N_GROUPS)})
        blocks = samples[len(samples) % N_GROUPS :].unflatten(0, (N_GROUPS, -1))
        return _bridge(path, blocks, blocks.new_zeros(N_GROUPS), rng)

    def draw(n, rng):
        return path.log_ratio(proposal.sample(n, rng))

    for most in (2 * BATCH_SIZE, max_samples) if max_samples else ():
        result = adaptive_importance_sampling(
            draw, rng,
            target_std_error=target_std_error, batch_size=BATCH_SIZE, max_samples=most,
        )  # fmt: skip
        if result.ess < MIN_ESS_SHARE * result.n_samples:
            break
        if result.std_error <= target_std_error or most == max_samples:
            return result

    log_z, particles = [], []
    if kernel is None:
        kernel = path.kernel(proposal.sample(n_particles, rng))
    while True:
        run = sequential_monte_carlo(
            log_density, proposal, rng,
            n_particles=n_particles // N_GROUPS, n_runs=N_GROUPS, kernel=kernel,
        )  # fmt: skip
        log_z.append(run.log_z)
        particles.append(_settle(path, run, kernel, rng))
        result = _of_particles(path, torch.cat(particles), torch.cat(log_z), rng)
        used = len(particles) * n_particles
        if result.std_error <= target_std_error or used + n_particles > max_particles:
            return result


def _settle(path, run, kernel, rng):
    """Particles after further moves, tuned as the last."""
    x, _ = move(
        run.samples.flatten(0, 1), path.at(1.0), rng, kernel, N_SETTLING_MOVES,
        run.tuning.step_sizes[-1].item(), run.tuning.scale_trils[-1], {},
    )  # fmt: skip
    return x.view_as(run.samples)


def _of_particles(path, particles, log_z, rng):
    """From the weights of the runs, or by bridge sampling where that is sound and better."""
    n_samples = particles.shape[0] * particles.shape[1]
    result = combine(log_z, n_samples, "sequential Monte Carlo")
    if ess(log_z) < MIN_RUN_SHARE * len(log_z):
        return result
    try:
        bridge = _bridge(path, particles, log_z, rng)
    except ValueError:  # no overlap with the distributions fitted to the particles
        return result
    return min(result, bridge, key=lambda r: r.std_error)


class _HalfNormal:
    """Half q, half a normal distribution with the moments of weighted samples: (n, d), (n,).

    It overlaps with the model at least half as well as q does, and far better where the model is
    near normal but not near q.
    """

    def __init__(self, proposal, x, weights):
        self.proposal, self.dtype = proposal, x.dtype
        x = x.double()
        mean = weights @ x / weights.sum()
        covariance = shrunk_covariance(x, weights)
        self.normal = GaussianMixtureBase([1.0], mean[None], covariance[None]).to(x.device)

    def log_prob(self, x):
        both = torch.logaddexp(self.proposal.log_prob(x), self.normal.log_prob(x.double()))
        return both - math.log(2)

    def sample(self, n, rng):
        """Rows alternate between the two."""
        both = [
            distribution.sample(-(-n // 2), rng) for distribution in (self.proposal, self.normal)
        ]
        return torch.stack([x.to(self.dtype) for x in both], 1).flatten(0, 1)[:n]


def _bridge(path, samples, log_z, rng):
    """Bridge sampling with groups of samples, (n_groups, n, d), weighted by exp(log_z).

    Each half of the groups is bridged to the distribution fitted to the other half.
    """
    halves = [(samples[k::2], (log_z[k::2] - log_z.max()).exp()) for k in (0, 1)]
    estimates = [_half_bridge(path, *half, other, rng) for half, other in (halves, halves[::-1])]
    (a, variance_a), (b, variance_b) = estimates
    # Each distribution was fitted to the samples of the other half, which correlates the two
    # (measured: up to 0.4), so their errors are added, not their variances: an upper bound at any
    # correlation. The disagreement of the halves too is a standard error.
    std_error = 0.5 * max(math.sqrt(variance_a) + math.sqrt(variance_b), abs(a - b))
    value = max(a, b) - math.log(2) + math.log1p(math.exp(-abs(a - b)))
    n_samples = (1 + DRAWS_PER_SAMPLE) * samples.shape[0] * samples.shape[1]
    return from_error(value, std_error, n_samples, "bridge sampling")


def _half_bridge(path, x, weights, other, rng):
    """log Z and its variance as seen between the groups."""
    n_groups, n, d = x.shape
    # as many draws for each group, so that the groups are independent throughout
    distribution = _HalfNormal(path.proposal, other[0].flatten(0, 1), other[1].repeat_interleave(n))
    l_q, l_p = (
        Path(path.log_density, distribution).log_ratio(rows)
        for rows in (distribution.sample(DRAWS_PER_SAMPLE * n_groups * n, rng), x.flatten(0, 1))
    )
    weights = weights / weights.mean()
    odds = -math.log(DRAWS_PER_SAMPLE)
    value = solve(l_q, l_p, weights.repeat_interleave(n), odds)
    left = (l_q - value + odds).sigmoid().view(n_groups, -1)
    right = (value - odds - l_p).sigmoid().view(n_groups, n)
    # log Z solves sum(left) = sum(weights right), a sum over independent groups: its variance is
    # that of the groups over the squared slope, the "sandwich" of robust regression
    level = left.sum() / n_groups
    imbalance = left.sum(1) - level - weights * (right.sum(1) - level)
    slope = (left * (1 - left)).sum() + weights @ (right * (1 - right)).sum(1)
    return value, (imbalance.square().sum() / slope**2 * n_groups / (n_groups - 1)).item()
