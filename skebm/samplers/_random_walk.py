"""Random-walk Metropolis, for log-densities without a gradient.

With xi standard normal, the proposal x' = x + step_size * scale * xi is accepted with probability
min(1, p(x') / p(x)). It needs about d steps where MALA needs d^(1/3).
"""

import torch

from skebm.samplers._state import State, metropolis

__all__ = ["TARGET_ACCEPTANCE", "init", "step"]

TARGET_ACCEPTANCE = 0.234  # optimal in high dimension (Roberts, Gelman & Gilks 1997)


def init(x, log_density):
    """State at x, without a gradient."""
    with torch.no_grad():
        return State(x, log_density(x))


def step(state, log_density, generator, *, step_size, scale=1.0):
    """One step of all chains, with one evaluation.

    Parameters
    ----------
    state : State
        From :func:`init` or a former step.
    log_density : callable
        (n_chains, d) -> (n_chains,), up to a constant.
    generator : torch.Generator
    step_size : float
        Standard deviation of the noise, in units of `scale`; 2.4 / sqrt(d) is a good start.
    scale : float or Tensor of shape (d,), default=1.0
        A length for each dimension, ideally the standard deviations of the target.

    Returns
    -------
    State, Info
    """
    x = state.position
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    proposal = init(x + step_size * scale * noise, log_density)
    return metropolis(state, proposal, proposal.log_density - state.log_density, generator)
