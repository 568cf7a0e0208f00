r"""log Z from samples of both distributions, in float64.

With l = log p~ - log q, n_q draws of q and n_p of p, and s(u) = 1 / (1 + exp(-u)), the optimal
estimate c of log Z solves

    sum_q s(l - c + log(n_p / n_q)) = sum_p s(-(l - c + log(n_p / n_q))),

which is the limit of the iteration of Meng & Wong (1996), the acceptance ratio of Bennett (1976),
and the likelihood equation of the logistic regression that tells the two samples apart. The left
side falls with c and the right side rises, so there is one solution.
"""

import math

import torch
from scipy.optimize import brentq

from skebm.partition._importance import LogPartition, from_error

NO_OVERLAP = "log_ratio_proposal and log_ratio_model show no overlap of the two distributions."


def bridge_sampling(
    log_ratio_proposal: torch.Tensor,
    log_ratio_model: torch.Tensor,
    *,
    model_ess: float | None = None,
) -> LogPartition:
    """Estimate log Z from log-ratios at draws of the proposal and at samples of the model.

    Neither distribution need cover the other; they need to overlap. Where the proposal does cover
    the model this is more accurate than importance sampling with the same draws.

    Parameters
    ----------
    log_ratio_proposal : Tensor of shape (n_q,)
        log p~(x) - log q(x) at draws of q; -inf outside the support of p.
    log_ratio_model : Tensor of shape (n_p,)
        The same at samples of p; +inf outside the support of q.
    model_ess : float, optional
        Effective number of the samples of p where they are correlated; by default n_p.

    Returns
    -------
    LogPartition
        With the asymptotic standard error.

    Raises
    ------
    ValueError
        If a log-ratio is nan or infinite with the wrong sign, there are fewer than two, or the
        samples show no overlap at all.

    See Also
    --------
    importance_sampling : With draws of the proposal alone.
    estimate : Chooses the method.

    References
    ----------
    Bennett, C. H. (1976). Efficient estimation of free energy differences. *J. Comp. Phys.* 22.
    Meng, X.-L. and Wong, W. H. (1996). Simulating ratios of normalizing constants via a simple
    identity. *Statistica Sinica* 6.
    Frühwirth-Schnatter, S. (2004). Estimating marginal likelihoods for mixture and Markov
    switching models using bridge sampling techniques. *Econometrics Journal* 7 (standard error).

    Examples
    --------
    >>> import torch
    >>> from skebm.partition import bridge_sampling
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(10_000, generator=rng)  # q = N(0, 1)
    >>> y = torch.randn(10_000, generator=rng) + 2.0  # p = N(2, 1), Z = e^5
    >>> def log_ratio(x):
    ...     return 0.5 * x**2 - 0.5 * (x - 2.0) ** 2 + 5.0
    >>> result = bridge_sampling(log_ratio(x), log_ratio(y))
    >>> bool(abs(result.value - 5.0) < 3 * result.std_error)
    True
    """
    l_q = _checked(log_ratio_proposal, "log_ratio_proposal", 1)
    l_p = _checked(log_ratio_model, "log_ratio_model", -1)
    n_q, n_p = len(l_q), len(l_p)
    if model_ess is None:
        model_ess = n_p
    elif not 0 < model_ess < math.inf:
        raise ValueError(f"model_ess={model_ess} must be positive and finite.")
    odds = math.log(model_ess / n_q)
    value = solve(l_q, l_p, torch.full_like(l_p, model_ess / n_p), odds)
    a, b = (l_q - value + odds).sigmoid(), (value - odds - l_p).sigmoid()
    if not a.sum() > 0 < b.sum():
        raise ValueError(NO_OVERLAP)
    variance = a.var() / a.mean() ** 2 / n_q + b.var() / b.mean() ** 2 / model_ess
    return from_error(value, variance.sqrt().item(), n_q + n_p, "bridge sampling")


def solve(l_q: torch.Tensor, l_p: torch.Tensor, weights: torch.Tensor, odds: float) -> float:
    """The c at which the two sides agree, the samples of p being weighted."""
    logs = torch.cat([l_q, l_p])
    logs = logs[logs.isfinite()]
    if len(logs) == 0:
        raise ValueError(NO_OVERLAP)

    def excess(c):
        left = (l_q - c + odds).sigmoid().sum()
        return (left - weights @ (c - odds - l_p).sigmoid()).item()

    margin = math.log(len(l_q) + len(l_p)) + abs(weights.sum().log().item()) + 1.0
    low, high = logs.min().item() + odds - margin, logs.max().item() + odds + margin
    if not excess(low) > 0 > excess(high):
        raise ValueError(NO_OVERLAP)
    return brentq(excess, low, high, xtol=1e-10)  # pyright: ignore[reportReturnType]


def _checked(values, name, sign):
    """float64 log-ratios, where infinite then of the one sign that has a meaning."""
    values = torch.as_tensor(values).detach().double()
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"{name} must have shape (n,) with at least two values, got {tuple(values.shape)}."
        )
    if not (sign * values < math.inf).all():  # nan as well
        raise ValueError(f"{name} must not contain nan or {'+' if sign > 0 else '-'}inf.")
    return values
