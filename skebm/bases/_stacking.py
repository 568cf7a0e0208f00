"""Weights of a stack by held-out likelihood, and what is worth one."""

from collections.abc import Sequence

import torch

MIN_ADDED_GAIN = 0.003
"""What is added to a stack has to raise its held-out log-likelihood by so many nats per row."""

MAX_ADDED_WEIGHT = 0.99
"""Of what is added: the stack stays, as it covers what a flow that is sure of itself does not."""


def stacking_weights(
    log_prob: torch.Tensor, sample_weight: torch.Tensor, *, floor: float = 1e-3, n_iter: int = 500
) -> torch.Tensor:
    """Mixture weights that maximise a held-out log-likelihood, by expectation-maximisation.

    Parameters
    ----------
    log_prob : Tensor of shape (n_samples, n_distributions)
        Log-density of each held-out row under each distribution.
    sample_weight : Tensor of shape (n_samples,)
    floor : float, default=1e-3
        Distributions that end with less weight are dropped (weight 0).
    n_iter : int, default=500

    Returns
    -------
    Tensor of shape (n_distributions,)

    See Also
    --------
    StackedBase : The mixture with these weights.
    fit_bases : Fits distributions and stacks them.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import stacking_weights
    >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> narrow, right, far = (
    ...     torch.distributions.Normal(*pair).log_prob(x) for pair in ((0, 0.3), (0, 1), (9, 1))
    ... )
    >>> log_prob = torch.stack([narrow, right, far], dim=1)
    >>> stacking_weights(log_prob, torch.ones(1000).double()).round(decimals=1)
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    share = sample_weight / sample_weight.sum()
    weights = torch.full((log_prob.shape[1],), 1.0 / log_prob.shape[1], dtype=torch.float64)
    density = (log_prob - log_prob.amax(1, keepdim=True)).exp()
    for _ in range(n_iter):
        weights = weights * ((share / (density @ weights)) @ density)
    kept = torch.where(weights < floor, 0.0, weights)
    kept = kept / kept.sum()
    # a distribution of small weight may still be all that covers some row
    before, after = (share @ (log_prob + w.log()).logsumexp(1) for w in (weights, kept))
    return kept if before - after < floor else weights


def stack(
    log_prob: torch.Tensor, sample_weight: torch.Tensor, min_gain: Sequence[float]
) -> tuple[list[int], torch.Tensor]:
    """Distributions that are worth what they cost, as numbers, and their weights.

    Parameters
    ----------
    log_prob : Tensor of shape (n_samples, n_distributions)
    sample_weight : Tensor of shape (n_samples,)
    min_gain : sequence of n_distributions floats
        Nats per row by which each has to raise the held-out log-likelihood.
    """

    def attempt(columns):
        weights = stacking_weights(log_prob[:, columns], sample_weight)
        logs = (log_prob[:, columns] + weights.log()).logsumexp(1)
        return (sample_weight @ logs / sample_weight.sum()).item(), weights

    kept = list(range(log_prob.shape[1]))
    value, weights = attempt(kept)
    for j in sorted(kept, key=lambda j: weights[j]):
        others = [i for i in kept if i != j]
        if min_gain[j] and others:
            without, new_weights = attempt(others)
            if value - without < min_gain[j]:
                kept, value, weights = others, without, new_weights
    return [j for j, w in zip(kept, weights, strict=True) if w > 0], weights[weights > 0]


def added(
    stacked: torch.Tensor, log_prob: torch.Tensor, sample_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of one more distribution beside a stack, (1,), and the gain of every row, (n,).

    Parameters
    ----------
    stacked, log_prob : Tensor of shape (n_samples,)
        Log-densities of held-out rows.
    sample_weight : Tensor of shape (n_samples,)
    """
    both = torch.stack([stacked, log_prob], dim=1)
    weights = stacking_weights(both, sample_weight)
    own = weights[1:].clamp(max=MAX_ADDED_WEIGHT)
    logs = both + torch.cat([1.0 - own, own]).log()
    return own, logs.logsumexp(1) - stacked


def is_worth_it(gain: torch.Tensor, sample_weight: torch.Tensor, *, n_errors: float) -> bool:
    """Whether a gain, row by row, is more than a little, and than so many standard errors."""
    share = sample_weight / sample_weight.sum()
    mean = share @ gain
    error = (share.square() @ (gain - mean).square()).sqrt()
    return bool(mean > MIN_ADDED_GAIN and mean > n_errors * error)
