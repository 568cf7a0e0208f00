"""The pilot run of annealing: where the temperatures lie, and how long the steps are there."""

from typing import Any, NamedTuple

import torch

from skebm._typing import Kernel
from skebm.partition._path import Path, move
from skebm.partition._weights import largest_power, systematic_resampling

MIN_STEP = 1e-6
"""A step of the temperature below this means a log-ratio whose range no path can cross."""


class Tuning(NamedTuple):
    """What a pilot run fixes.

    Attributes
    ----------
    temperatures : Tensor of shape (K + 1,)
        From 0 to 1.
    step_sizes : Tensor of shape (K,)
        Of the kernel at temperatures 1 to K.
    scale_trils : Tensor of shape (K, d, d)
        Cholesky factors of the covariances of the particles there: the kernel moves in these units.

    See Also
    --------
    sequential_monte_carlo : Makes a pilot run, and returns this with the others.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase
    >>> from skebm.partition import sequential_monte_carlo
    >>> q = GaussianMixtureBase([1.0], [[0.0]], [[[1.0]]])
    >>> rng = torch.Generator().manual_seed(0)
    >>> def log_density(x):
    ...     return q.log_prob(x - 4.0)
    >>> run = sequential_monte_carlo(log_density, q, rng, n_runs=4, n_particles=64)
    >>> temperatures, step_sizes, scale_trils = run.tuning
    >>> len(temperatures) == len(step_sizes) + 1 == len(scale_trils) + 1
    True
    """

    temperatures: torch.Tensor
    step_sizes: torch.Tensor
    scale_trils: torch.Tensor


def pilot_run(
    path: Path,
    rng: torch.Generator,
    n: int,
    ess_share: float,
    n_moves: int,
    kernel: Kernel | None,
    options: dict[str, Any],
) -> tuple[Tuning, Kernel]:
    """Tuning, and the kernel where none was given, from one cloud of n particles."""
    x = path.proposal.sample(n, rng)
    if kernel is None:
        kernel = path.kernel(x)
    temperatures, step_sizes, scale_trils, step_size = [0.0], [], [], 1.0
    while temperatures[-1] < 1:
        log_ratio = path.log_ratio(x)
        b = _next_temperature(temperatures[-1], log_ratio, ess_share)
        x = x[resampled((b - temperatures[-1]) * log_ratio[None], rng)]
        temperatures.append(b)
        scale_trils.append(torch.linalg.cholesky(shrunk_covariance(x)))
        x, step_size = move(
            x, path.at(b), rng, kernel, n_moves, step_size, scale_trils[-1], options,
            adapt=True,
        )  # fmt: skip
        step_sizes.append(step_size)
    levels = torch.tensor(temperatures, dtype=torch.float64)
    sizes = torch.tensor(step_sizes, dtype=torch.float64)
    return Tuning(levels, sizes, torch.stack(scale_trils)), kernel


def _next_temperature(b, log_ratio, ess_share):
    """Temperature above b at which the weights keep `ess_share` of the particles, at most 1.

    Particles outside of the support do not count: they are lost at any temperature.
    """
    flat = log_ratio[log_ratio.isfinite()]
    if len(flat) == 0:
        raise ValueError(
            f"log_density is -inf at all {len(log_ratio)} draws of the proposal: give one with "
            "more mass on the support."
        )
    step = largest_power(flat, ess_share, most=1 - b, n_halvings=60).item()
    if step == 1 - b:
        return 1.0
    if step < MIN_STEP:
        raise ValueError(
            f"log_density differs from that of the proposal by {flat.max() - flat.min():.3g} nats "
            "among the particles: too far to be bridged. Give a proposal that is closer."
        )
    return b + step


def resampled(log_weights: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Systematic resampling within each run: (n_runs, n) -> rows of the flat cloud (n_runs n,)."""
    n_runs, n = log_weights.shape
    options = {"dtype": log_weights.dtype, "device": log_weights.device}
    offset = torch.rand(n_runs, 1, generator=rng, **options)
    picks = systematic_resampling(log_weights.softmax(1), offset)
    return (picks + n * torch.arange(n_runs, device=picks.device)[:, None]).ravel()


def shrunk_covariance(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Covariance of the rows of x, shrunk to its diagonal so that it is regular with few rows."""
    n, d = x.shape
    covariance = torch.cov(x.T, aweights=weights).view(d, d)
    return covariance.lerp(covariance.diag().diag(), d / (n + d))
