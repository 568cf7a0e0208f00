r"""Annealed importance sampling along the geometric path.

A particle goes from q to p~ along pi_b = q^(1 - b) p~^b, 0 = b_0 < ... < b_K = 1. Its log-weight
grows by (b' - b) l(x), l = log p~ - log q, when it goes on from b to b' at x, and it is then moved
by a Markov kernel that keeps pi_b'.
"""

from typing import Any

import torch

from skebm._typing import Distribution, Kernel, LogDensity
from skebm.partition._bridge import bridge_sampling
from skebm.partition._importance import LogPartition, importance_sampling
from skebm.partition._path import Path, at_least, move
from skebm.partition._pilot import pilot_run

PILOT_ESS_SHARE = 0.8
"""Of the particles of the pilot run, kept from one of its temperatures to the next."""

PILOT_MOVES = 5
"""Steps of the kernel at each of its temperatures."""


def annealed_importance_sampling(
    log_density: LogDensity,
    proposal: Distribution,
    rng: torch.Generator,
    *,
    samples: torch.Tensor | None = None,
    n_particles: int = 1024,
    n_temperatures: int = 100,
    n_pilot: int = 1024,
    n_moves: int = 1,
    kernel: Kernel | None = None,
    **options: Any,
) -> LogPartition:
    """Estimate log Z by annealed importance sampling, from both ends if samples are given.

    Forward, each particle starts at a draw of q, and its log-weights add up to log w, where
    E[w] = Z exactly; so log of their mean lies below log Z on average. In reverse, particles start
    at exact samples of p and take the same path back: E[1 / w] = 1 / Z, and minus the log of the
    mean of 1 / w lies above log Z on average. Where both are at hand they bracket log Z, and the
    value is their optimal combination, by bridge sampling.

    A pilot run, as in :func:`sequential_monte_carlo`, places the temperatures and tunes the steps;
    both are then fixed, which makes the statements above exact.

    Parameters
    ----------
    log_density, proposal, rng : as in :func:`sequential_monte_carlo`
    samples : Tensor of shape (m, d), optional
        Exact, independent samples of p. From samples of a Markov chain that has not converged the
        upper bound need not be one.
    n_particles : int, default=1024
        Of the forward direction; the reverse one has m.
    n_temperatures : int, default=100
        Steps from q to p. The variance of log w falls as one over their number.
    n_pilot : int, default=1024
        Particles of the pilot run.
    n_moves : int, default=1
        Steps of the kernel at each temperature.
    kernel : module, optional
        As in :func:`sequential_monte_carlo`.
    **options
        Passed on to ``kernel.step``.

    Returns
    -------
    LogPartition
        `lower` is the forward estimate, `upper` the one in reverse (None without samples). Both
        are noisy: they bracket log Z on average, and may cross when they are close.

    Raises
    ------
    ValueError
        As :func:`sequential_monte_carlo`, and if `samples` has another shape or lies where q or
        p~ is zero.

    See Also
    --------
    sequential_monte_carlo : With resampling, and temperatures that it finds.
    estimate : Chooses the method.

    Notes
    -----
    With N particles in both directions and T temperatures, (T - 1) N (n_moves + 1) evaluations
    with and T N without gradient (HMC: (T - 1) N (n_moves L + 1)), after the pilot run.

    References
    ----------
    Neal, R. M. (2001). Annealed importance sampling. *Statistics and Computing* 11.
    Grosse, R., Ghahramani, Z. and Adams, R. P. (2015). Sandwiching the marginal likelihood using
    bidirectional Monte Carlo. https://arxiv.org/abs/1511.02543

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase
    >>> from skebm.partition import annealed_importance_sampling
    >>> rng = torch.Generator().manual_seed(0)
    >>> q = GaussianMixtureBase([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    >>> def log_density(x):  # N((3, 3), I) times e^5
    ...     return q.log_prob(x - 3.0) + 5.0
    >>> exact = q.sample(1000, rng) + 3.0
    >>> result = annealed_importance_sampling(log_density, q, rng, samples=exact)
    >>> bool(abs(result.value - 5.0) < 3 * result.std_error)
    True
    >>> bool(result.lower - 0.1 < 5.0 < result.upper + 0.1)
    True
    """
    path = Path(log_density, proposal)
    at_least(
        n_particles=(n_particles, 2), n_temperatures=(n_temperatures, 1),
        n_pilot=(n_pilot, 16), n_moves=(n_moves, 1),
    )  # fmt: skip
    x = proposal.sample(n_particles, rng)
    if samples is not None:
        path.check_samples(samples, x)
    pilot, kernel = pilot_run(path, rng, n_pilot, PILOT_ESS_SHARE, PILOT_MOVES, kernel, options)
    # as many temperatures as asked for, as dense as those of the pilot run
    n_stages = len(pilot.step_sizes)
    position = torch.linspace(0, n_stages, n_temperatures + 1, dtype=torch.float64)
    temperatures = _interpolate(position, pilot.temperatures).tolist()
    # entry k of these belongs to stage k + 1
    position = (position[1:-1] - 1).clamp_min(0)
    moves = list(
        zip(
            temperatures[1:-1],
            _interpolate(position, pilot.step_sizes).tolist(),
            _interpolate(position, pilot.scale_trils),
            strict=True,
        )
    )
    gaps = [b - a for a, b in zip(temperatures, temperatures[1:], strict=False)]

    def work(x, gaps, moves):
        log_weights = gaps[0] * path.log_ratio(x)
        for gap, (b, step_size, tril) in zip(gaps[1:], moves, strict=True):
            x, _ = move(x, path.at(b), rng, kernel, n_moves, step_size, tril, options)
            log_weights += gap * path.log_ratio(x)
        return log_weights

    forward = work(x, gaps, moves)
    lower = importance_sampling(forward)
    name = "annealed importance sampling"
    if samples is None:
        return lower._replace(method=name, lower=lower.value)
    reverse = work(samples, gaps[::-1], moves[::-1])
    upper = importance_sampling(-reverse)
    # path and distribution together are one importance sampler, so that bridge sampling applies to
    # it
    both = bridge_sampling(forward, reverse)
    return both._replace(method=name, lower=lower.value, upper=-upper.value)


def _interpolate(position, values):
    """Rows of `values` at fractional positions, linearly between neighbours."""
    low = position.floor().long().clamp_max(len(values) - 2).clamp_min(0)
    high = (low + 1).clamp_max(len(values) - 1)
    share = (position - low).view(-1, *[1] * (values.ndim - 1)).to(values)
    return values[low].lerp(values[high], share)
