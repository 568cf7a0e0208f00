"""log Z by importance sampling, in float64.

With x_i drawn from a normalised distribution q and log-weights l_i = log p~(x_i) - log q(x_i) (for
a tilt q exp(f) simply l_i = f(x_i)),

    Z = mean exp(l_i),    ess = (sum w)^2 / sum w^2,    se(log Z)^2 = (1/ess - 1/m) m / (m - 1),

the last being the delta method: the relative standard error of the mean of the weights.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from skebm.partition._weights import log_sums


class LogPartition(NamedTuple):
    """A measured log Z.

    Floats, or tensors of shape (K,) where K distributions were measured at once.

    Attributes
    ----------
    value : float
        Estimate of log Z in nats.
    std_error : float
        Its standard error.
    ess : float
        Effective number of samples. The estimate and its error are trustworthy while this is
        at least one or two per cent of `n_samples`.
    n_samples : int
        Number of samples.
    method : str
        "importance sampling", "annealed importance sampling", "sequential Monte Carlo" or "bridge
        sampling". Where it is not the first, `ess` is the number of weights that would give the
        same error by importance sampling.
    lower, upper : float or None
        Of annealed importance sampling: estimates that lie below and above log Z on average.

    See Also
    --------
    estimate : Measures it, by the method that fits.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import importance_sampling
    >>> measured = importance_sampling(torch.zeros(100))  # weights that are all one
    >>> measured.value, measured.std_error, measured.ess, measured.method
    (0.0, 0.0, 100.00000000000006, 'importance sampling')
    """

    value: Any
    std_error: Any
    ess: Any
    n_samples: int
    method: str
    lower: float | None = None
    upper: float | None = None


class _Moments(NamedTuple):
    """log of sum w and of sum w^2 over n samples; all that an estimate needs."""

    log_sum: torch.Tensor
    log_sum_squares: torch.Tensor
    n: int

    @classmethod
    def of(cls, log_weights):
        log_weights = torch.as_tensor(log_weights).detach().double()
        if log_weights.ndim not in (1, 2) or log_weights.shape[-1] < 2:
            raise ValueError(
                "log_weights must have shape (m,) or (K, m) with at least two samples, "
                f"got {tuple(log_weights.shape)}."
            )
        if not (log_weights < math.inf).all():  # nan as well
            raise ValueError("log_weights must not contain nan or +inf.")
        return cls(*log_sums(log_weights), log_weights.shape[-1])


def importance_sampling(log_weights: torch.Tensor) -> LogPartition:
    """Estimate log Z from log-weights.

    Parameters
    ----------
    log_weights : Tensor of shape (m,) or (K, m)
        log p~(x) - log q(x) at samples of q; -inf is a weight of zero.

    Returns
    -------
    LogPartition
        Of floats for (m,), of tensors of shape (K,) for (K, m).

    See Also
    --------
    adaptive_importance_sampling : Draws until the error is small enough.
    ess : The effective sample size alone.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import importance_sampling
    >>> x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))  # q = N(0, 1)
    >>> measured = importance_sampling(0.5 * x - 0.125 + 2.0)  # p = N(0.5, 1) times e^2
    >>> abs(measured.value - 2.0) < 3 * measured.std_error
    True
    """
    return _result([_Moments.of(log_weights)])


def adaptive_importance_sampling(
    draw: Callable[[int, torch.Generator], torch.Tensor],
    rng: torch.Generator,
    *,
    target_std_error: float = 0.01,
    batch_size: int = 8192,
    max_samples: int = 1_000_000,
) -> LogPartition:
    """Draw batches until log Z is known well enough.

    The error reported is the larger of the delta method's and the one seen in the spread of the
    batches, so that a few rare large weights in one batch are not averaged away.

    Parameters
    ----------
    draw : callable
        ``draw(n, rng)`` returns log-weights of n fresh samples, shape (n,) or (K, n).
    rng : torch.Generator
    target_std_error : float, default=0.01
        Stop when the standard error (of each of the K) is at most this.
    batch_size : int, default=8192
        At least two batches are drawn; memory is that of one batch.
    max_samples : int, default=1_000_000
        Stop after this many samples in any case; compare `std_error` of the result with the
        target to see whether it was reached.

    Returns
    -------
    LogPartition

    See Also
    --------
    importance_sampling : Of log-weights that are drawn already.
    estimate : Changes the method where weights are too uneven.

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import adaptive_importance_sampling
    >>> def draw(n, rng):  # q = N(0, 1), p = N(0.5, 1) times e^2
    ...     x = torch.randn(n, generator=rng)
    ...     return 0.5 * x - 0.125 + 2.0
    >>> measured = adaptive_importance_sampling(draw, torch.Generator().manual_seed(0))
    >>> measured.std_error <= 0.01, abs(measured.value - 2.0) < 3 * measured.std_error
    (True, True)
    """
    if max_samples < 2 * batch_size:
        raise ValueError(
            f"max_samples={max_samples} must allow two batches of batch_size={batch_size}."
        )
    batches = []
    while True:
        batches.append(_Moments.of(draw(batch_size, rng)))
        if len(batches) == 1:
            continue
        result = _result(batches)
        reached = torch.as_tensor(result.std_error <= target_std_error).all()
        if reached or (len(batches) + 1) * batch_size > max_samples:
            return result


def from_error(value: float, std_error: float, n_samples: int, method: str) -> LogPartition:
    """LogPartition with the ess that importance sampling has at this error."""
    ess = 1 / (std_error**2 + 1 / n_samples)
    return LogPartition(value, std_error, ess, n_samples, method)


def _result(batches):
    """Merge batches of one size."""
    n_batches, m = len(batches), sum(batch.n for batch in batches)
    log_sums = torch.stack([batch.log_sum for batch in batches])
    log_sum = log_sums.logsumexp(0)
    value = log_sum - math.log(m)
    # 1 / ess; without any weight there is no estimate, and its error is infinite
    concentration = (
        torch.stack([batch.log_sum_squares for batch in batches]).logsumexp(0) - 2 * log_sum
    ).exp()
    ess = concentration.reciprocal().nan_to_num(nan=0.0)
    variance = ((concentration - 1 / m) * (m / (m - 1))).clamp_min(0.0)
    if n_batches > 1:
        shares = (log_sums - log_sum).exp() * n_batches  # Z of each batch / Z
        variance = torch.maximum(variance, shares.var(0) / n_batches)
    std_error = variance.nan_to_num(nan=math.inf).sqrt()
    if value.ndim == 0:
        value, std_error, ess = value.item(), std_error.item(), ess.item()
    return LogPartition(value, std_error, ess, m, "importance sampling")
