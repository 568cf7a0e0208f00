"""Several steps of a cheap chain, accepted as one (Liu 2001, section 9.4.3).

Let s be a cheap approximation of the target p, and w(x) = log p(x) - log s(x). A chain that is
reversible under s takes n steps from x to x', and all of them are accepted with probability
min(1, exp(w(x') - w(x))). This leaves p invariant, at one evaluation of p and no gradient of it:
what Christen & Fox (2005) call delayed acceptance.
"""

from typing import Any, NamedTuple

import torch

from skebm._typing import Kernel, LogDensity
from skebm.samplers._state import State, metropolis
from skebm.samplers._state import evaluate as init

__all__ = ["TARGET_ACCEPTANCE", "DelayedInfo", "init", "step"]

TARGET_ACCEPTANCE = None  # the step size belongs to the cheap chain


class DelayedInfo(NamedTuple):
    """What happened in a step: :class:`Info` of the final decision, and of the cheap chain.

    Attributes
    ----------
    acceptance_probability, accepted, energy_error, diverged : Tensor of shape (n_chains,)
        As in :class:`Info`, of the final decision.
    cheap_acceptance_probability : Tensor of shape (n_chains,)
        Of the steps of the cheap chain, their mean.

    See Also
    --------
    Info : That of the other kernels.
    run : Means of these over a run.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import delayed_acceptance, random_walk
    >>> def log_density(x):
    ...     return -0.5 * x.square().sum(1)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 2, generator=rng)
    >>> def zero(x):  # the cheap density is the density itself
    ...     return torch.zeros(len(x))
    >>> state = delayed_acceptance.init(x, zero)
    >>> state, info = delayed_acceptance.step(
    ...     state, zero, rng, kernel=random_walk, cheap_log_density=log_density, n_steps=5,
    ...     step_size=1.0,
    ... )
    >>> bool(info.accepted.all()), info.cheap_acceptance_probability.shape
    (True, torch.Size([8]))
    """

    acceptance_probability: torch.Tensor
    accepted: torch.Tensor
    energy_error: torch.Tensor
    diverged: torch.Tensor
    cheap_acceptance_probability: torch.Tensor


def step(
    state: State,
    log_weight: LogDensity,
    rng: torch.Generator,
    *,
    kernel: Kernel,
    cheap_log_density: LogDensity,
    n_steps: int,
    **options: Any,
) -> tuple[State, DelayedInfo]:
    """Take `n_steps` steps of a cheap chain, and accept or reject all of them.

    Parameters
    ----------
    state : State
        From ``init(x, log_weight)`` or a former step: its `log_density` holds the log-weights.
    log_weight : callable
        (n_chains, d) -> (n_chains,): log p(x) - log s(x), up to a constant.
    rng : torch.Generator
    kernel : module
        Moves the cheap chain; reversible under it, as Metropolis kernels are. With
        ``skebm.samplers.ula`` what it leaves invariant is p up to the error of its discretisation.
    cheap_log_density : callable
        log s, up to a constant.
    n_steps : int
    **options
        Passed on to ``kernel.step``.

    Returns
    -------
    State, DelayedInfo
    """
    cheap = kernel.init(state.position, cheap_log_density)
    acceptance: Any = 0.0
    for _ in range(n_steps):
        cheap, info = kernel.step(cheap, cheap_log_density, rng, **options)
        acceptance = acceptance + info.acceptance_probability
    proposal = init(cheap.position, log_weight)
    state, info = metropolis(state, proposal, proposal.log_density - state.log_density, rng)
    return state, DelayedInfo(*info, acceptance / n_steps)
