"""Independence Metropolis: all proposals come from one distribution q, whatever the state.

With log-weights w(x) = log p(x) - log q(x), up to a constant, a proposal x' from q is accepted
with probability min(1, exp(w(x') - w(x))). Chains started at draws from q forget their start
geometrically fast where the weights are bounded; no gradient is needed.
"""

from collections.abc import Callable

import torch

from skebm._typing import LogDensity
from skebm.samplers._state import Info, State, metropolis
from skebm.samplers._state import evaluate as init

__all__ = ["TARGET_ACCEPTANCE", "init", "step"]

TARGET_ACCEPTANCE = None  # there is no step size


def step(
    state: State,
    log_weight: LogDensity,
    rng: torch.Generator,
    *,
    propose: Callable[[int, torch.Generator], torch.Tensor],
) -> tuple[State, Info]:
    """One step of all chains.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step; its `log_density` holds the log-weights.
    log_weight : callable
        (n_chains, d) -> (n_chains,): log p(x) - log q(x), up to a constant.
    rng : torch.Generator
    propose : callable
        ``propose(n, rng)`` draws n points from q.

    Returns
    -------
    State, Info
    """
    proposal = init(propose(len(state.position), rng), log_weight)
    return metropolis(state, proposal, proposal.log_density - state.log_density, rng)
