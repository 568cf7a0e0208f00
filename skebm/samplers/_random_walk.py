"""Random-walk Metropolis, for log-densities without a gradient.

With xi standard normal, the proposal x' = x + step_size * scale * xi is accepted with probability
min(1, p(x') / p(x)). It needs about d steps where MALA needs d^(1/3).
"""

import torch

from skebm._typing import LogDensity
from skebm.samplers._state import Info, State, add_scaled, metropolis, normal_like
from skebm.samplers._state import evaluate as init

__all__ = ["TARGET_ACCEPTANCE", "init", "step"]

TARGET_ACCEPTANCE = 0.234  # optimal in high dimension (Roberts, Gelman & Gilks 1997)


def step(
    state: State,
    log_density: LogDensity,
    rng: torch.Generator,
    *,
    step_size: float | torch.Tensor,
    scale: float | torch.Tensor = 1.0,
) -> tuple[State, Info]:
    """One step of all chains, with one evaluation.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant.
    rng : torch.Generator
    step_size : float or Tensor that broadcasts to (n_chains, d)
        Standard deviation of the noise, in units of `scale`; 2.4 / sqrt(d) is a good start.
    scale : float or Tensor that broadcasts to (n_chains, d), default=1.0
        A length for each dimension, ideally the standard deviations of the target.

    Returns
    -------
    State, Info
    """
    noise = normal_like(state.position, rng)
    proposal = init(add_scaled(state.position, noise, step_size * scale), log_density)
    return metropolis(state, proposal, proposal.log_density - state.log_density, rng)
